"""The file system without a mount.

The tests try how long nodes and references live, and requests that are short or malformed.
"""

import os
import socket
from errno import EINVAL, EIO, ENODEV, ENOENT, ENOSYS, EOPNOTSUPP
from functools import partial

import pytest

from fuse_requests import MISSING, TOKEN, Mount, ioctl_in, mount
from outcomes import Errno, outcome
from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import Opcode
from restrictedmem.fd import OwnedFd
from restrictedmem.fs import filesystem
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.fuse_server import FuseServer
from restrictedmem.fs.owner_abi import NAME, PROVE, TOKEN_BYTES
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_SIZE

__all__ = ["mount"]


# Lifetimes.


def _memfds() -> int:
    """Count this process's open descriptors."""
    # The first read of a block size makes the memfd that backings share.
    assert MemfdBacking().blksize
    return len(os.listdir("/proc/self/fd"))


def test_release_frees_the_pages_and_forget_the_node(mount: Mount) -> None:
    before = _memfds()
    node = mount.create()
    assert _memfds() == before, "no memfd before the first page"
    mount.fallocate(node, 0, 0, PAGE_SIZE)
    assert _memfds() == before + 1
    mount.ask(Opcode.RELEASE, node, bytes(24))
    assert _memfds() == before
    assert mount.filesystem.files() == {}
    # An O_PATH descriptor may still look: the size stays, nothing is held.
    assert (mount.getattr(node)["size"], mount.getattr(node)["blocks"]) == (PAGE_SIZE, 0)
    assert outcome(lambda: mount.ask(Opcode.RELEASE, node, bytes(24))) == Errno(ENOENT)
    mount.ask(Opcode.FORGET, node, bytes(8))
    assert outcome(lambda: mount.getattr(node)) == Errno(ENOENT)


def test_a_reference_outlives_release(mount: Mount) -> None:
    before = _memfds()
    node = mount.create()
    file = mount.file(node)
    mount.fallocate(node, 0, 0, PAGE_SIZE)
    file.get()
    mount.ask(Opcode.RELEASE, node, bytes(24))
    mount.ask(Opcode.FORGET, node, bytes(8))
    assert file.backing.resident() == PAGE_SIZE
    file.put()
    assert _memfds() == before


@pytest.fixture
def every_request_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_HUGE_REQUEST", 0)


@pytest.mark.usefixtures("every_request_huge")
def test_a_forget_while_a_release_waits_lets_go_once(mount: Mount) -> None:
    """Linux forgets a node after the answer to its release.

    From a kernel that does not, the pages are safe that a consumer still holds.
    """
    node = mount.create()
    file = mount.file(node)
    mount.fallocate(node, 0, 0, PAGE_SIZE)
    file.get()

    def forget(_: int | None) -> bool:
        mount.ask(Opcode.FORGET, node, bytes(8))
        return True

    mount.filesystem.before_waiting = forget
    assert outcome(lambda: mount.ask(Opcode.RELEASE, node, bytes(24))) == Errno(ENOENT)
    assert file.backing.resident() == PAGE_SIZE
    file.put()


def test_forget_of_a_file_that_was_never_opened_frees_it(mount: Mount) -> None:
    before = _memfds()
    node = mount.create()
    mount.fallocate(node, 0, 0, PAGE_SIZE)
    mount.ask(Opcode.FORGET, node, bytes(8))
    assert _memfds() == before
    assert mount.filesystem.files() == {}


def test_batch_forget(mount: Mount) -> None:
    nodes = [mount.create() for _ in range(4)]
    assert mount.batch_forget(nodes[0], MISSING, nodes[2]) is None
    assert sorted(mount.filesystem.files()) == [nodes[1], nodes[3]]


def test_batch_forget_believes_its_count_and_no_more(mount: Mount) -> None:
    node, other = mount.create(), mount.create()
    body = (
        bytes(fuse.fuse_batch_forget_in(count=1, dummy=0))
        + fuse.FORGET_ONE.pack(node, 1)
        + fuse.FORGET_ONE.pack(other, 1)
    )
    mount.ask(Opcode.BATCH_FORGET, 0, body)
    assert list(mount.filesystem.files()) == [other]


