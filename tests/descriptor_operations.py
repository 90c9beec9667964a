"""Everything an owner can do to a descriptor, each as one small function that returns a value or raises OSError.

Every function gets a ``Thing`` of its own: a new descriptor and a way to make another of the same
kind. What a function returns is compared with ``==``, so it is a number, a text or a tuple of them.
"""

import array
import ctypes
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from outcomes import checked, in_child, outcome
from restrictedmem.abi.memory import PUNCH, FallocMode, fallocate
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

PAGE = PAGE_SIZE

SYS_execveat = 322
SYS_readahead = 187
FICLONE = 0x4004_9409
FIBMAP = 1
FIONREAD = 0x541B
FS_IOC_GETFLAGS = 0x8008_6601
MAP_HUGETLB = 0x4_0000
IN_MODIFY = 0x2
AT_EMPTY_PATH = 0x1000

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_lseek = _libc.lseek64
_lseek.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
_lseek.restype = ctypes.c_int64
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_MAP_FAILED = ctypes.c_void_p(-1).value

R, W, X = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE


@dataclass(frozen=True, slots=True)
class Thing:
    """A descriptor to operate on; ``make`` creates another of its kind with creation flags."""

    fd: int
    make: Callable[[int], int]

    @contextmanager
    def another(self, flags: int = 0) -> Generator[int]:
        fd = self.make(flags)
        try:
            yield fd
        finally:
            os.close(fd)


Operation = Callable[[Thing], object]


@contextmanager
def _pipe(content: bytes = b"") -> Generator[tuple[int, int]]:
    ours, theirs = os.pipe()
    try:
        os.write(theirs, content)
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


# Content.


def map_(flags: int, prot: int, length: int = PAGE, offset: int = 0, size: int = PAGE) -> Operation:
    """Map the descriptor and unmap it again; ``size`` is set first."""

    def operation(thing: Thing) -> int:
        resize(thing.fd, size)
        _munmap(_mapping(thing.fd, flags, prot, length, offset), length)
        return 0

    return operation


def _mapping(fd: int, flags: int, prot: int, length: int, offset: int) -> int:
    address = _mmap(None, length, prot, flags, fd, offset)
    if address == _MAP_FAILED:
        checked(-1)
    assert isinstance(address, int)
    return address


def touch(flags: int, prot: int) -> Operation:
    """Read, or write where ``prot`` allows it, the first byte of a mapping, in a child."""

    def operation(thing: Thing) -> str:
        resize(thing.fd, PAGE)

        def body() -> int:
            byte = ctypes.c_ubyte.from_address(_mapping(thing.fd, flags, prot, PAGE, 0))
            if prot & W:
                byte.value = 1
            return byte.value

        return in_child(body)

    return operation


def resize(fd: int, size: int) -> None:
    """Give a descriptor its size where it takes one (guest_memfd has had it since creation)."""
    with suppress(OSError):
        os.ftruncate(fd, size)


def lseek(whence: int) -> Operation:
    return lambda thing: checked(_lseek(thing.fd, 0, whence))


def splice_out(offset: int | None) -> Operation:
    def operation(thing: Thing) -> int:
        with _pipe() as (_, into):
            return os.splice(thing.fd, into, PAGE, offset_src=offset)

    return operation


def splice_in(offset: int | None) -> Operation:
    def operation(thing: Thing) -> int:
        with _pipe(b"content") as (source, _):
            return os.splice(source, thing.fd, 7, offset_dst=offset)

    return operation


def sendfile_into(thing: Thing) -> int:
    with tempfile.TemporaryFile() as source:
        source.write(b"content")
        source.flush()
        return os.sendfile(thing.fd, source.fileno(), 0, 7)


def sendfile_from(offset: int | None) -> Operation:
    def operation(thing: Thing) -> int:
        with _pipe() as (_, into):
            return os.sendfile(into, thing.fd, offset, PAGE)

    return operation


def copy_out(thing: Thing) -> int:
    resize(thing.fd, PAGE)
    with tempfile.TemporaryFile() as target:
        return os.copy_file_range(thing.fd, target.fileno(), PAGE)


def sized(operation: Operation) -> Operation:
    """Set the size to one page before an operation."""

    def with_size(thing: Thing) -> object:
        resize(thing.fd, PAGE)
        return operation(thing)

    return with_size


def copy_in(thing: Thing) -> int:
    with tempfile.TemporaryFile() as source:
        source.write(b"content")
        source.flush()
        return os.copy_file_range(source.fileno(), thing.fd, 7)


def copy_between(thing: Thing) -> int:
    with thing.another() as other:
        return os.copy_file_range(thing.fd, other, PAGE, 0, 0)


def readahead(thing: Thing) -> int:
    resize(thing.fd, PAGE)
    return checked(_syscall(SYS_readahead, thing.fd, ctypes.c_long(0), ctypes.c_long(PAGE)))


# Size.


def sizes(*lengths: int) -> Operation:
    """Set each size in turn and return the outcome of the last call with the size that then stands."""

    def operation(thing: Thing) -> tuple[object, int]:
        last: object = None
        for length in lengths:
            last = outcome(partial(os.ftruncate, thing.fd, length))
        return last, os.fstat(thing.fd).st_size

    return operation


