"""Everything an owner can do to a descriptor, each as one small function.

A function returns a value or raises OSError.

Every function gets a ``Thing`` of its own: a new descriptor and a way to make another of the same
kind. Tests compare the returned values with ``==``, so they are numbers, texts or tuples of them.
Operations on the descriptor as a handle are in descriptor_handle.py.
"""

import ctypes
import mmap
import os
import resource
import signal
import stat
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from outcomes import checked, in_child, outcome
from restrictedmem.abi.memory import PUNCH, FallocMode, fallocate
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

PAGE = PAGE_SIZE

SYS_readahead = 187

MAP_HUGETLB = 0x4_0000

libc = ctypes.CDLL(None, use_errno=True)
_mmap = libc.mmap
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_mmap.restype = ctypes.c_void_p
_munmap = libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_lseek = libc.lseek64
_lseek.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
_lseek.restype = ctypes.c_int64
system_call = libc.syscall
system_call.restype = ctypes.c_long
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
    return checked(system_call(SYS_readahead, thing.fd, ctypes.c_long(0), ctypes.c_long(PAGE)))


def sizes(*lengths: int) -> Operation:
    """Set each size in turn; return the outcome of the last call, with the size after it."""

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
    """Return size and pages that an O_PATH descriptor sees after the last open one is closed."""
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
    """Return f_type, f_bsize and f_namelen."""
    numbers = (ctypes.c_long * 16)()
    checked(libc.fstatfs(thing.fd, numbers))
    return hex(numbers[0]), numbers[1], numbers[8]


def chmod(thing: Thing) -> str:
    os.fchmod(thing.fd, 0o640)
    return stat.filemode(os.fstat(thing.fd).st_mode)


def chown(thing: Thing) -> tuple[int, int]:
    """Return how far owner and group are from the values set. Only root may give a file away."""
    uid, gid = (os.getuid(), os.getgid()) if os.geteuid() else (12, 34)
    os.fchown(thing.fd, uid, gid)
    found = os.fstat(thing.fd)
    return found.st_uid - uid, found.st_gid - gid


def utimens(thing: Thing) -> tuple[int, int]:
    os.utime(thing.fd, ns=(1_000_000_001, 2_000_000_002))
    found = os.fstat(thing.fd)
    return found.st_atime_ns, found.st_mtime_ns


def identity(thing: Thing) -> tuple[bool, bool, bool]:
    """Return facts about inode and device.

    They say whether both stay while size and pages change, and whether another file has another
    inode and the same device.
    """
    before = os.fstat(thing.fd)
    resize(thing.fd, PAGE)
    with suppress(OSError):
        fallocate(thing.fd, FallocMode.KEEP_SIZE, 0, PAGE)
    after = os.fstat(thing.fd)
    with thing.another() as other:
        second = os.fstat(other)
    same = (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev)
    return same, second.st_ino != after.st_ino, second.st_dev == after.st_dev
