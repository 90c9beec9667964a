"""Mounting by fusermount3, with another program in its place.

The tests also read the messages of a child that mounts.
"""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from errno import EIO, ENOENT, EPERM
from pathlib import Path
from typing import Final

import pytest

from outcomes import in_child
from planting import always
from restrictedmem.abi import mount
from restrictedmem.fd import OwnedFd, send_with_fds
from restrictedmem.fs import mount_ways, mounter
from restrictedmem.fs.mount_ways import mount_fusermount

#: Sends /dev/null for /dev/fuse; to unmount it does nothing.
SENDS: Final = """
import os, socket, sys
if sys.argv[1] != "-u":
    fd = os.open(os.devnull, os.O_RDWR)
    with socket.socket(fileno=int(os.environ["_FUSE_COMMFD"])) as sock:
        socket.send_fds(sock, [b"\\0\\0\\0\\0"], [fd])
"""
SENDS_NONE: Final = """
import os, sys
if sys.argv[1] != "-u":
    os.write(int(os.environ["_FUSE_COMMFD"]), b"\\0\\0\\0\\0")
"""
REFUSES: Final = """
import sys
sys.exit(sys.argv[1] != "-u")
"""


@pytest.fixture
def helped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a program in the helper's place; returns where mount points are made."""

    def put(program: str) -> Path:
        helper = tmp_path / "fusermount3"
        helper.write_text(f"#!{sys.executable} -IS\n{program}")
        helper.chmod(0o755)
        points = tmp_path / "points"
        points.mkdir()
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(points))
        monkeypatch.setattr(shutil, "which", always(str(helper)))
        return points

    return put


def test_the_descriptor_that_was_sent_and_the_mount_point_come_back(
    helped: Callable[[str], Path],
) -> None:
    points = helped(SENDS)
    device, root = mount_fusermount()
    with device, root:
        assert os.readlink(f"/proc/self/fd/{device.fileno()}") == os.devnull
        assert Path(os.readlink(f"/proc/self/fd/{root.fileno()}")).parent == points
    assert list(points.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "number", "words"),
    [
        (SENDS_NONE, EIO, "fusermount3: sent no descriptor"),
        (REFUSES, EPERM, "fusermount3: refused"),
    ],
)
def test_a_helper_that_sends_nothing_is_an_error(
    program: str, number: int, words: str, helped: Callable[[str], Path]
) -> None:
    points = helped(program)
    with pytest.raises(OSError, match=words) as caught:
        mount_fusermount()
    assert caught.value.errno == number
    assert list(points.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "sent", "number", "words"),
    [
        (b"1 not permitted", 0, EPERM, "not permitted"),
        (b"2 ", 2, ENOENT, "mount: the process that makes it died"),
        (b"0 ", 1, EIO, "mount: the process that makes it died"),
        (b"", 0, EIO, "mount: the process that makes it died"),
        (b"no number", 1, EIO, "number"),
    ],
)
def test_what_comes_with_an_error_is_closed(
    said: bytes, sent: int, number: int, words: str
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            if said:
                send_with_fds(theirs, said, [theirs.fileno()] * sent)
        before = os.listdir("/proc/self/fd")
        # While the error is kept, its frames hold what was received.
        with pytest.raises(OSError, match=words) as caught:
            mounter._hear(ours, "mount", 2)
        assert os.listdir("/proc/self/fd") == before
    assert (caught.value.errno, caught.value.strerror) == (number, words)


def test_a_mount_point_goes_though_the_helper_cannot_unmount(
    helped: Callable[[str], Path], tmp_path: Path
) -> None:
    points = helped("import sys\nsys.exit(1)\n")
    point = points / "point"
    point.mkdir()
    reader, writer = os.pipe()
    os.close(writer)
    in_child(lambda: mount_ways._clean_up(str(tmp_path / "fusermount3"), str(point), reader))
    os.close(reader)
    assert not point.exists()


def test_a_mount_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its type is fuse.restrictedmem, as in /proc/self/mountinfo."""
    asked: dict[str, str | None] = {}

    def fsconfig(_: OwnedFd, key: str, value: str | None = None) -> None:
        asked[key] = value

    def opened(*_: object) -> OwnedFd:
        return OwnedFd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))

    monkeypatch.setattr(mount_ways, "DEVICE", os.devnull)
    for name, does in {
        "fsopen": opened,
        "fsconfig": fsconfig,
        "fsconfig_create": always(None),
        "fsmount": opened,
    }.items():
        monkeypatch.setattr(mount, name, does)
    device, root = mount_ways.mount_detached(allow_other=True)
    with device, root:
        assert asked == {
            "source": "restrictedmem",
            "subtype": "restrictedmem",
            "fd": str(device.fileno()),
            "rootmode": "40000",
            "user_id": str(os.getuid()),
            "group_id": str(os.getgid()),
            "allow_other": None,
        }
