"""The programs of third parties' consumers.

The tests try which a service takes, by which names, and how `serve` starts them.
"""

import os
import re
import subprocess
import sys
from errno import EINVAL, EISDIR, ENOENT, ENOEXEC
from pathlib import Path

import pytest

from outcomes import Errno, outcome
from processes import family
from restrictedmem.service import program
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SIZE as PAGE
from third_parties import DMA, ROOT, Device, service, serving
from waiting import wait_until

__all__ = ["service"]


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
        (["--consumer", f"kvm={DMA}"], "consumer 'kvm': Invalid argument (the name is taken"),
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
