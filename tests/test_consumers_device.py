"""The DMA device of docs/use/consumers.md.

The document's code runs, and the device obeys on every design and backing.
"""

import os
import re
import subprocess
import sys
import threading
from errno import EEXIST, EFAULT, EINVAL, ENOENT, EPROTO
from pathlib import Path
from random import Random

import dma
import pytest

from outcomes import Errno, outcome
from processes import process, wait_gone
from restrictedmem.service.client import Service
from restrictedmem.service.wire import Call
from restrictedmem.units import PAGE_SIZE as PAGE
from third_parties import DMA, ROOT, Device, Puppet, fd, punch, resident, service, serving

__all__ = ["fd", "service"]

DOCUMENT = (ROOT / "docs" / "use" / "consumers.md").read_text(encoding="utf-8")


# The document.


def test_the_document_shows_the_whole_device() -> None:
    section = DOCUMENT[DOCUMENT.index("## The device") : DOCUMENT.index("## The owner")]
    shown = "\n".join(re.findall(r"^```python\n(.*?)^```\n", section, re.MULTILINE | re.DOTALL))
    code = [line for line in DMA.read_text(encoding="utf-8").splitlines() if line]
    assert [line for line in shown.splitlines() if line] == code
    assert len(code) < 190


@pytest.mark.requires("fuse")
def test_the_documents_owner_runs() -> None:
    section = DOCUMENT[DOCUMENT.index("## The owner") :]
    found = re.search(
        r"^```python\n(.*?)^```\n.*?^```text\n(.*?)^```\n", section, re.MULTILINE | re.DOTALL
    )
    assert found is not None
    done = subprocess.run(
        [sys.executable, "-c", found[1], str(DMA)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == found[2]


# The device.


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("design", ["v9", "v10", "v10+teardown", "bindings", "bindings+teardown"])
def test_the_device_moves_bytes_and_obeys(design: str) -> None:
    with serving(design=design) as service, Device(service) as device:
        fd, other = service.memfd_restricted(), service.memfd_restricted()
        device.attach(fd, 0x10000, 0, 16)
        # Another file, from page 1000 on.
        device.attach(other, 0x80000, 1000, 1016)
        device.fill(0x10000, 3 * PAGE, 0x5A)
        device.copy(0x10000, 0x80000 + 100, 2 * PAGE)
        assert device.equal(0x10000, 0x80000 + 100, 2 * PAGE) == 2 * PAGE
        assert device.equal(0x10000, 0x80000 + 100, 3 * PAGE) == 2 * PAGE
        assert (resident(fd), resident(other), device.status()["mapped"]) == (3, 3, 6)
        punch(other, 1000)
        assert (resident(other), device.status()["mapped"]) == (2, 5)
        assert device.equal(0x10000, 0x80000 + 100, 1) == 0
        told = device.status()["invalidations"]
        assert told == 1
        # A hole in nobody's window is told in designs without ranges, and takes nothing.
        punch(other, 0, 1000)
        assert device.status()["invalidations"] - told == (
            0 if design.startswith("bindings") else 1
        )
        assert device.status()["mapped"] == 6
        told = device.status()["invalidations"]
        device.detach(0x80000)
        assert device.status()["invalidations"] - told == (1 if design.endswith("+teardown") else 0)
        punch(other, 1000, 16)
        assert resident(other) == 0
        assert service.status()["last_error"] == ""
        os.close(fd)
        os.close(other)


@pytest.mark.requires("fuse")
def test_the_device_refuses(service: Service, fd: int) -> None:
    with Device(service) as device:
        device.attach(fd, 0x10000, 0, 16)
        assert outcome(lambda: device.attach(fd, 0x1F000, 0, 1)) == Errno(EEXIST)
        assert outcome(lambda: device.attach(fd, 0x20001, 0, 1)) == Errno(EINVAL)
        assert outcome(lambda: device.attach(fd, 0x20000, 1, 1)) == Errno(EINVAL)
        assert outcome(lambda: device.fill(0x1F000, PAGE + 1, 1)) == Errno(EFAULT)
        assert outcome(lambda: device.detach(0x11000)) == Errno(ENOENT)
        assert outcome(lambda: device.channel.call(dma.COPY, b"short")) == Errno(EPROTO)
        assert outcome(lambda: device.channel.call(Call("none", 99))) == Errno(EPROTO)
        assert outcome(
            lambda: device.channel.call(dma.ATTACH, dma.ATTACH_BODY.pack(bytes(16), 0x20000, 0, 1))
        ) == Errno(EINVAL)
        device.fill(0x10000, 1, 1)


@pytest.mark.requires("fuse")
def test_ps_shows_it(service: Service, fd: int) -> None:
    with Device(service) as device:
        device.attach(fd, 0, 0, 4)
        device.fill(0, 1, 1)
        punch(fd, 0)
        device.status()
        (found,) = service.status()["consumers"]
        assert (found["name"], found["invalidations"], len(found["files"])) == ("dma", 1, 1)
        assert (found["report"]["windows"], found["report"]["mapped"]) == (1, 0)
        known = process(found["report"]["pid"])
        assert known is not None
        assert known.name == "rmem-dma"
        shown = subprocess.run(
            [sys.executable, "-m", "restrictedmem", "ps"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        assert (
            f"dma {found['number']}: pid {known.pid}, descriptors {found['files'][0]}, "
            f"1 invalidations" in shown
        )
    wait_gone([known])


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    ("backing", "pin", "around"),
    [
        ("memfd", False, 1),
        ("thp", False, 1),
        ("memfd", True, 512),
        pytest.param("hugetlb-2m", False, 512, marks=pytest.mark.requires("hugetlb")),
    ],
)
def test_the_device_on_every_backing(backing: str, pin: bool, around: int) -> None:
    with serving(backing=backing, pin=pin) as service, Device(service) as device:
        fd = service.memfd_restricted()
        device.attach(fd, 0, 0, 1024)
        device.fill(0, PAGE, 9)
        assert resident(fd) == around
        assert (device.equal(0, PAGE, PAGE), device.equal(PAGE, 2 * PAGE, PAGE)) == (0, PAGE)
        punch(fd, 0, 1024)
        assert (resident(fd), device.status()["mapped"]) == (0, 0)
        assert device.equal(0, PAGE, PAGE) == PAGE
        os.close(fd)


@pytest.mark.requires("fuse", "hugetlb")
def test_a_lazy_file_asks_who_holds_its_pages() -> None:
    with serving(backing="hugetlb-2m", design="lazy") as service, Puppet(service) as puppet:
        fd = service.memfd_restricted()
        file = puppet.bind(fd, 0, 512)
        puppet("call", file, "get_page", 0)
        punch(fd, 0, 5)
        # Taken once more: this consumer's answer to PAGE_COUNT keeps the huge page, though all of
        # it was punched.
        puppet("call", file, "get_page", 0)
        punch(fd, 5, 507)
        told = [
            ["start", 0, 5, None],
            ["end", 0, 5, None],
            ["start", 5, 512, None],
            ["end", 5, 512, None],
        ]
        assert (resident(fd), puppet("heard", file)) == (512, told)
        puppet("call", file, "put_page", 0)
        punch(fd, 3)
        assert resident(fd) == 0
        exact, whole = [3, 4, None], [0, 512, 9]
        assert puppet("heard", file)[4:] == [
            ["start", *exact],
            ["start", *whole],
            ["end", *exact],
            ["end", *whole],
        ]
        os.close(fd)


#: A device that takes its time between get_page and the table, and does not ask what happened
#: meanwhile.
_NO_RETRY = """
import time

take = BoundFile.get_page


def get_page(file, pgoff):
    order = take(file, pgoff)
    time.sleep(0.002)
    return order


BoundFile.get_page, BoundFile.retry = get_page, lambda *_: False


"""
#: Devices without one of the rules: the replaced text of its program, and the replacement.
_SLIPS = {
    "none": ("", ""),
    "deaf": (
        "            self.unmap(start, end)\n\n    def invalidate_end",
        "\n    def invalidate_end",
    ),
    "no retry": ("class Window:", _NO_RETRY + "class Window:"),
}


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("slip", _SLIPS)
def test_a_storm_of_punches(slip: str, tmp_path: Path) -> None:
    """A device's pages are punched while it uses them.

    It maps no page that it does not hold, and reads no page that was punched. Without one of the
    rules, this test fails.
    """
    source = DMA.read_text(encoding="utf-8")
    old, new = _SLIPS[slip]
    assert old in source
    (tmp_path / "dma.py").write_text(source.replace(old, new, 1), encoding="utf-8")
    with serving(("dma", tmp_path / "dma.py")) as service, Device(service) as device:
        found = _storm(service, device, rounds=12 if slip == "none" else 2000)
    assert (found == "") is (slip == "none"), found


def _storm(service: Service, device: Device, rounds: int) -> str:
    """Return the rule that was broken first."""
    fd, still = service.memfd_restricted(), service.memfd_restricted()
    npages, random = 32, Random(1)
    window, marks = 0x100000, 0x400000
    device.attach(fd, window, 0, npages)
    device.attach(still, marks, 0, 256)
    told = 0
    for mark in range(1, rounds + 1):
        device.fill(marks + mark % 256 * PAGE, PAGE, mark % 256)
        filling = threading.Thread(target=device.fill, args=(window, npages * PAGE, mark % 256))
        filling.start()
        while filling.is_alive():
            punch(fd, random.randrange(npages))
            told += 1
        filling.join()
        status = device.status()
        if (
            not status["mapped"] == status["taken"] == resident(fd) + resident(still)
            or status["invalidations"] != told
        ):
            return (
                f"mapped {status}, resident {resident(fd)} and {resident(still)}, told {told} times"
            )
        for page in range(window, window + npages * PAGE, PAGE):
            # Mark 0 is no mark: a page of zeroes.
            if PAGE not in (
                device.equal(page, marks + mark % 256 * PAGE, PAGE),
                device.equal(page, marks, PAGE),
            ):
                return f"stale: page at {page:#x} in round {mark}"
    os.close(fd)
    os.close(still)
    return ""