def size_by_path(thing: Thing) -> int:
    os.truncate(f"/proc/self/fd/{thing.fd}", PAGE)
    return os.fstat(thing.fd).st_size


def over_limit(body: Callable[[int], object], limit: int = PAGE) -> Operation:
    """Do something under RLIMIT_FSIZE in a child: the errno and whether SIGXFSZ came."""

    def operation(thing: Thing) -> str:
        def limited() -> tuple[object, int]:
            heard: list[int] = []
            signal.signal(signal.SIGXFSZ, lambda number, _: heard.append(number))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            result = outcome(lambda: body(thing.fd))
            return result, len(heard)

        return in_child(limited)

    return operation


def set_twice(fd: int) -> None:
    os.ftruncate(fd, PAGE)
    os.ftruncate(fd, 4 * PAGE)


# Space.


def allocate(mode: int, offset: int, length: int, size: int = 0) -> Operation:
    """fallocate, after setting a size: (size, pages held)."""

    def operation(thing: Thing) -> tuple[int, int]:
        if size:
            resize(thing.fd, size)
        fallocate(thing.fd, mode, offset, length)
        return held(thing.fd)

    return operation


def punch(offset: int, length: int, mode: int = PUNCH) -> Operation:
    """Punch a hole into four allocated pages: (size, pages held)."""

    def operation(thing: Thing) -> tuple[int, int]:
        resize(thing.fd, 4 * PAGE)
        fallocate(thing.fd, FallocMode.KEEP_SIZE, 0, 4 * PAGE)
        fallocate(thing.fd, mode, offset, length)
        return held(thing.fd)

    return operation


