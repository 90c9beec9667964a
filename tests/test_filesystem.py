"""The file system without a mount: requests by hand, one for each opcode, short ones included."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from errno import (
    EACCES,
    EFBIG,
    EINVAL,
    EIO,
    ENFILE,
    ENODEV,
    ENOENT,
    ENOSYS,
    ENOTTY,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
)
from functools import partial
from typing import Final, Self, final

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import AttrValid, InitFlag, Opcode, OpenFlag
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fd import OwnedFd
from restrictedmem.fs import filesystem
from restrictedmem.fs.filesystem import NAME, PROVE, TOKEN_BYTES, FileSystem, Request
from restrictedmem.fs.fuse_server import FuseServer
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE, pgoff_t

KEEP: Final = int(FallocMode.KEEP_SIZE)
TOKEN: Final = bytes(range(TOKEN_BYTES))
MISSING: Final = 99


def ioctl_in(command: int, size: int) -> bytes:
    return bytes(fuse.fuse_ioctl_in(fh=0, flags=0, cmd=command, arg=0, in_size=size, out_size=0))


@final
class Mount:
    """A file system, and requests to it in words."""

    def __init__(
        self, api: Api = Api.V10, *, max_files: int = 10, memory_max: int | None = None
    ) -> None:
        self.api = api
        self.proved: list[tuple[bytes, int, RestrictedFile]] = []
        self.filesystem = FileSystem(
            api.value, max_files=max_files, memory_max=memory_max, prove=self._heard
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.batch_forget(*range(2, 1000))

    def _heard(self, token: bytes, ino: int, file: RestrictedFile) -> None:
        self.proved.append((token, ino, file))

    def ask(
        self,
        opcode: int,
        nodeid: int = fuse.ROOT_ID,
        body: bytes = b"",
        uid: int = 1000,
        gid: int = 1000,
    ) -> bytes | None:
        return self.filesystem.handle(Request(opcode, 1, nodeid, uid, gid, 0, body))

    def create(
        self, name: bytes = NAME, flags: int = os.O_RDWR | os.O_CREAT, nodeid: int = fuse.ROOT_ID
    ) -> int:
        """Create a file and return its node."""
        reply = self.ask(
            Opcode.CREATE,
            nodeid,
            bytes(fuse.fuse_create_in(flags=flags, mode=0o100600, umask=0, open_flags=0))
            + name
            + b"\0",
        )
        assert reply is not None
        number: int = fuse.ENTRY_OUT.unpack_from(reply)[0]
        return number

    def file(self, node: int) -> RestrictedFile:
        return self.filesystem.files()[node]

    def fallocate(self, node: int, mode: int, offset: int, length: int) -> bytes | None:
        return self.ask(Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.pack(0, offset, length, mode, 0))

    def setattr(
        self, node: int, valid: int, uid_of_caller: int = 1000, **fields: int
    ) -> bytes | None:
        zero = {name: 0 for name, *_ in fuse.fuse_setattr_in._fields_}
        return self.ask(
            Opcode.SETATTR,
            node,
            bytes(fuse.fuse_setattr_in(**{**zero, **fields, "valid": valid})),
            uid_of_caller,
        )

    def getattr(self, node: int) -> dict[str, int]:
        reply = self.ask(Opcode.GETATTR, node, bytes(16))
        assert reply is not None
        return attributes(reply[fuse.ATTR_OUT.size :])

    def ioctl(
        self, node: int, command: int, data: bytes, in_size: int | None = None
    ) -> bytes | None:
        head = ioctl_in(command, len(data) if in_size is None else in_size)
        return self.ask(Opcode.IOCTL, node, head + data)

    def batch_forget(self, *nodes: int) -> bytes | None:
        pairs = b"".join(fuse.FORGET_ONE.pack(node, 1) for node in nodes)
        return self.ask(
            Opcode.BATCH_FORGET,
            0,
            bytes(fuse.fuse_batch_forget_in(count=len(nodes), dummy=0)) + pairs,
        )


def attributes(data: bytes) -> dict[str, int]:
    names = [field[0] for field in fuse.fuse_attr._fields_]
    return dict(zip(names, fuse.ATTR.unpack_from(data), strict=True))


@pytest.fixture
def mount() -> Iterator[Mount]:
    with Mount() as made:
        yield made


# The mount.


def test_init_takes_the_older_of_two_minor_versions(mount: Mount) -> None:
    for offered, spoken in ((35, 35), (38, 38), (45, fuse.KERNEL_MINOR_VERSION)):
        body = bytes(
            fuse.fuse_init_in(
                major=7, minor=offered, max_readahead=1 << 20, flags=0xFFFF_FFFF, flags2=0xFFFF_FFFF
            )
        )
        reply = mount.ask(Opcode.INIT, 0, body)
        assert reply is not None
        answer = fuse.fuse_init_out.from_buffer_copy(reply)
        assert (answer.major, answer.minor) == (7, spoken)
        # Whatever is offered, neither mmap of direct I/O (flags2 bit 4) nor write-back nor
        # readahead is taken.
        assert (answer.flags, answer.flags2, answer.max_readahead) == (
            InitFlag.PARALLEL_DIROPS,
            0,
            0,
        )


def test_init_of_protocol_35_is_16_bytes(mount: Mount) -> None:
    body = bytes(fuse.fuse_init_in(major=7, minor=35, max_readahead=0, flags=0))[:16]
    assert mount.ask(Opcode.INIT, 0, body) is not None


@pytest.mark.parametrize(("major", "minor"), [(7, 34), (6, 40), (8, 0)])
def test_init_refuses_other_protocols(mount: Mount, major: int, minor: int) -> None:
    body = bytes(fuse.fuse_init_in(major=major, minor=minor, max_readahead=0, flags=0))
    assert outcome(lambda: mount.ask(Opcode.INIT, 0, body)) == Errno(EINVAL)


def test_root_is_a_directory_of_nobody_else(mount: Mount) -> None:
    root = mount.getattr(fuse.ROOT_ID)
    assert (stat.filemode(root["mode"]), root["ino"], root["nlink"]) == (
        "drwx------",
        fuse.ROOT_ID,
        2,
    )


def test_statfs(mount: Mount) -> None:
    reply = mount.ask(Opcode.STATFS)
    assert reply is not None
    found = fuse.fuse_statfs_out.from_buffer_copy(reply)
    assert (found.bsize, found.frsize, found.namelen, found.blocks) == (
        PAGE_SIZE,
        PAGE_SIZE,
        255,
        0,
    )


@pytest.mark.parametrize(
    ("opcode", "errno"),
    [
        (Opcode.LOOKUP, ENOENT),
        (Opcode.OPEN, ENXIO),
        (Opcode.OPENDIR, EACCES),
        (Opcode.READ, EINVAL),
        (Opcode.WRITE, EINVAL),
        (Opcode.FSYNC, EINVAL),
        (Opcode.LSEEK, ENOSYS),
        (Opcode.COPY_FILE_RANGE, ENOSYS),
        (Opcode.POLL, ENOSYS),
        (Opcode.FLUSH, ENOSYS),
        (Opcode.ACCESS, ENOSYS),
        (Opcode.READDIR, ENOSYS),
        (13, ENOSYS),
        (4096, ENOSYS),
    ],
)
def test_refused_opcodes(mount: Mount, opcode: int, errno: int) -> None:
    node = mount.create()
    assert outcome(lambda: mount.ask(opcode, node, bytes(100))) == Errno(errno)


def test_unlink_and_interrupt(mount: Mount) -> None:
    assert mount.ask(Opcode.UNLINK, body=NAME + b"\0") == b""
    assert mount.ask(Opcode.INTERRUPT, 0, bytes(8)) is None


# One file.


def test_create_replies_with_entry_attributes_and_open_flags(mount: Mount) -> None:
    reply = mount.ask(
        Opcode.CREATE,
        fuse.ROOT_ID,
        bytes(fuse.fuse_create_in(flags=os.O_RDWR, mode=0o100600, umask=0, open_flags=0))
        + NAME
        + b"\0",
        7,
        8,
    )
    assert reply is not None
    node, generation, entry_valid, attr_valid, _, _ = fuse.ENTRY_OUT.unpack_from(reply)
    found = attributes(reply[fuse.ENTRY_OUT.size :])
    _, flags, _ = fuse.OPEN_OUT.unpack_from(reply, fuse.ENTRY_OUT.size + fuse.ATTR.size)
    assert len(reply) == fuse.ENTRY_OUT.size + fuse.ATTR.size + fuse.OPEN_OUT.size
    assert (generation, entry_valid, attr_valid) == (0, 0, 0)
    assert flags == OpenFlag.DIRECT_IO | OpenFlag.NONSEEKABLE | OpenFlag.STREAM | OpenFlag.NOFLUSH
    assert found["ino"] == node != fuse.ROOT_ID
    assert (found["uid"], found["gid"], found["size"], found["blocks"], found["nlink"]) == (
        7,
        8,
        0,
        0,
        0,
    )
    assert stat.filemode(found["mode"]) == "-rwxrwxrwx"


def test_create_refuses_other_names_places_and_modes(mount: Mount) -> None:
    node = mount.create()
    assert outcome(lambda: mount.create(b"other")) == Errno(EACCES)
    assert outcome(lambda: mount.create(nodeid=node)) == Errno(EACCES)
    assert outcome(lambda: mount.create(flags=os.O_RDONLY | os.O_CREAT)) == Errno(EINVAL)
    assert outcome(lambda: mount.create(flags=os.O_WRONLY | os.O_CREAT)) == Errno(EINVAL)
    assert list(mount.filesystem.files()) == [node]


def test_nodes_are_never_used_again(mount: Mount) -> None:
    seen: set[int] = set()
    for _ in range(30):
        node = mount.create()
        assert node not in seen
        seen.add(node)
        mount.ask(Opcode.RELEASE, node, bytes(24))
        mount.ask(Opcode.FORGET, node, bytes(8))


def test_enfile_when_full() -> None:
    mount = Mount(max_files=3)
    nodes = [mount.create() for _ in range(3)]
    assert outcome(mount.create) == Errno(ENFILE)
    # A released node still has a number in the kernel; a forgotten one has not.
    mount.ask(Opcode.RELEASE, nodes[0], bytes(24))
    assert outcome(mount.create) == Errno(ENFILE)
    mount.ask(Opcode.FORGET, nodes[0], bytes(8))
    assert mount.create() not in nodes


def test_setattr_size(mount: Mount) -> None:
    node = mount.create()
    assert outcome(lambda: mount.setattr(node, AttrValid.SIZE, size=PAGE_SIZE + 1)) == Errno(EINVAL)
    assert outcome(lambda: mount.setattr(node, AttrValid.SIZE, size=1 << 63)) == Errno(EFBIG)
    reply = mount.setattr(node, AttrValid.SIZE | AttrValid.FH, size=MAX_FILE_BYTES)
    assert reply is not None
    assert attributes(reply[fuse.ATTR_OUT.size :])["size"] == MAX_FILE_BYTES
    for size in (0, PAGE_SIZE + 1, MAX_FILE_BYTES):
        assert outcome(partial(mount.setattr, node, AttrValid.SIZE, size=size)) == Errno(EPERM)


def test_setattr_mode_owner_and_times(mount: Mount) -> None:
    node = mount.create()
    mount.setattr(node, AttrValid.MODE, mode=0o100640)
    mount.setattr(
        node, AttrValid.ATIME | AttrValid.MTIME, atime=1, atimensec=2, mtime=3, mtimensec=4
    )
    found = mount.getattr(node)
    assert stat.filemode(found["mode"]) == "-rw-r-----"
    assert [found[name] for name in ("atime", "atimensec", "mtime", "mtimensec")] == [1, 2, 3, 4]
    mount.setattr(node, AttrValid.UID | AttrValid.GID, uid_of_caller=0, uid=5, gid=6)
    found = mount.getattr(node)
    assert (found["uid"], found["gid"]) == (5, 6)
    # As chown(2) has it, -1 leaves one as it is.
    for valid, now in ((AttrValid.UID, (7, 6)), (AttrValid.GID, (7, 7))):
        mount.setattr(node, valid, uid_of_caller=0, uid=7, gid=7)
        found = mount.getattr(node)
        assert (found["uid"], found["gid"]) == now


def test_setattr_is_for_the_owner_and_root(mount: Mount) -> None:
    node = mount.create()
    for valid in (AttrValid.MODE, AttrValid.UID, AttrValid.GID, AttrValid.ATIME, AttrValid.MTIME):
        assert outcome(partial(mount.setattr, node, valid, uid_of_caller=1001)) == Errno(EPERM), (
            valid
        )
        mount.setattr(node, valid, uid_of_caller=0, uid=1000, gid=1000)
    # The owner may name itself and the group it acts with, and nobody else.
    mount.setattr(node, AttrValid.UID | AttrValid.GID, uid=1000, gid=1000)
    assert outcome(lambda: mount.setattr(node, AttrValid.UID, uid=1001)) == Errno(EPERM)
    assert outcome(lambda: mount.setattr(node, AttrValid.GID, gid=1001)) == Errno(EPERM)


def test_fallocate_and_attributes(mount: Mount) -> None:
    node = mount.create()
    assert mount.fallocate(node, KEEP, PAGE_SIZE, 2 * PAGE_SIZE) == b""
    assert (mount.getattr(node)["size"], mount.getattr(node)["blocks"]) == (0, 2 * PAGE_SIZE // 512)
    assert mount.fallocate(node, 0, 0, PAGE_SIZE + 1) == b""
    assert (mount.getattr(node)["size"], mount.getattr(node)["blocks"]) == (
        PAGE_SIZE + 1,
        3 * PAGE_SIZE // 512,
    )
    assert mount.fallocate(node, PUNCH, 0, 4 * PAGE_SIZE) == b""
    assert mount.getattr(node)["blocks"] == 0
    assert outcome(lambda: mount.fallocate(node, PUNCH, 1, PAGE_SIZE)) == Errno(EINVAL)
    assert outcome(
        lambda: mount.fallocate(node, int(FallocMode.ZERO_RANGE), 0, PAGE_SIZE)
    ) == Errno(EOPNOTSUPP)


def test_prove(mount: Mount) -> None:
    node = mount.create()
    assert mount.ioctl(node, PROVE, TOKEN) == fuse.IOCTL_OUT.pack(0, 0, 0, 0)
    assert mount.proved == [(TOKEN, node, mount.file(node))]
    assert outcome(lambda: mount.ioctl(node, PROVE + 1, TOKEN)) == Errno(ENOTTY)
    assert outcome(lambda: mount.ioctl(node, PROVE, TOKEN, in_size=15)) == Errno(ENOTTY)
    assert outcome(lambda: mount.ioctl(MISSING, PROVE, TOKEN)) == Errno(ENOENT)
    assert outcome(lambda: mount.ioctl(fuse.ROOT_ID, PROVE, TOKEN)) == Errno(EPERM)
    assert len(mount.proved) == 1


def test_prove_is_no_ioctl_without_somebody_to_hear_it() -> None:
    mount = Mount()
    mount.filesystem = FileSystem("v10", max_files=1)
    node = mount.create()
    assert outcome(lambda: mount.ioctl(node, PROVE, TOKEN)) == Errno(ENOTTY)


@pytest.mark.parametrize("nodeid", [MISSING, 0])
def test_a_node_that_is_none(mount: Mount, nodeid: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: mount.getattr(nodeid),
        lambda: mount.setattr(nodeid, AttrValid.SIZE),
        lambda: mount.fallocate(nodeid, 0, 0, PAGE_SIZE),
        lambda: mount.ask(Opcode.RELEASE, nodeid, bytes(24)),
    ]
    assert [outcome(call) for call in calls] == [Errno(ENOENT)] * len(calls)
    assert mount.ask(Opcode.FORGET, nodeid, bytes(8)) is None


def test_the_root_is_no_file(mount: Mount) -> None:
    assert outcome(lambda: mount.setattr(fuse.ROOT_ID, AttrValid.MODE, mode=0o777)) == Errno(EPERM)
    assert outcome(lambda: mount.fallocate(fuse.ROOT_ID, 0, 0, PAGE_SIZE)) == Errno(EPERM)


# Lifetimes.


def _memfds() -> int:
    """Count this process's open descriptors."""
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
    """A socket in place of /dev/fuse: every request has one reply, the last is answered as well as the first."""

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
    # As another thread of the server, after the first has returned and its caller closed the
    # device.
    server.run()
    assert reads == 1


