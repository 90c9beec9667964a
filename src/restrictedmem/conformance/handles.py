"""A descriptor under test as a handle: copies, names, flags, locks and ioctls."""

import array
import fcntl
import os
import select
import socket
import struct
from contextlib import suppress
from errno import ENOSYS
from typing import Final

from restrictedmem.abi import memory, process
from restrictedmem.conformance import calls
from restrictedmem.conformance.case import UnsupportedError
from restrictedmem.conformance.files import SIZE, File
from restrictedmem.conformance.outcome import outcome
from restrictedmem.units import PAGE_SIZE

FICLONE: Final = 0x4004_9409
FIBMAP: Final = 1
CAP_SYS_RAWIO: Final = 17
FIONREAD: Final = 0x541B
FS_IOC_GETFLAGS: Final = 0x8008_6601
_EVENT: Final = struct.Struct("iIII")


def getfl(file: File) -> int:
    """Return the file's status flags."""
    return file.steps.call("fcntl(fd, F_GETFL)", lambda: fcntl.fcntl(file.fd, fcntl.F_GETFL))


def getfd(file: File) -> int:
    """Return the descriptor's flags."""
    return file.steps.call("fcntl(fd, F_GETFD)", lambda: fcntl.fcntl(file.fd, fcntl.F_GETFD))


def set_direct(file: File) -> int:
    """Set O_DIRECT."""
    return file.steps.call(
        "fcntl(fd, F_SETFL, O_DIRECT)", lambda: fcntl.fcntl(file.fd, fcntl.F_SETFL, os.O_DIRECT)
    )


def read_direct(file: File) -> int:
    """Set O_DIRECT, then read a page."""
    file.resize()
    set_direct(file)
    return file.read(PAGE_SIZE)


def seals(file: File) -> int:
    """Return the file's seals."""
    return file.steps.call(
        "fcntl(fd, F_GET_SEALS)", lambda: fcntl.fcntl(file.fd, fcntl.F_GET_SEALS)
    )


def add_seals(file: File) -> int:
    """Seal the file against writing."""
    return file.steps.call(
        "fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)",
        lambda: fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    )


def name(file: File) -> str:
    """Return the file's name in /proc."""
    return file.steps.call(
        'readlink("/proc/self/fd/N")', lambda: os.readlink(f"/proc/self/fd/{file.fd}")
    )


def reopen(file: File, flags: int) -> int:
    """Open the file by its name in /proc; return the size that the new descriptor sees."""
    fd = file.steps.call(
        f'open("/proc/self/fd/N", {flags:#o})', lambda: os.open(f"/proc/self/fd/{file.fd}", flags)
    )
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def execute(file: File) -> str:
    """Execute the file in a child."""
    return file.steps.in_child(
        lambda: file.steps.call(
            'execveat(fd, "", {NULL}, {NULL}, AT_EMPTY_PATH)', lambda: calls.execveat(file.fd)
        )
    )


def duplicate(file: File) -> tuple[bool, int]:
    """Duplicate it: whether the copy is the same file, and the size set through it."""
    copy = file.steps.call("fd2 = dup(fd)", lambda: os.dup(file.fd))
    try:
        _size_through(file, copy)
        return os.path.sameopenfile(copy, file.fd), file.stat().st_size
    finally:
        os.close(copy)


def inherited(file: File) -> tuple[str, int]:
    """Set the size in a child: its outcome, and the size that the parent sees."""
    said = file.steps.in_child(lambda: file.resize(SIZE))
    return said, file.stat().st_size


