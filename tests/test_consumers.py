"""A third party's consumer: the library it is written with, docs/use/consumers.md's device, and what its mistakes cost others: nothing."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from errno import (
    EACCES,
    EAGAIN,
    EEXIST,
    EFAULT,
    EINVAL,
    EIO,
    EISDIR,
    ENOENT,
    ENOEXEC,
    ENOMEM,
    ENOTCONN,
    EPERM,
    EPROTO,
    ETOOMANYREFS,
)
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, cast, final

import dma
import pytest

import hugetlb
from outcomes import Errno, in_child, outcome
from processes import be_idle, family, go_on, high, process, stop, wait_gone
from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.consumer import Bound, BoundFile, Consumer, file_is_restrictedmem
from restrictedmem.fd import OwnedFd, close_all, readable, receive_with_fds, send_with_fds
from restrictedmem.mm.backing import MemfdBacking, make_backing
from restrictedmem.mm.design import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.patience import Patience
from restrictedmem.protocol import exits
from restrictedmem.service import consumer_process as service_consumer
from restrictedmem.service import program, wire
from restrictedmem.service.client import Service
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.options import Options
from restrictedmem.service.signing import Signer
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import MAX_FILE_BYTES, PageRange, pgoff_t
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from users import as_user
from waiting import wait_until

if TYPE_CHECKING:
    from restrictedmem.service.signing import Signer

ROOT = Path(__file__).parent.parent
DMA = ROOT / "clients" / "dma" / "dma.py"
PUPPET = Path(__file__).parent / "consumers" / "puppet.py"
DOCUMENT = (ROOT / "docs" / "use" / "consumers.md").read_text(encoding="utf-8")
DEADLINE = 1.0


@contextmanager
def serving(*programs: tuple[str, Path], **options: Any) -> Generator[Service, None, None]:
    named = tuple(
        (name, str(path)) for name, path in programs or (("dma", DMA), ("puppet", PUPPET))
    )
    backing = str(options.get("backing"))
    with ExitStack() as stack:
        if backing in hugetlb.SIZES:
            stack.enter_context(hugetlb.reserved(hugetlb.SIZES[backing], 4))
        yield stack.enter_context(
            Service.start(Options(consumers=named, deadline=DEADLINE, **options))
        )


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    yield found
    os.close(found)


def punch(fd: int, start: int, npages: int = 1) -> None:
    memory.fallocate(fd, memory.PUNCH, start * PAGE, npages * PAGE)


def resident(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512 // PAGE


@final
class Device:
    """The owner's side of a DMA device."""

    def __init__(self, service: Service, name: str = "dma") -> None:
        self.service = service
        self.channel = Channel(service.spawn(name), "the device")

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def attach(self, fd: int, address: int, start: int, end: int) -> None:
        self.channel.call(
            dma.ATTACH, dma.ATTACH_BODY.pack(self.service.token_for(fd), address, start, end)
        )

    def detach(self, address: int) -> None:
        self.channel.call(dma.DETACH, dma.DETACH_BODY.pack(address))

    def copy(self, source: int, destination: int, length: int) -> None:
        self.channel.call(dma.COPY, dma.COPY_BODY.pack(source, destination, length))

    def fill(self, address: int, length: int, byte: int) -> None:
        self.channel.call(dma.FILL, dma.FILL_BODY.pack(address, length, byte))

    def equal(self, one: int, other: int, length: int) -> int:
        reply, _ = self.channel.call(dma.COMPARE, dma.COMPARE_BODY.pack(one, other, length))
        found: int = dma.EQUAL.unpack(reply)[0]
        return found

    def status(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.channel.call(dma.STATUS)[0])
        return found


@final
class Puppet:
    """A consumer that does what it is told (consumers/puppet.py)."""

    def __init__(self, service: Service, arguments: str = "") -> None:
        self.service = service
        self.channel = Channel(service.spawn("puppet", arguments), "the puppet")

    def __enter__(self) -> "Puppet":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def __call__(self, name: str, *arguments: object) -> Any:
        return json.loads(
            self.channel.call(Call(name, 1), json.dumps([name, *arguments]).encode())[0]
        )

    def bind(self, fd: int, start: int, end: int, *, exclusive: bool = True) -> int:
        found: int = self("bind", self.service.token_for(fd).hex(), start, end, exclusive)
        return found


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
            f"dma {found['number']}: pid {known.pid}, descriptors {found['files'][0]}, 1 invalidations"
            in shown
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
#: What a device without one of the rules looks like: what is replaced in its program, and by what.
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
    """Punch pages that a device uses: it maps none that it has not, and what it reads was never punched. Without a rule this shows."""
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


# The interface.


@pytest.mark.requires("fuse")
def test_file_is_restrictedmem(service: Service, fd: int) -> None:
    assert file_is_restrictedmem(fd)
    with Service.start() as other:
        theirs = other.memfd_restricted()
        assert file_is_restrictedmem(theirs)
        os.close(theirs)
    pipe = os.pipe()
    with memory.memfd_create("plain") as plain, socket.socket() as sock:
        assert not any(
            file_is_restrictedmem(number) for number in (plain.fileno(), sock.fileno(), *pipe)
        )
    closed, last = pipe
    os.close(closed)
    os.close(last)
    assert outcome(lambda: file_is_restrictedmem(last)) == Errno(9)