# Notification.


@final
class Recorder:
    """Records each callback, with the sequence page's state inside of it."""

    def __init__(
        self, name: str, log: list[tuple[str, str, int, int]], file: RestrictedFile
    ) -> None:
        self._name = name
        self._log = log
        self._sequence = file.sequence()
        self.seen: list[tuple[bool, bool, int]] = []

    def _note(self, what: str, start: int, end: int) -> None:
        self._log.append((self._name, what, start, end))
        retry = self._sequence.retry(self._sequence.snapshot(), pgoff_t(start), pgoff_t(end))
        self.seen.append((self._sequence.busy(), retry, self._sequence.snapshot()))

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._note("start", start, end)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._note("end", start, end)

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


@pytest.fixture(params=list(Api), ids=lambda api: api.value)
def watched(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Mount, int, list[tuple[str, str, int, int]], Recorder]]:
    """Give a file of eight pages with two notifiers, the second of which is the newest."""
    mount = Mount(request.param)
    node = mount.create()
    file = mount.file(node)
    mount.setattr(node, AttrValid.SIZE, size=8 * PAGE_SIZE)
    log: list[tuple[str, str, int, int]] = []
    file.register_notifier(Recorder("old", log, file))
    newest = Recorder("new", log, file)
    file.register_notifier(newest)
    with mount:
        yield mount, node, log, newest