def held(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_blocks * 512 // PAGE


def empty_again(thing: Thing) -> tuple[int, int]:
    """Allocate a page at size 0, then set size 0."""
    fallocate(thing.fd, FallocMode.KEEP_SIZE, 0, PAGE)
    os.ftruncate(thing.fd, 0)
    return held(thing.fd)


def last_page(thing: Thing) -> tuple[int, int]:
    fallocate(thing.fd, FallocMode.KEEP_SIZE, MAX_FILE_BYTES - PAGE, PAGE)
    return held(thing.fd)


def grow_after_truncate(thing: Thing) -> tuple[int, int]:
    os.ftruncate(thing.fd, PAGE)
    fallocate(thing.fd, 0, 0, 4 * PAGE + 1)
    return held(thing.fd)


# Attributes.


def fields(thing: Thing) -> tuple[str, int, int, int, int, int, int, int]:
    """Mode, links, uid, gid, size, blocks, block size, device number."""
    found = os.fstat(thing.fd)
    return (
        stat.filemode(found.st_mode),
        found.st_nlink,
        found.st_uid - os.geteuid(),
        found.st_gid - os.getegid(),
        found.st_size,
        found.st_blocks,
        found.st_blksize,
        found.st_rdev,
    )


def after_close(thing: Thing) -> tuple[int, int]:
    """Size and pages held that an O_PATH descriptor sees once the last open descriptor is closed."""
    resize(thing.fd, PAGE)
    with suppress(OSError):
        fallocate(thing.fd, FallocMode.KEEP_SIZE, 0, PAGE)
    path = os.open(f"/proc/self/fd/{thing.fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        os.dup2(path, thing.fd)
        return held(path)
    finally:
        os.close(path)


def fresh_times(thing: Thing) -> bool:
    found = os.fstat(thing.fd)
    return found.st_atime_ns == found.st_mtime_ns == found.st_ctime_ns > 0


def size_moves_times(thing: Thing) -> tuple[bool, bool, bool]:
    before = os.fstat(thing.fd)
    os.ftruncate(thing.fd, PAGE)
    after = os.fstat(thing.fd)
    return (
        after.st_atime_ns == before.st_atime_ns,
        after.st_mtime_ns >= before.st_mtime_ns,
        after.st_ctime_ns == after.st_mtime_ns,
    )


def statfs(thing: Thing) -> tuple[str, int, int]:
    """f_type, f_bsize, f_namelen."""
    numbers = (ctypes.c_long * 16)()
    checked(_libc.fstatfs(thing.fd, numbers))
    return hex(numbers[0]), numbers[1], numbers[8]


def chmod(thing: Thing) -> str:
    os.fchmod(thing.fd, 0o640)
    return stat.filemode(os.fstat(thing.fd).st_mode)


def chown(thing: Thing) -> tuple[int, int]:
    """Return how far owner and group are from what they were set to; only root may give a file away."""
    uid, gid = (os.getuid(), os.getgid()) if os.geteuid() else (12, 34)
    os.fchown(thing.fd, uid, gid)
    found = os.fstat(thing.fd)
    return found.st_uid - uid, found.st_gid - gid


def chown_to_other(thing: Thing) -> str:
    """As uid 65534 who got it passed."""

    def body() -> int:
        os.setresuid(65534, 65534, 65534)
        os.fchown(thing.fd, 65534, -1)
        return 0

    return in_child(body)


def utimens(thing: Thing) -> tuple[int, int]:
    os.utime(thing.fd, ns=(1_000_000_001, 2_000_000_002))
    found = os.fstat(thing.fd)
    return found.st_atime_ns, found.st_mtime_ns


def identity(thing: Thing) -> tuple[bool, bool, bool]:
    """Whether inode and device stay while size and pages change, whether another has another inode, and the same device."""
    before = os.fstat(thing.fd)
    resize(thing.fd, PAGE)
    with suppress(OSError):
        fallocate(thing.fd, FallocMode.KEEP_SIZE, 0, PAGE)
    after = os.fstat(thing.fd)
    with thing.another() as other:
        second = os.fstat(other)
    same = (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev)
    return same, second.st_ino != after.st_ino, second.st_dev == after.st_dev


# The descriptor as such.


def name(thing: Thing) -> str:
    return os.readlink(f"/proc/self/fd/{thing.fd}")


def reopen(flags: int) -> Operation:
    def operation(thing: Thing) -> int:
        fd = os.open(f"/proc/self/fd/{thing.fd}", flags)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    return operation


def seals(thing: Thing) -> int:
    return fcntl.fcntl(thing.fd, fcntl.F_GET_SEALS)


def add_seals(thing: Thing) -> int:
    return fcntl.fcntl(thing.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def execute(thing: Thing) -> str:
    def body() -> int:
        empty = (ctypes.c_char_p * 1)()
        return checked(_syscall(SYS_execveat, thing.fd, b"", empty, empty, AT_EMPTY_PATH))

    return in_child(body)


def duplicate(thing: Thing) -> tuple[bool, int]:
    """dup: the same file, and the size set through the copy."""
    copy = os.dup(thing.fd)
    try:
        resize(copy, 4 * PAGE)
        return os.path.sameopenfile(copy, thing.fd), os.fstat(thing.fd).st_size
    finally:
        os.close(copy)


def fork_(thing: Thing) -> tuple[str, int]:
    """A child sets the size, the parent sees it."""
    said = in_child(lambda: resize(thing.fd, 4 * PAGE))
    return said, os.fstat(thing.fd).st_size


def pass_on(thing: Thing) -> tuple[bool, int]:
    """SCM_RIGHTS, and the size set through what arrived after the original is closed here."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [thing.fd]))])
        _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
    (arrived,) = struct.unpack("i", ancillary[0][2])
    try:
        resize(arrived, 4 * PAGE)
        return os.path.sameopenfile(arrived, thing.fd), os.fstat(thing.fd).st_size
    finally:
        os.close(arrived)


def epoll_add(thing: Thing) -> int:
    with select.epoll() as epoll:
        epoll.register(thing.fd, select.EPOLLIN)
        return 0


def poll(thing: Thing) -> int:
    waiting = select.poll()
    waiting.register(thing.fd, select.POLLIN | select.POLLOUT)
    return waiting.poll(0)[0][1]


def ioctl(request: int) -> Operation:
    def operation(thing: Thing) -> int:
        resize(thing.fd, 4 * PAGE)
        return int.from_bytes(fcntl.ioctl(thing.fd, request, bytes(8)), "little")

    return operation


def ioctl_of(size: int, address: int | None = None) -> Operation:
    """Issue an unknown request that brings so many bytes, or says that they are at an address."""
    request = 1 << 30 | size << 16 | 0xEE00

    def operation(thing: Thing) -> int:
        return fcntl.ioctl(thing.fd, request, bytearray(size) if address is None else address)

    return operation


def clone_out(thing: Thing) -> int:
    with tempfile.TemporaryFile() as target:
        return fcntl.ioctl(target.fileno(), FICLONE, thing.fd)


def flock(thing: Thing) -> int:
    fcntl.flock(thing.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return 0


def record_lock(thing: Thing) -> str:
    """A lock of this process, tried for by a child."""
    fcntl.lockf(thing.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return in_child(lambda: fcntl.lockf(thing.fd, fcntl.LOCK_EX | fcntl.LOCK_NB))


def read_direct(thing: Thing) -> bytes:
    resize(thing.fd, PAGE)
    fcntl.fcntl(thing.fd, fcntl.F_SETFL, os.O_DIRECT)
    return os.read(thing.fd, PAGE)


def inotify(thing: Thing) -> int:
    """The mask of the event that setting the size gives."""
    watch = checked(_libc.inotify_init1(os.O_NONBLOCK))
    try:
        checked(_libc.inotify_add_watch(watch, f"/proc/self/fd/{thing.fd}".encode(), IN_MODIFY))
        resize(thing.fd, PAGE)
        _, mask, _, _ = struct.unpack_from("iIII", os.read(watch, 4096))
        return int(mask)
    finally:
        os.close(watch)


def listxattr(thing: Thing) -> int:
    return len(os.listxattr(thing.fd))


def setxattr(thing: Thing) -> int:
    os.setxattr(thing.fd, "user.x", b"1")
    return 0