@pytest.mark.requires("fuse")
def test_pages_are_taken_and_given_back(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        file = puppet.bind(fd, 4, 12)
        assert outcome(lambda: puppet("call", file, "get_page_noalloc", 4)) == Errno(ENOENT)
        assert resident(fd) == 0
        assert puppet("call", file, "get_page", 4) == 0
        puppet("write", file, 4, 7)
        # A service's consumer is undumpable: without root its own pagemap is closed to it
        # (docs/understand/folios.md).
        told = 0 if os.geteuid() == 0 else Errno(EACCES)
        assert outcome(lambda: puppet("call", file, "get_page_noalloc", 4)) == told
        assert (puppet("call", file, "page_count", 0, 100), resident(fd)) == (1, 1)
        puppet("call", file, "put_page", 4)
        assert (puppet("call", file, "page_count", 0, 100), resident(fd)) == (0, 1)
        assert (puppet("call", file, "get_page", 4), puppet("read", file, 4)) == (0, 7)
        for outside in (3, 12):
            assert outcome(lambda: puppet("call", file, "get_page", outside)) == Errno(EFAULT)  # noqa: B023


@pytest.mark.requires("fuse")
def test_what_was_taken_before_a_punch_has_to_be_taken_again(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        file = puppet.bind(fd, 0, 8)
        before = puppet("call", file, "snapshot")
        puppet("call", file, "get_page", 1)
        assert not puppet("call", file, "retry", before, 1)
        punch(fd, 1)
        assert puppet("call", file, "retry", before, 1)
        assert not puppet("call", file, "retry", puppet("call", file, "snapshot"), 1)
        assert puppet("call", file, "page_count", 0, 8) == 0
        assert puppet("heard", file) == [["start", 1, 2, None], ["end", 1, 2, None]]


def _heard_of_two_folios() -> object:
    with (
        serving(design="folio", backing="thp") as service,
        Puppet(service) as puppet,
        OwnedFd(service.memfd_restricted()) as fd,
    ):
        file = puppet.bind(fd.fileno(), 0, 1024)
        memory.fallocate(fd.fileno(), 0, 0, 1024 * PAGE)
        punch(fd.fileno(), 0, 513)
        return puppet("heard", file)


@pytest.mark.requires("fuse", "root")
def test_the_service_of_an_ordinary_user_tells_folios() -> None:
    assert as_user(_heard_of_two_folios) == [
        [what, *folio, 9] for what in ("start", "end") for folio in ((0, 512), (512, 513))
    ]


def test_a_page_taken_before_the_end_was_heard_stays_taken() -> None:
    """The sequence rises before invalidate_end comes; what is installed in between is in use, and must be accounted for."""
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    memfd, sequence = (
        OwnedFd(os.dup(number)) for number in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    span = PageRange(pgoff_t(0), pgoff_t(8))
    taken = Bound(1, 1, None, memfd, sequence, flags=0, order=0)
    bound = BoundFile(taken, span, Heard(), lambda: None)
    first, lock, told = span.start, sync.mutex(), list[object]()

    def invalidate_start(start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        BoundFile.invalidate_start(bound, start, end, order)
        told.append(outcome(lambda: bound.get_page(first)))

    def invalidate_end(start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        told.append(bound.fault(first, lock, lambda _: None))
        BoundFile.invalidate_end(bound, start, end, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound, "invalidate_start", invalidate_start)
        patch.setattr(bound, "invalidate_end", invalidate_end)
        file.register_notifier(bound)
        file.fallocate(memory.PUNCH, 0, PAGE)
    assert told == [Errno(EAGAIN), 0]
    assert bound.page_count(span.start, span.end) == 1
    file.unregister_notifier(bound)
    bound.close()
    file.put()


@pytest.fixture
def bound() -> Iterator[tuple[RestrictedFile, BoundFile]]:
    """A window of two folios and three pages more, from page 3 on, of a file that is in this process."""
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    memfd, sequence = (
        OwnedFd(os.dup(number)) for number in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    taken = Bound(1, 1, None, memfd, sequence, flags=0, order=0)
    made = BoundFile(taken, PageRange(pgoff_t(3), pgoff_t(1030)), Heard(), lambda: None)
    yield file, made
    made.close()
    file.put()


@pytest.mark.parametrize(
    ("punched", "first", "second"),
    [(511, True, False), (512, False, True), (1023, False, True), (1024, False, False)],
)
def test_a_folio_is_not_installed_while_any_of_its_pages_is_punched(
    bound: tuple[RestrictedFile, BoundFile], punched: int, first: bool, second: bool
) -> None:
    file, window = bound
    before = window.snapshot()
    file.sequence().begin(pgoff_t(punched), pgoff_t(punched + 1))
    assert [window.retry(before, pgoff_t(page), 9) for page in (5, 515)] == [first, second]
    # Without an order it is one page that was taken, and not the other of two.
    assert window.retry(before, pgoff_t(punched))
    assert not window.retry(before, pgoff_t(punched ^ 1))
    file.sequence().end()


def test_a_window_lies_where_its_blocks_can_be_mapped_as_one(
    bound: tuple[RestrictedFile, BoundFile],
) -> None:
    assert (bound[1]._mapping.address - 3 * PAGE) % memory.PMD_SIZE == 0


class Heard:
    """Ops that do nothing."""

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None: ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None: ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None: ...


@pytest.mark.requires("fuse")
def test_each_window_of_a_file_has_its_own_notifier(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        files = [
            puppet.bind(fd, 0, 8),
            puppet.bind(fd, 4, 12),
            puppet("register_notifier", service.token_for(fd).hex(), 0, 4),
        ]
        punch(fd, 100)
        assert [puppet("heard", file) for file in files] == [
            [["start", 100, 101, None], ["end", 100, 101, None]]
        ] * 3
        puppet("call", files[0], "close")
        punch(fd, 5)
        assert [len(puppet("heard", file)) for file in files] == [2, 4, 4]
        puppet("call", files[1], "get_page", 5)
        assert service.status()["descriptors"][0]["notifiers"] == 2


@pytest.mark.requires("fuse")
def test_bindings_are_exclusive_or_not() -> None:
    with serving(design="bindings") as service, Puppet(service) as puppet:
        fd = service.memfd_restricted()
        first, last = puppet.bind(fd, 0, 8), puppet.bind(fd, 8, 16)
        assert outcome(lambda: puppet.bind(fd, 7, 8)) == Errno(EINVAL)
        assert outcome(lambda: puppet.bind(fd, 15, 17)) == Errno(EINVAL)
        assert outcome(lambda: puppet.bind(fd, 16, 20, exclusive=False)) == Errno(EINVAL)
        assert outcome(lambda: puppet.bind(fd, 16, 16)) == Errno(EINVAL)
        assert outcome(
            lambda: puppet("register_notifier", service.token_for(fd).hex(), 16, 20)
        ) == Errno(EINVAL)
        punch(fd, 7)
        punch(fd, 7, 2)
        punch(fd, 100)
        assert [len(puppet("heard", file)) // 2 for file in (first, last)] == [2, 1]
        # A range is free again once it is unbound.
        puppet("call", last, "close")
        assert puppet("heard", puppet.bind(fd, 9, 20)) == []
        shared = service.memfd_restricted()
        both = [
            puppet.bind(shared, 0, 8, exclusive=False),
            puppet.bind(shared, 0, 8, exclusive=False),
        ]
        assert outcome(lambda: puppet.bind(shared, 20, 24)) == Errno(EINVAL)
        punch(shared, 0)
        assert [len(puppet("heard", file)) for file in both] == [2, 2]
        os.close(fd)
        os.close(shared)


@pytest.mark.requires("fuse")
def test_one_consumer_a_file(service: Service, fd: int) -> None:
    with Puppet(service) as first, Device(service) as device:
        file = first.bind(fd, 0, 8)
        first("call", file, "get_page", 0)
        first("write", file, 0, 9)
        assert outcome(lambda: device.attach(fd, 0, 0, 8)) == Errno(EINVAL)
        first("call", file, "close")
        assert resident(fd) == 1
        device.attach(fd, 0, 0, 8)
        assert device.equal(0, PAGE, PAGE) == PAGE
        assert outcome(lambda: first.bind(fd, 0, 8)) == Errno(EINVAL)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("arguments", ["", "careless"], ids=["unbinds", "just ends"])
@pytest.mark.parametrize("design", ["v10", "v10+teardown"])
def test_the_next_consumer_need_not_wait_for_the_last_ones_end(design: str, arguments: str) -> None:
    with serving(design=design) as service:
        fd = service.memfd_restricted()
        for _ in range(5):
            with Puppet(service, arguments) as puppet:
                for start in range(0, 64, 8):
                    puppet("call", puppet.bind(fd, start, start + 8), "get_page", start)
                assert resident(fd) == 8
        wait_until(lambda: not service.status()["consumers"], "the consumers' end")
        assert service.status()["last_error"] == ""
        os.close(fd)


def test_the_next_consumer_waits_so_long_for_the_last_ones_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumers = Consumers(Tokens(), Options(), Signer(), Troubles())
    file, waited = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0)), list[float]()

    def wait_for(_: Callable[[], bool], timeout: float) -> None:
        waited.append(timeout)

    monkeypatch.setattr(consumers._idle, "wait_for", wait_for)
    with closing(consumers.add("puppet")) as consumer:
        for sock in consumer.give_sockets():
            sock.close()
        consumers._let_end(consumer, file)
    # In parts: time in which the service did not run does not count.
    assert len(waited) == 4
    assert sum(waited) == pytest.approx(0.2)
    file.put()


# Memory errors.


@pytest.mark.requires("fuse")
def test_a_lost_page_is_refused_until_it_is_punched(service: Service, fd: int) -> None:
    with Puppet(service) as puppet, Device(service) as device:
        file = puppet.bind(fd, 0, 8)
        puppet("call", file, "get_page", 2)
        service.error_page(fd, 2, 4)
        assert puppet("heard", file) == [["error", 2, 4]]
        for lost in (2, 3):
            for name in ("get_page", "get_page_noalloc"):
                assert outcome(lambda: puppet("call", file, name, lost)) == Errno(EHWPOISON)  # noqa: B023
        assert puppet("call", file, "get_page", 4) == 0
        punch(fd, 2)
        assert puppet("call", file, "get_page", 2) == 0
        assert outcome(lambda: puppet("call", file, "get_page", 3)) == Errno(EHWPOISON)
        puppet("call", file, "close")
        # The device's fault path.
        device.attach(fd, 0, 0, 8)
        device.fill(0, 4 * PAGE, 1)
        service.error_page(fd, 1, 2)
        assert (device.status()["mapped"], device.status()["errors"]) == (3, 1)
        assert outcome(lambda: device.fill(0, 2 * PAGE, 2)) == Errno(EHWPOISON)
        punch(fd, 1)
        device.fill(0, 2 * PAGE, 2)


@pytest.mark.requires("fuse")
def test_who_may_say_that_a_page_is_lost(service: Service, fd: int) -> None:
    with Service.start() as other:
        assert outcome(lambda: other.error_page(fd, 0, 1)) == Errno(EACCES)
    for start, end in ((1, 1), (2, 1), (0, (1 << 18) + 1)):
        assert outcome(lambda: service.error_page(fd, start, end)) == Errno(EINVAL)  # noqa: B023
    forged = wire.ERROR_REQUEST.pack(bytes(16), 0, 1)
    assert outcome(lambda: service._call(wire.ERROR_PAGE, forged)) == Errno(EACCES)
    assert outcome(lambda: service._call(wire.ERROR_PAGE, forged[:-1])) == Errno(EPROTO)
    # Nobody is there to hear of it.
    service.error_page(fd, 0, 1 << 18)


# The engines.

ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]
GPA = 0x4000_0000
#: mov al, [0x40001000]; test al, al; jz 1f; ud2; 1: xor ecx, ecx; div ecx
READER = bytes.fromhex("8a04 25 00100040 84c0 7402 0f0b 31c9 f7f1").ljust(PAGE, b"\0")
#: How it ends: the byte was zero, or not.
ZERO, NOT_ZERO = exits.Shutdown(0), exits.Shutdown(6)


def slot(vm: Vm, fd: int, number: int, gpa: int, start: int, npages: int) -> None:
    vm.set_user_memory_region(
        slot=number,
        guest_phys_addr=gpa,
        memory_size=npages * PAGE,
        restricted_fd=fd,
        restricted_offset=start * PAGE,
    )
    vm.set_memory_attributes(gpa, npages * PAGE, private=True)


@pytest.mark.requires("fuse")
def test_a_guest_that_touches_a_lost_page_exits_until_it_is_punched(
    service: Service, fd: int
) -> None:
    with Vm(service, engine="software") as vm:
        slot(vm, fd, 0, GPA, 0, 8)
        vm.launch_update(GPA, READER + bytes([7]) * PAGE)
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=GPA)
            service.error_page(fd, 1, 2)
            lost = vcpu.run()
            assert isinstance(lost, exits.MemoryFault)
            assert (lost.gpa, lost.errno) == (GPA + PAGE, EHWPOISON)
            punch(fd, 1)
            assert vcpu.run() == ZERO


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("design", ["v10", "bindings", "bindings+teardown"])
def test_a_punch_reaches_every_slot_of_a_file(design: str, engine: str) -> None:
    with serving(design=design) as service, Vm(service, engine=engine) as vm:
        fd = service.memfd_restricted()
        for number in range(3):
            slot(vm, fd, number, GPA + number * 0x10_0000, 8 * number, 8)
            vm.launch_update(GPA + number * 0x10_0000, bytes([number + 1]) * PAGE * 2)
        before = freed(vm)
        for number in range(3):
            punch(fd, 8 * number)
            assert freed(vm) - before == number + 1
        # Two at once, and what no slot shows.
        punch(fd, 1, 9)
        punch(fd, 100)
        assert freed(vm) - before == 5
        assert service.status()["descriptors"][0]["notifiers"] == (
            1 if engine == "kernel" and design == "v10" else 3
        )
        os.close(fd)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("design", ["bindings", "bindings+teardown"])
def test_a_bound_range_is_one_slots(design: str, engine: str) -> None:
    with serving(design=design) as service, Vm(service, engine=engine) as vm:
        fd = service.memfd_restricted()
        slot(vm, fd, 0, GPA, 0, 8)
        assert outcome(lambda: slot(vm, fd, 1, GPA + 0x10_0000, 7, 1)) == Errno(EINVAL)
        vm.launch_update(GPA, READER + bytes([7]) * PAGE)
        # The slot may go and come back: it is not in its own way.
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        assert service.status()["descriptors"][0]["notifiers"] == 0
        slot(vm, fd, 0, GPA, 0, 8)
        vm.launch_update(GPA, READER)
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=GPA)
            # A guest_memfd keeps nothing that its owner could punch unheard.
            assert vcpu.run() == (NOT_ZERO if engine == "software" else ZERO)
        os.close(fd)


def freed(vm: Vm) -> int:
    found = vm.statistics()["pages_freed"]
    assert isinstance(found, int)
    return found


# Mistakes.


def _punch_while(fd: int, during: Callable[[], object]) -> float:
    """Punch page 0 while something else goes on; returns the seconds it took."""
    took: list[float] = []

    def body() -> None:
        began = time.monotonic()
        punch(fd, 0)
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=body)
    thread.start()
    during()
    thread.join()
    return took[0]


#: Nothing, when its end was noticed before its silence.
_GONE = r"(puppet 1: INVALIDATE_START: puppet 1 is gone)?"
_MISTAKES = {
    # manner: whether the deadline has to pass, what ps says
    "stop": (True, rf"puppet 1 did not answer INVALIDATE_START within {DEADLINE:g} s"),
    "die": (False, _GONE),
    "raise": (False, _GONE),
    "garbage": (False, r"puppet 1 answered INVALIDATE_START with a reply of another size"),
    "refuse": (False, r"puppet 1 answered INVALIDATE_START with EINVAL"),
    "refuse in numbers": (False, r"puppet 1 answered INVALIDATE_START with errno 2147483653"),
    "short": (False, r"puppet 1 answered INVALIDATE_START with what is no reply"),
    "empty": (False, r"puppet 1: INVALIDATE_START: puppet 1 is gone"),
}


@pytest.mark.requires("fuse")
@pytest.mark.alone("who answers may not be late by a second")
@pytest.mark.parametrize("manner", _MISTAKES)
def test_a_mistake_ends_a_consumer_and_nothing_else(service: Service, fd: int, manner: str) -> None:
    late, words = _MISTAKES[manner]
    puppet, other = Puppet(service), service.memfd_restricted()
    with Device(service) as device:
        device.attach(other, 0, 0, 8)
        device.fill(0, PAGE, 3)
        file = puppet.bind(fd, 0, 8)
        puppet("call", file, "get_page", 0)
        victim = next(found for found in family(service) if found.name == "rmem-puppet")
        puppet("manner", file, manner)
        took = _punch_while(fd, lambda: None)
        assert took >= DEADLINE if late else took < DEADLINE
        assert resident(fd) == 0
        wait_gone([victim])
        wait_until(
            lambda: [found["name"] for found in service.status()["consumers"]] == ["dma"],
            "the consumer's end",
        )
        assert re.fullmatch(words, service.status()["last_error"])
        assert outcome(lambda: puppet("pid")) == Errno(ENOTCONN)
        # Nobody else was harmed, and the file is the next one's.
        assert device.equal(0, 0, PAGE) == PAGE
        device.attach(fd, 0x100000, 0, 8)
        device.fill(0x100000, PAGE, 1)
        punch(fd, 0)
        assert device.status()["invalidations"] == 1
    puppet.channel.close()
    os.close(other)


@pytest.mark.alone("who answers may not be late by a second")
@pytest.mark.requires("fuse")
def test_a_late_answer_is_waited_for(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        file, pid = puppet.bind(fd, 0, 8), puppet("pid")
        puppet("manner", file, "stop")

        def let_go_on() -> None:
            wait_until(
                lambda: (found := process(pid)) is not None and found.state == "T",
                "the consumer to stop",
            )
            os.kill(pid, signal.SIGCONT)

        assert _punch_while(fd, let_go_on) < DEADLINE
        assert puppet("heard", file) == [["start", 0, 1, None], ["end", 0, 1, None]]
        assert service.status()["last_error"] == ""


#: The head of a reply: errno, and zero.
_FINE = bytes(8)
_START, _COUNT = wire.INVALIDATE_START, wire.PAGE_COUNT
_ANSWERS: dict[str, tuple[Call, bytes, bool, str]] = {
    # name: what is asked, of 8 pages; what is answered, and whether with a descriptor; what is said
    # of that
    "done": (_START, _FINE, False, ""),
    "a count": (_COUNT, _FINE + (3).to_bytes(8, "little"), False, ""),
    "a count of all": (_COUNT, _FINE + (8).to_bytes(8, "little"), False, ""),
    "the smallest errno": (_START, (1).to_bytes(8, "little"), False, "EPERM"),
    "no errno that there is": (
        _START,
        (0x7FFF_FFFF).to_bytes(8, "little"),
        False,
        "errno 2147483647",
    ),
    "an errno that is no int": (
        _START,
        (0x8000_0000).to_bytes(8, "little"),
        False,
        "errno 2147483648",
    ),
    "the largest errno": (_START, (0xFFFF_FFFF).to_bytes(8, "little"), False, "errno 4294967295"),
    "an errno and a text": (_START, (5).to_bytes(8, "little") + b"\x1b[2J", False, "EIO"),
    "an errno for a count": (
        _COUNT,
        (0xFFFF_FFFF).to_bytes(8, "little") + bytes(8),
        False,
        "errno 4294967295",
    ),
    "one byte": (_START, b"x", False, "what is no reply"),
    "half a head": (_COUNT, bytes(7), False, "what is no reply"),
    "a byte more": (_START, _FINE + b"x", False, "a reply of another size"),
    "100 KiB": (_START, bytes(100 << 10), False, "a reply of another size"),
    "no count": (_COUNT, _FINE, False, "a reply of another size"),
    "half a count": (_COUNT, _FINE + bytes(4), False, "a reply of another size"),
    "more than a count": (_COUNT, _FINE + bytes(9), False, "a reply of another size"),
    "a count of one more": (_COUNT, _FINE + (9).to_bytes(8, "little"), False, "9 of 8 pages"),
    "the largest count": (_COUNT, _FINE + b"\xff" * 8, False, f"{(1 << 64) - 1} of 8 pages"),
    "a descriptor": (_START, _FINE, True, "descriptors"),
    "a count and a descriptor": (_COUNT, _FINE + bytes(8), True, "descriptors"),
}


@pytest.mark.parametrize("name", _ANSWERS)
def test_a_malformed_answer_ends_who_gave_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a kernel that cannot refuse descriptors to the sender.
    def let_through(_: socket.socket) -> None:
        """Refuse nothing."""

    monkeypatch.setattr(service_consumer, "refuse_fds", let_through)
    call, answer, with_descriptor, wrong = _ANSWERS[name]
    failures: list[str] = []
    consumer = service_consumer.ConsumerProcess(
        "third", 7, 5.0, lambda consumer, reason: failures.append(reason)
    )
    binding = service_consumer.Binding(consumer, 1, 1, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    start, end = pgoff_t(0), pgoff_t(8)
    asking: dict[Call, Callable[[], object]] = {
        _START: lambda: binding.invalidate_start(start, end, None),
        _COUNT: lambda: binding.page_count(start, end),
    }
    requests, notify = consumer.give_sockets()

    def respond() -> None:
        assert notify.recv(100)
        send_with_fds(notify, answer, [notify.fileno()] if with_descriptor else [])

    before = len(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=respond)
    thread.start()
    expected = None if call is _START else 0 if wrong else int.from_bytes(answer[8:], "little")
    assert asking[call]() == expected
    thread.join()
    # What came with it was never this process's.
    assert len(os.listdir("/proc/self/fd")) == before
    assert failures == ([f"third 7 answered {call.name} with {wrong}"] if wrong else [])
    if wrong:
        # It is asked nothing any more, and hears that it has lost its connection.
        assert (binding.page_count(start, end), requests.recv(1)) == (0, b"")
    binding.invalidate_end(start, end, None)
    requests.close()
    notify.close()
    consumer.close()


@pytest.mark.requires("fuse")
def test_only_a_vm_has_reports_signed() -> None:
    launch = wire.LAUNCH.pack(2, b"kernel", bytes(48))
    with serving(("puppet", PUPPET)) as service, Puppet(service) as puppet:
        assert outcome(lambda: puppet("request", wire.LAUNCHED.number, launch.hex())) == Errno(
            EPERM
        )
        assert outcome(lambda: puppet("request", wire.SIGN.number, bytes(64).hex())) == Errno(EPERM)


def _bound_to_a_child() -> tuple[Consumers, service_consumer.ConsumerProcess, RestrictedFile, int]:
    """Make a consumer that has bound a file twice, and whose process is a child that does nothing."""
    consumers = Consumers(Tokens(), Options(), Signer(), Troubles())
    consumer = consumers.add("third")
    for sock in consumer.give_sockets():
        sock.close()
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    for ino in range(2):
        consumer.bind(ino, file, PageRange(pgoff_t(0), pgoff_t(0)), exclusive=False)
    child = os.fork()
    if child == 0:
        be_idle()
    return consumers, consumer, file, child


@pytest.mark.parametrize("end", ["killed", "hangs up"])
@pytest.mark.requires("fuse")
def test_what_a_consumer_forked_goes_with_it(end: str, service: Service, fd: int) -> None:
    with Device(service) as device:
        with Puppet(service) as puppet:
            puppet.bind(fd, 0, 8)
            left, pid = process(puppet("leave")), puppet("pid")
            assert left is not None
            # As long as the consumer is there, it is the consumer's own affair.
            wait_until(
                lambda: (found := process(left.pid)) is not None and found.parent == pid,
                "the consumer to be its parent",
            )
            assert puppet("pid") == pid
            if end == "killed":
                os.kill(pid, signal.SIGKILL)
        device.attach(fd, 0, 0, 8)
        wait_gone([left])
        assert [found["name"] for found in service.status()["consumers"]] == ["dma"]


@pytest.mark.requires("fuse")
def test_what_a_consumer_forked_goes_with_the_service() -> None:
    with serving() as service, Puppet(service) as puppet:
        everybody, left = family(service), process(puppet("leave"))
        assert left is not None
        os.kill(service.info["pid"], signal.SIGKILL)
        wait_gone([*everybody, left])


def test_a_consumers_end_is_its_process_end() -> None:
    """What it forked may keep its sockets, and answers nobody: neither its file nor a punch under way waits for that."""
    consumers = Consumers(Tokens(), Options(deadline=3600), Signer(), Troubles())
    consumer = consumers.add("third")
    requests, notify = consumer.give_sockets()
    child = os.fork()
    if child == 0:
        be_idle()
    consumer.process = OwnedFd(os.pidfd_open(child))
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    consumer.bind(1, file, PageRange(pgoff_t(0), pgoff_t(0)), exclusive=False)
    serving = threading.Thread(target=consumers.serve, args=(consumer,))
    punching = threading.Thread(target=file.fallocate, args=(memory.PUNCH, 0, PAGE))
    for thread in (serving, punching):
        thread.start()
    with requests, notify:
        assert notify.recv(100)
        os.kill(child, signal.SIGKILL)
        for thread in (serving, punching):
            thread.join(10)
            assert not thread.is_alive()
    assert (file.notifier_count, consumers.all(), consumers._troubles.last) == (0, [], "")
    os.waitpid(child, 0)
    file.put()


def test_a_consumer_whose_pidfd_has_a_high_number_is_forgotten() -> None:
    consumers, consumer, file, child = _bound_to_a_child()
    with OwnedFd(os.pidfd_open(child)) as pidfd, high(pidfd.fileno()) as copy:
        consumer.process = OwnedFd(copy.detach())
        consumers.end(consumer)
        # Its end was waited for.
        assert readable([pidfd], 0)
    assert (file.notifier_count, consumers.all()) == (0, [])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    file.put()


def test_a_consumer_that_cannot_be_waited_for_is_forgotten_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(EINVAL, "poll")

    def fail_at_first(*_: object) -> None:
        if file.notifier_count > 1:
            fail()

    consumers, consumer, file, child = _bound_to_a_child()
    consumer.process = OwnedFd(os.pidfd_open(child))
    monkeypatch.setattr(Patience, "wait", fail)
    monkeypatch.setattr(type(file.design), "leave", fail_at_first)
    consumers.end(consumer)
    assert (file.notifier_count, consumers.all(), consumer.process.closed) == (0, [], True)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    file.put()


@pytest.mark.parametrize(
    ("failure", "errno"),
    [
        (OSError(ETOOMANYREFS, "sendmsg"), ETOOMANYREFS),
        (MemoryError(), ENOMEM),
        (ValueError("a bug"), EIO),
    ],
    ids=repr,
)
def test_a_binding_that_its_consumer_is_not_told_of_goes(
    failure: Exception, errno: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer hears of it first: a punch may be waiting for its answer, which it gives once it knows."""
    tokens = Tokens()
    consumers = Consumers(tokens, Options(), Signer(), Troubles())
    consumer = consumers.add("third")
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    token = tokens.issue([])
    tokens.prove(token, 1, file)
    reply = Channel.reply

    def fail(channel: Channel, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        if channel is not consumer.requests:
            reply(channel, body, fds)
            return
        assert (file.notifier_count, len(fds)) == (1, 2)
        # A punch begins.
        file._notifiers_sem.down_read()
        raise failure

    monkeypatch.setattr(Channel, "reply", fail)
    requests, notify = consumer.give_sockets()
    serving = threading.Thread(target=consumers.serve, args=[consumer], daemon=True)
    with requests, notify:
        requests.settimeout(10)
        requests.send(
            struct.pack("=II", wire.BIND.number, 0) + wire.BIND_REQUEST.pack(token, 0, 0, 0)
        )
        serving.start()
        assert requests.recv(1000)[0] == errno
        file._notifiers_sem.up_read()
        wait_until(lambda: not (file.notifier_count or consumer.bindings), "the binding to go")
    serving.join()
    assert file._references == 1
    file.put()


def test_a_bind_that_fails_holds_nothing() -> None:
    consumer = service_consumer.ConsumerProcess("third", 7, 5.0, lambda _, reason: None)
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    file.register_notifier(service_consumer.Binding(consumer, 99, 1, file))
    file.holder = 8
    assert outcome(
        lambda: consumer.bind(1, file, PageRange(pgoff_t(0), pgoff_t(0)), exclusive=False)
    ) == Errno(EINVAL)
    assert (consumer.bindings, file._references) == ({}, 1)
    for sock in consumer.give_sockets():
        sock.close()
    consumer.close()
    file.put()


def test_a_consumer_answers_for_a_binding_that_it_was_not_told_of() -> None:
    """The service has made it, and its descriptors could not be sent; meanwhile a punch came."""

    requests, theirs = Channel.pair("consumer")
    notify, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def refuse(_: Bound) -> BoundFile:
        raise AssertionError("bound all the same")

    def body() -> object:
        consumer = Consumer(theirs, answers)
        came: list[object] = []
        asking = threading.Thread(
            target=lambda: came.append(
                outcome(lambda: consumer.register_notifier(bytes(16), refuse))
            )
        )
        asking.start()
        message = requests.receive()
        assert message is not None
        assert message.number == wire.BIND.number
        invalidation = wire.INVALIDATION.pack(1, 0, 1, wire.NO_FOLIO)
        notify.send(struct.pack("=II", wire.INVALIDATE_START.number, 0) + invalidation)
        frames = sys._current_frames  # pyright: ignore[reportPrivateUsage]
        wait_until(
            lambda: any(f.f_code.co_name == "wait" for f in frames().values()),
            "the consumer to wait for its BIND",
        )
        requests.reply_error(OSError(ETOOMANYREFS, "sendmsg"))
        asking.join()
        answer = readable([notify], 10) and notify.recv(100)
        notify.send(struct.pack("=II", wire.PAGE_COUNT.number, 0) + invalidation)
        return came, answer, readable([notify], 10) and notify.recv(100)

    with closing(requests), theirs, notify, answers:
        assert in_child(body) == repr(([Errno(ETOOMANYREFS)], bytes(8), bytes(16)))


@pytest.mark.parametrize("said", [b"", b"?"])
def test_a_consumer_that_hears_nothing_more_ends_its_process(said: bytes) -> None:
    """Nobody tells it any more which of its pages are freed.

    Its parent kills it, too, when the service is gone, and may be late.
    """

    def body() -> str:
        service, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        notify, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        Consumer(requests, answers)
        if said:
            notify.send(said)
        else:
            notify.close()
        frames = sys._current_frames  # pyright: ignore[reportPrivateUsage]
        with suppress(AssertionError):
            wait_until(lambda: len(frames()) == 1, "the thread that listens to end")
        service.close()
        return "goes on"

    assert in_child(body) == ""


def test_a_request_that_memory_was_short_for_ends_its_consumer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    consumers = Consumers(Tokens(), Options(), Signer(), Troubles())
    consumer = consumers.add("third")
    requests, notify = consumer.give_sockets()
    with requests, notify:
        requests.settimeout(10)
        monkeypatch.setattr(Channel, "receive", no_memory)
        consumers.serve(consumer)
        assert (requests.recv(1000)[0], requests.recv(1)) == (ENOMEM, b"")
    assert consumers.all() == []


_DEEP = b'{"a":' * 100 + b"1" + b"}" * 100
_REPORTS = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"a": "\xff"}',
    "a list": b"[1]",
    "a number": b"1",
    "nested": _DEEP,
    "nested without end": b"[" * 50_000,
    "nested in lists": b'{"a":' + b"[" * 9 + b"]" * 9 + b"}",
    "no number": b'{"a": NaN}',
    "a number too large": b'{"a": 1e999}',
    "a number of 50,000 digits": b'{"a": ' + b"1" * 50_000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "words for a terminal": b'{"a": "\\u001b[2J"}',
    "words for a terminal in a key": b'{"\\u001b[2J": 1}',
}


@pytest.mark.requires("fuse")
def test_a_malformed_report_is_refused_and_no_one_else_sees_it(service: Service) -> None:
    with Puppet(service) as puppet:
        good: dict[str, object] = {"pid": 1, "text": "a text", "list": [[1.5, None]]}
        puppet("request", wire.REPORT.number, json.dumps(good).encode().hex())
        for name, body in _REPORTS.items():
            assert outcome(partial(puppet, "request", wire.REPORT.number, body.hex())) == Errno(
                EPROTO
            ), name
            status = service.status()
            assert (status["consumers"][0]["report"], status["last_error"]) == (good, ""), name


@pytest.mark.parametrize("engine", [b"\xc3\xa9", b"\xff" * 16, b"soft\0ware", b"\x1b[2J", b"\n"])
def test_an_engine_has_a_name_in_printable_ascii(engine: bytes) -> None:
    consumer = service_consumer.ConsumerProcess("kvm", 1, 1.0, lambda _, reason: None)
    assert outcome(lambda: consumer.launched(0, engine.ljust(16, b"\0"), bytes(48))) == Errno(
        EPROTO
    )
    consumer.launched(0, b"software".ljust(16, b"\0"), bytes(48))
    assert consumer.report_over(bytes(64), "v10", bytes(32)).engine == "software"
    for sock in consumer.give_sockets():
        sock.close()
    consumer.close()


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("design", ["v10", "bindings"])
def test_a_binding_of_no_range_is_refused(design: str) -> None:
    with serving(design=design) as service, Puppet(service) as puppet:
        fd = service.memfd_restricted()
        os.posix_fallocate(fd, 0, PAGE)
        last = MAX_FILE_BYTES // PAGE
        for start, end in (
            (5, 3),
            (0, last + 1),
            (last, last + 1),
            (1 << 63, (1 << 63) + 1),
            (0, (1 << 64) - 1),
            ((1 << 64) - 1, 0),
        ):
            body = wire.BIND_REQUEST.pack(service.token_for(fd), start, end, 0)
            assert outcome(partial(puppet, "request", wire.BIND.number, body.hex())) == Errno(
                EINVAL
            ), (start, end)
            assert outcome(lambda: puppet("request", wire.BIND.number, "00")) == Errno(EPROTO)
            assert service.status()["descriptors"][0]["notifiers"] == 0
        assert (resident(fd), service.status()["last_error"]) == (1, "")
        assert puppet.bind(fd, last - 1, last) == 0
        os.close(fd)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("design", ["v10", "bindings"])
def test_a_file_is_bound_again_by_a_binding_of_ones_own(design: str) -> None:
    with serving(design=design) as service, Puppet(service) as puppet, Puppet(service) as other:
        fd = service.memfd_restricted()
        os.posix_fallocate(fd, 0, 16 * PAGE)

        def again(who: Puppet, number: int, start: int = 8, end: int = 16) -> object:
            body = wire.BIND_REQUEST.pack(
                wire.NUMBER.pack(number), start, end, wire.BindFlag.AGAIN | wire.BindFlag.EXCLUSIVE
            )
            return outcome(partial(who, "request", wire.BIND.number, body.hex()))

        def unbind(number: int) -> object:
            return outcome(
                partial(puppet, "request", wire.UNBIND.number, wire.NUMBER.pack(number).hex())
            )

        def notifiers() -> int:
            return int(service.status()["descriptors"][0]["notifiers"])

        assert again(puppet, 1) == Errno(ENOENT)
        assert puppet.bind(fd, 0, 8) == 0
        assert again(other, 1) == again(puppet, 2) == Errno(ENOENT)
        assert notifiers() == 1
        found = again(puppet, 1)
        assert isinstance(found, str)
        assert wire.BINDING.unpack(bytes.fromhex(found))[:2] == (2, os.fstat(fd).st_ino)
        assert notifiers() == 2
        if design == "bindings":
            assert (
                again(puppet, 2, 15, 17)
                == again(puppet, 1, 0, 1)
                == again(puppet, 1, 5, 3)
                == Errno(EINVAL)
            )
        assert unbind(2) == ""
        assert unbind(2) == again(puppet, 2) == Errno(ENOENT)
        assert notifiers() == 1
        assert puppet("call", 0, "get_page", 0) == 0
        puppet("call", 0, "close")
        assert again(puppet, 1) == Errno(ENOENT)
        assert (resident(fd), notifiers(), service.status()["last_error"]) == (16, 0, "")
        os.close(fd)
        wait_until(lambda: service.status()["descriptors"] == [], "the file's end")


@pytest.mark.parametrize(
    ("options", "flags"), [(Options(), 0), (Options(pin=True), 2), (Options(design="bindings"), 4)]
)
@pytest.mark.parametrize(("kind", "hugepage"), [("memfd", 0), ("thp", 1)])
def test_what_a_binding_says_of_its_file_and_brings_once(
    options: Options, flags: int, kind: str, hugepage: int
) -> None:
    tokens = Tokens()
    consumers = Consumers(tokens, options, cast("Signer", None), Troubles())
    consumer = consumers.add("kvm")
    file = RestrictedFile(make(options.design or options.api), make_backing(kind), Inode.make(0, 0))
    token = tokens.issue([])
    tokens.prove(token, 7, file)
    requests, notify = consumer.give_sockets()
    with requests, notify:
        for number, (proof, flag, descriptors) in enumerate(
            ((token, 1, 2), (wire.NUMBER.pack(1), 3, 0), (wire.NUMBER.pack(2), 3, 0)), 1
        ):
            body = wire.BIND_REQUEST.pack(proof, 8 * number, 8 * number + 8, flag)
            consumers._dispatch(consumer, wire.Message(wire.BIND.number, body, []))
            reply, fds = receive_with_fds(requests, 100)
            assert wire.BINDING.unpack(reply[8:]) == (number, 7, 0, flags | hugepage, 0)
            assert len(fds) == descriptors
            close_all(fds)
    consumers.end(consumer)
    file.put()


# Time in which nobody ran.


@pytest.mark.alone("who answers may not be late by a second")
@pytest.mark.requires("fuse")
def test_time_in_which_the_service_did_not_run_is_no_consumers_fault(
    service: Service, fd: int
) -> None:
    with Puppet(service) as puppet:
        file, pid, service_pid = puppet.bind(fd, 0, 8), puppet("pid"), service.info["pid"]
        puppet("manner", file, "stop")

        def freeze_and_thaw() -> None:
            wait_until(
                lambda: (found := process(pid)) is not None and found.state == "T",
                "the consumer to stop",
            )
            stop(service_pid)
            thaw = time.monotonic() + 2 * DEADLINE
            wait_until(lambda: time.monotonic() > thaw, "twice the deadline to pass")
            # The service is thawed first, and looks at the clock.
            go_on(service_pid)
            os.kill(pid, signal.SIGCONT)

        assert _punch_while(fd, freeze_and_thaw) > 2 * DEADLINE
        assert puppet("heard", file) == [["start", 0, 1, None], ["end", 0, 1, None]]
        assert service.status()["last_error"] == ""


# Programs.


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    ("source", "errno", "words"),
    [
        (None, ENOENT, "No such file"),
        ("x = 1\n", ENOEXEC, "has no function serve"),
        ("serve = 1\n", ENOEXEC, "has no function serve"),
        ("def serve(:\n", ENOEXEC, "SyntaxError"),
        (
            "import no_such_module\n",
            ENOEXEC,
            "ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("raise SystemExit(3)\n", ENOEXEC, "SystemExit: 3"),
        ("\0", ENOEXEC, "null bytes"),
    ],
    ids=["missing", "no serve", "serve is a number", "no Python", "import", "exit", "binary"],
)
def test_a_program_that_will_not_do(
    source: str | None, errno: int, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "program.py"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    with pytest.raises(OSError) as caught:
        program.load("third", str(path))
    assert caught.value.errno == errno
    with serving(("third", path)) as service:
        with pytest.raises(OSError, match=words) as caught:
            service.spawn("third")
        assert caught.value.errno == errno
        assert str(path) in str(caught.value)
        wait_until(lambda: not service.status()["consumers"], "its end")
        assert service.status()["last_error"] == ""
    said = serve_fails(tmp_path, "--consumer", f"third={path}")
    assert str(path) in said
    assert "Traceback" not in said


def test_a_directory_is_no_program(tmp_path: Path) -> None:
    assert outcome(lambda: program.load("third", str(tmp_path))) == Errno(EISDIR)


def test_no_bytecode_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("def serve(): pass\n", encoding="utf-8")
    program.load("third", str(path))
    assert [found.name for found in tmp_path.iterdir()] == ["program.py"]


@pytest.mark.parametrize("name", ["kvm", "", "Dma", "a b", "9p", "-x", "a=b", "elevenchars"])
def test_names(name: str) -> None:
    assert outcome(Options(consumers=((name, "/x"),)).check) == Errno(EINVAL)


def test_a_name_is_one_programs() -> None:
    assert outcome(Options(consumers=(("a", "/x"), ("a", "/y"))).check) == Errno(EINVAL)
    Options(consumers=(("a", "/x"), ("b-2", "/x"))).check()


@pytest.mark.requires("fuse")
def test_options_are_checked_before_a_service_starts() -> None:
    for options in (Options(consumers=(("kvm", "/x"),)), Options(design="v11")):
        with pytest.raises(OSError) as caught:
            Service.start(options)
        assert caught.value.errno == EINVAL


@pytest.mark.requires("fuse")
def test_only_who_starts_the_service_names_programs(service: Service) -> None:
    for name in (str(DMA), f"x={DMA}", "qemu"):
        assert outcome(lambda: service.spawn(name)) == Errno(EINVAL)  # noqa: B023


# serve.


def serve_fails(place: Path, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "serve",
        "--socket",
        str(place / "socket"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode in (1, 2), done
    assert not (place / "socket").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--consumer", "dma"], "write NAME=PATH"),
        (["--consumer", f"kvm={DMA}"], "consumer 'kvm': Invalid argument (taken"),
        (["--design", "v11"], "no design 'v11'"),
        (["--backing", "disk"], "invalid choice: 'disk'"),
    ],
)
def test_serve_says_early_what_will_not_do(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    assert words in serve_fails(tmp_path, *arguments)


@pytest.mark.requires("fuse", "root")
def test_serve_has_a_program_that_its_user_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "dma.py").write_bytes(DMA.read_bytes())
    os.chmod(tmp_path, 0o700)
    place = f"/tmp/restrictedmem-{os.getpid()}"
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "serve",
        "--socket",
        place,
        "--user",
        "nobody",
    ]
    command += [
        "--consumer",
        f"dma={tmp_path / 'dma.py'}",
        "--design",
        "v10+teardown",
        "--backing",
        "memfd",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert server.stderr.readline() == f"listening on {place}\n"
            with Service.connect(place) as service, Device(service) as device:
                fd = service.memfd_restricted()
                device.attach(fd, 0, 0, 8)
                device.fill(0, PAGE, 1)
                found = next(found for found in family(service) if found.name == "rmem-dma")
                assert re.search(
                    r"^Uid:\s+65534",
                    Path(f"/proc/{found.pid}/status").read_text(encoding="utf-8"),
                    re.MULTILINE,
                )
                device.detach(0)
                assert device.status()["invalidations"] == 1
                os.close(fd)
        finally:
            server.terminate()


# The wire's document.


def test_every_option_of_a_service_is_in_the_wires_document() -> None:
    text = (ROOT / "docs" / "reference" / "wire-protocol.md").read_text(encoding="utf-8")
    table = text[text.index("OPTIONS is a JSON") : text.index("The process that was started")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(
        Options.__dataclass_fields__
    )


def test_a_notifier_that_cannot_be_made_is_unbound_and_its_error_told() -> None:
    unbound: list[bytes] = []

    def call(_: object, body: bytes) -> None:
        unbound.append(body)

    def fail() -> NoReturn:
        raise MemoryError

    made = Consumer.__new__(Consumer)
    made._known, made._notifiers = sync.condition(sync.mutex()), {}
    made.requests = cast(wire.Channel, SimpleNamespace(call=call))
    with pytest.raises(MemoryError):
        made._register(5, fail)
    assert (unbound, made._notifiers) == ([wire.NUMBER.pack(5)], {})
