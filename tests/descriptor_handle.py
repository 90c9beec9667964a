"""Operations of an owner on a descriptor as a handle.

There are copies, names, flags and calls for any file; the rest is in descriptor_operations.py.
"""

import array
import ctypes
import fcntl
import os
import select
import socket
import struct
import tempfile

from descriptor_operations import Operation, Thing, libc, resize, system_call
from outcomes import checked, in_child
from restrictedmem.units import PAGE_SIZE

PAGE = PAGE_SIZE

SYS_execveat = 322

FICLONE = 0x4004_9409
FIBMAP = 1
FIONREAD = 0x541B
FS_IOC_GETFLAGS = 0x8008_6601

IN_MODIFY = 0x2
AT_EMPTY_PATH = 0x1000


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
        return checked(system_call(SYS_execveat, thing.fd, b"", empty, empty, AT_EMPTY_PATH))

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
    watch = checked(libc.inotify_init1(os.O_NONBLOCK))
    try:
        checked(libc.inotify_add_watch(watch, f"/proc/self/fd/{thing.fd}".encode(), IN_MODIFY))
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