Watched = tuple[Mount, int, list[tuple[str, str, int, int]], Recorder]


def pair(start: int, end: int) -> list[tuple[str, str, int, int]]:
    return [(name, what, start, end) for what in ("start", "end") for name in ("new", "old")]


@pytest.mark.parametrize(("first", "count"), [(1, 2), (0, 8), (6, 9), (100, 1), (1 << 40, 1)])
def test_a_punch_notifies_in_pages_holes_and_beyond_the_end_too(
    watched: Watched, first: int, count: int
) -> None:
    mount, node, log, _ = watched
    mount.fallocate(node, PUNCH, first * PAGE_SIZE, count * PAGE_SIZE)
    assert log == pair(first, first + count)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, PAGE_SIZE), (0, PAGE_SIZE - 1), (PAGE_SIZE - 1, 1)]
)
def test_an_unaligned_punch_tells_nobody(watched: Watched, offset: int, length: int) -> None:
    mount, node, log, newest = watched
    assert outcome(lambda: mount.fallocate(node, PUNCH, offset, length)) == Errno(EINVAL)
    assert log == []
    assert mount.file(node).sequence().snapshot() == 0
    assert newest.seen == []


@pytest.mark.parametrize("mode", [0, KEEP])
def test_allocation_notifies_in_v9_alone(watched: Watched, mode: int) -> None:
    mount, node, log, _ = watched
    mount.fallocate(node, mode, PAGE_SIZE + 1, PAGE_SIZE)
    assert log == (pair(1, 3) if mount.api is Api.V9 else [])