def passed(file: File) -> tuple[bool, int]:
    """Pass it by SCM_RIGHTS: whether the same file arrives, and the size set through it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        rights = array.array("i", [file.fd])
        file.steps.note("sendmsg(socket, SCM_RIGHTS {fd}), and recvmsg at its other end")
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
    (arrived,) = struct.unpack("i", ancillary[0][2])
    try:
        _size_through(file, arrived)
        return os.path.sameopenfile(arrived, file.fd), file.stat().st_size
    finally:
        os.close(arrived)


def _size_through(file: File, fd: int) -> None:
    with suppress(OSError):
        file.steps.call(f"ftruncate(fd2, {SIZE:#x})", lambda: os.ftruncate(fd, SIZE))


def after_close(file: File) -> tuple[int, int]:
    """Return size and pages that an O_PATH descriptor sees after the last open one is closed."""
    file.resize()
    with suppress(OSError):
        file.fallocate(int(memory.FallocMode.KEEP_SIZE), 0, PAGE_SIZE)
    path = os.open(f"/proc/self/fd/{file.fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        file.steps.note('path = open("/proc/self/fd/N", O_PATH), dup2(path, fd)')
        os.dup2(path, file.fd)
        return file.held()
    finally:
        os.close(path)


def epoll_add(file: File) -> int:
    """Add it to an epoll set; return 0."""
    with select.epoll() as epoll:
        file.steps.call(
            "epoll_ctl(epoll, EPOLL_CTL_ADD, fd, {EPOLLIN})",
            lambda: epoll.register(file.fd, select.EPOLLIN),
        )
    return 0


def poll(file: File) -> int:
    """Return the events that poll(2) reports at once."""
    waiting = select.poll()
    waiting.register(file.fd, select.POLLIN | select.POLLOUT)
    return file.steps.call(
        "poll({fd, POLLIN | POLLOUT}, 1, 0)", lambda: sum(event for _, event in waiting.poll(0))
    )


def ioctl(file: File, request: int) -> int:
    """Issue a request on a file of four pages; return the number that it answers."""
    file.resize(SIZE)
    return file.steps.call(
        f"ioctl(fd, {request:#x}, &(long){{0}})",
        lambda: int.from_bytes(fcntl.ioctl(file.fd, request, bytes(8)), "little"),
    )


def fibmap(file: File) -> int:
    """Ask for the block of the file's first page.

    Raises:
        UnsupportedError: without CAP_SYS_RAWIO, which FIBMAP needs.
    """
    if not process.effective_capabilities() >> CAP_SYS_RAWIO & 1:
        raise UnsupportedError("FIBMAP needs CAP_SYS_RAWIO")
    return ioctl(file, FIBMAP)


def fibmap_unprivileged(file: File) -> str:
    """Ask the same in a child without capabilities."""

    def body() -> int:
        process.set_capabilities(0)
        return ioctl(file, FIBMAP)

    return file.steps.in_child(body)


def unknown_ioctl(file: File, size: int, *, readable: bool = True) -> int:
    """Issue an unknown request that brings so many bytes, or says so of a null pointer."""
    request = 1 << 30 | size << 16 | 0xEE00
    argument = bytearray(size) if readable else 0
    return file.steps.call(
        f"ioctl(fd, {request:#x}, {'buf' if readable else 'NULL'})",
        lambda: fcntl.ioctl(file.fd, request, argument),
    )


def clone_out(file: File) -> int:
    """Clone it into a file of another file system."""
    with memory.memfd_create("target") as target:
        return file.steps.call(
            "ioctl(file, FICLONE, fd)", lambda: fcntl.ioctl(target.fileno(), FICLONE, file.fd)
        )


def flock(file: File) -> int:
    """Take flock(2); return 0."""
    file.steps.call(
        "flock(fd, LOCK_EX | LOCK_NB)", lambda: fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    )
    return 0


def flock_inherited(file: File) -> str:
    """Take flock(2) in a child, on the open file that the parent has locked."""
    flock(file)
    return file.steps.in_child(lambda: flock(file))


def closed(file: File) -> tuple[object, object, object]:
    """Set a size, ask for attributes and allocate, by a number that is closed."""
    number = os.dup(file.fd)
    os.close(number)
    file.steps.note("fd2 = dup(fd), close(fd2)")
    return (
        outcome(lambda: os.ftruncate(number, PAGE_SIZE)),
        outcome(lambda: os.fstat(number)),
        outcome(lambda: memory.fallocate(number, 0, 0, PAGE_SIZE)),
    )


def record_lock(file: File) -> str:
    """Take a record lock, which a child tries for, too."""

    def lock() -> None:
        file.steps.call(
            "fcntl(fd, F_SETLK, {F_WRLCK})",
            lambda: fcntl.lockf(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        )

    lock()
    return file.steps.in_child(lock)


def sync(file: File) -> None:
    """Call fsync(2)."""
    file.steps.call("fsync(fd)", lambda: os.fsync(file.fd))


def datasync(file: File) -> None:
    """Call fdatasync(2)."""
    file.steps.call("fdatasync(fd)", lambda: os.fdatasync(file.fd))


def getdents(file: File) -> int:
    """List it as a directory."""
    return file.steps.call("getdents64(fd, …)", lambda: len(os.listdir(file.fd)))


def inotify(file: File) -> int:
    """Return the mask of the event that setting the size gives.

    Raises:
        OSError: EAGAIN for no event.
        UnsupportedError: where the kernel has no inotify.
    """
    try:
        watch = calls.inotify_watch(f"/proc/self/fd/{file.fd}", calls.IN_MODIFY)
    except OSError as error:
        if error.errno != ENOSYS:
            raise
        raise UnsupportedError("the kernel has no inotify") from error
    with watch:
        file.steps.note('inotify_add_watch(w, "/proc/self/fd/N", IN_MODIFY)')
        file.resize()
        return int(_EVENT.unpack_from(os.read(watch.fileno(), 4096))[1])