# Malformed requests.


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        (Opcode.SETATTR, 88),
        (Opcode.CREATE, 16),
        (Opcode.FALLOCATE, 32),
        (Opcode.IOCTL, 32),
        (Opcode.BATCH_FORGET, 8),
    ],
)
def test_short_requests_are_einval(mount: Mount, opcode: int, size: int) -> None:
    node = mount.create()
    nodeid = fuse.ROOT_ID if opcode == Opcode.CREATE else node
    for length in range(size):
        request = Request(opcode, 1, nodeid, 1000, 1000, 0, bytes(length))
        assert outcome(partial(mount.filesystem.handle, request)) == Errno(EINVAL), length
    assert list(mount.filesystem.files()) == [node]


def test_the_server_survives_whatever_it_reads(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket stands for /dev/fuse.

    Every request has one reply, and the last is answered as the first.
    """

    failures = {
        number: OSError(number, "an errno")
        for number in (ENOSYS, 0, 511, 512, 1 << 31, (1 << 32) - 1, -5)
    }

    def broken(token: bytes, _ino: int, _file: RestrictedFile) -> None:
        raise failures.get(int.from_bytes(token, "little", signed=True), RuntimeError("a bug"))

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    filesystem = FileSystem("v10", max_files=10, prove=broken)
    root, first = fuse.ROOT_ID, fuse.ROOT_ID + 1
    requests = [
        (
            Opcode.CREATE,
            root,
            bytes(fuse.fuse_create_in(flags=os.O_RDWR, mode=0o100600, umask=0, open_flags=0))
            + NAME
            + b"\0",
            0,
        ),
        (Opcode.SETATTR, first, b"", EINVAL),
        (Opcode.FALLOCATE, first, b"short", EINVAL),
        (Opcode.CREATE, root, b"", EINVAL),
        (Opcode.INIT, root, b"", EINVAL),
        (Opcode.IOCTL, first, ioctl_in(PROVE, TOKEN_BYTES) + TOKEN, EIO),
        # The kernel never asks again for what was ENOSYS once, and does not take what is no errno.
        *(
            (
                Opcode.IOCTL,
                first,
                ioctl_in(PROVE, TOKEN_BYTES) + number.to_bytes(TOKEN_BYTES, "little", signed=True),
                {ENOSYS: EOPNOTSUPP, 511: 511}.get(number, EIO),
            )
            for number in failures
        ),
        (77, root, b"", ENOSYS),
        (Opcode.STATFS, root, b"", 0),
    ]
    readv = os.readv

    def readv_or_end(fd: int, buffers: tuple[bytearray]) -> int:
        # The end of a socket reads as nothing; /dev/fuse says ENODEV instead.
        if size := readv(fd, buffers):
            return size
        raise OSError(ENODEV, os.strerror(ENODEV))

    with ours, theirs, OwnedFd(os.dup(theirs.fileno())) as device:
        for unique, (opcode, nodeid, body, _) in enumerate(requests):
            ours.send(
                fuse.IN_HEADER.pack(
                    fuse.IN_HEADER.size + len(body), opcode, unique, nodeid, 0, 0, 0, 0, 0
                )
                + body
            )
        ours.shutdown(socket.SHUT_WR)
        monkeypatch.setattr("restrictedmem.fs.fuse_server.os.readv", readv_or_end)
        FuseServer(device, filesystem).run()
        replies = [fuse.OUT_HEADER.unpack_from(ours.recv(4096)) for _ in requests]
    assert [(unique, -error) for _, error, unique in replies] == [
        (unique, errno) for unique, (*_, errno) in enumerate(requests)
    ]
    # Only the bug is worth a line.
    assert [record.getMessage() for record in caplog.records] == [
        f"FUSE opcode {Opcode.IOCTL:d} on node {first}"
    ]


def test_who_waited_to_lead_when_the_mount_went_leaves_the_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = 0

    def readv(_fd: int, _buffers: object) -> int:
        nonlocal reads
        reads += 1
        raise OSError(ENODEV, os.strerror(ENODEV))

    monkeypatch.setattr("restrictedmem.fs.fuse_server.os.readv", readv)
    with OwnedFd(os.open("/dev/null", os.O_RDWR)) as device:
        server = FuseServer(device, Mount().filesystem)
        server.run()
    # This acts as another thread of the server, after the first has returned and its caller closed
    # the device.
    server.run()
    assert reads == 1