def test_a_mode_that_fails_delivers_its_end_in_v9(watched: Watched) -> None:
    mount, node, log, _ = watched
    assert outcome(
        lambda: mount.fallocate(node, int(FallocMode.ZERO_RANGE), 0, PAGE_SIZE)
    ) == Errno(EOPNOTSUPP)
    assert log == (pair(0, 1) if mount.api is Api.V9 else [])


def test_a_punch_that_fails_delivers_its_end(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, node, log, newest = watched

    def fail(_self: object, offset: int, length: int) -> None:
        raise OSError(ENFILE, f"punch of {length} at {offset}")

    monkeypatch.setattr("restrictedmem.mm.backing.MemfdBacking.punch", fail)
    assert outcome(lambda: mount.fallocate(node, PUNCH, 0, PAGE_SIZE)) == Errno(ENFILE)
    assert log == pair(0, 1)
    assert [busy for busy, _, _ in newest.seen] == [True, False]
    assert mount.file(node).sequence().snapshot() == 1


def test_the_operation_is_between_start_and_end(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, node, log, _ = watched

    def note(_self: object, offset: int, length: int) -> None:
        log.append(("memfd", "punch", offset, length))

    monkeypatch.setattr("restrictedmem.mm.backing.MemfdBacking.punch", note)
    mount.fallocate(node, PUNCH, PAGE_SIZE, PAGE_SIZE)
    assert log == [*pair(1, 2)[:2], ("memfd", "punch", PAGE_SIZE, PAGE_SIZE), *pair(1, 2)[2:]]


def test_the_sequence_seen_inside_callbacks(watched: Watched) -> None:
    mount, node, _, newest = watched
    for done in range(3):
        newest.seen.clear()
        mount.fallocate(node, PUNCH, PAGE_SIZE, PAGE_SIZE)
        # start: in progress, so a fault on the range must retry; end: over, and the sequence has
        # risen by one.
        assert newest.seen == [(True, True, done), (False, False, done + 1)]


def test_an_unregistered_notifier_hears_nothing(watched: Watched) -> None:
    mount, node, log, newest = watched
    mount.file(node).unregister_notifier(newest)
    mount.fallocate(node, PUNCH, 0, PAGE_SIZE)
    assert log == [("old", "start", 0, 1), ("old", "end", 0, 1)]


def test_release_is_silent(watched: Watched) -> None:
    mount, node, log, _ = watched
    file = mount.file(node)
    file.get()
    mount.ask(Opcode.RELEASE, node, bytes(24))
    mount.ask(Opcode.FORGET, node, bytes(8))
    assert log == []
    file.put()


def test_what_waits_says_so_before(watched: Watched) -> None:
    mount, node, _, _ = watched
    plain = mount.create()
    mount.file(node).holder = 7
    said: list[int | None] = []

    def before_waiting(consumer: int | None) -> bool:
        said.append(consumer)
        return True

    mount.filesystem.before_waiting = before_waiting

    def waits(node: int, length: int) -> bool:
        said.clear()
        mount.filesystem.handle(
            Request(
                Opcode.FALLOCATE, 1, node, 0, 0, 0, fuse.FALLOCATE_IN.pack(0, 0, length, PUNCH, 0)
            )
        )
        return bool(said)

    assert waits(node, PAGE_SIZE)
    assert said == [7]
    assert not waits(plain, PAGE_SIZE)
    assert waits(plain, 1 << 30)
    assert said == [None]
