"""The file system without a mount: requests by hand, one for each opcode."""

import os
import stat
from collections.abc import Callable
from errno import EACCES, EFBIG, EINVAL, ENFILE, ENOENT, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EPERM
from functools import partial

import pytest

from fuse_requests import KEEP, MISSING, TOKEN, Mount, attributes, mount
from outcomes import Errno, outcome
from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import AttrValid, InitFlag, Opcode, OpenFlag
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fs.filesystem import FileSystem
from restrictedmem.fs.guest_memfd_requests import REQUEST_BUFFER
from restrictedmem.fs.owner_abi import NAME, PROVE
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

__all__ = ["mount"]


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
        # The reply takes neither mmap of direct I/O (flags2 bit 4) nor write-back nor readahead,
        # whatever the kernel offers.
        assert (answer.flags, answer.flags2, answer.max_readahead) == (
            InitFlag.PARALLEL_DIROPS,
            0,
            0,
        )


@pytest.mark.parametrize(("cached", "read", "written"), [(False, 0, 1), (True, 16, 32)])
def test_pages_of_a_page_cache_come_and_go_many_at_a_time(
    mount: Mount, cached: bool, read: int, written: int
) -> None:
    if cached:
        mount.filesystem.drop_pages = print
    body = bytes(fuse.fuse_init_in(major=7, minor=45, max_readahead=1 << 20, flags=0))
    reply = mount.ask(Opcode.INIT, 0, body)
    assert reply is not None
    answer = fuse.fuse_init_out.from_buffer_copy(reply)
    assert answer.max_readahead == read * PAGE_SIZE
    assert answer.max_write == written * PAGE_SIZE
    # The kernel reads nothing into a buffer without room for the longest request.
    longest = max(answer.max_write + fuse.WRITE_IN.size, fuse.MIN_READ_BUFFER + (1 << 14))
    assert fuse.IN_HEADER.size + longest <= REQUEST_BUFFER


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
    # In chown(2), -1 leaves an id as it is.
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
