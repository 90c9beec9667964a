"""System calls that Python has no function for, and that only cases make.

The numbers are those of x86-64 (asm/unistd_64.h). Each function raises OSError with the errno of
its call. Addresses, lengths and offsets are in bytes.
"""

import ctypes
import os
from typing import Final

from restrictedmem.abi._syscall import syscall
from restrictedmem.fd import OwnedFd

MAP_FIXED: Final = 0x10
MAP_HUGETLB: Final = 0x4_0000
MAP_SHARED_VALIDATE: Final = 3
MS_SYNC: Final = 4
MADV_COLD: Final = 20
MADV_PAGEOUT: Final = 21
MADV_WIPEONFORK: Final = 18
MPOL_MF_MOVE: Final = 2
AT_EMPTY_PATH: Final = 0x1000
IN_MODIFY: Final = 0x2

_STATFS_WORDS: Final = 16
_SYS_PTRACE: Final = 101
_PTRACE_PEEKDATA: Final = 2
_PTRACE_ATTACH: Final = 16
_PTRACE_DETACH: Final = 17
_WALL: Final = 0x4000_0000


def mmap(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """Map a descriptor; return the address, which munmap gives back."""
    return syscall("mmap", 9, address, length, prot, flags, fd, offset)


def munmap(address: int, length: int) -> None:
    """Unmap a range."""
    syscall("munmap", 11, address, length)


def lseek(fd: int, offset: int, whence: int) -> int:
    """Move the file's position, with any ``whence``."""
    return syscall("lseek", 8, fd, offset, whence)


def mprotect(address: int, length: int, prot: int) -> None:
    """Change the protection of a mapping."""
    syscall("mprotect", 10, address, length, prot)


def msync(address: int, length: int, flags: int) -> None:
    """Write a mapping back."""
    syscall("msync", 26, address, length, flags)


def madvise(address: int, length: int, advice: int) -> None:
    """Advise about a mapping."""
    syscall("madvise", 28, address, length, advice)


def mlock(address: int, length: int) -> None:
    """Lock a mapping."""
    syscall("mlock", 149, address, length)


def readahead(fd: int, offset: int, count: int) -> int:
    """Read ahead into the page cache."""
    return syscall("readahead", 187, fd, offset, count)


def transfer(call: str, fd: int, address: int, count: int) -> int:
    """Read or write at an address."""
    return syscall(call, {"read": 0, "write": 1}[call], fd, address, count)


def fstatfs(fd: int) -> tuple[int, int, int]:
    """Return f_type, f_bsize and f_namelen."""
    found = (ctypes.c_long * _STATFS_WORDS)()
    syscall("fstatfs", 138, fd, ctypes.addressof(found))
    return found[0], found[1], found[8]


def execveat(fd: int) -> int:
    """Execute a descriptor with no arguments (AT_EMPTY_PATH)."""
    none = (ctypes.c_char_p * 1)()
    address = ctypes.addressof(none)
    return syscall("execveat", 322, fd, b"", address, address, AT_EMPTY_PATH)


def inotify_watch(path: str, mask: int) -> OwnedFd:
    """Watch a path; return the inotify descriptor, whose reads do not wait. The caller owns it."""
    watch = OwnedFd(syscall("inotify_init1", 294, os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        syscall("inotify_add_watch", 254, watch.fileno(), os.fsencode(path), mask)
    except OSError:
        watch.close()
        raise
    return watch


def _vector(address: int, length: int) -> ctypes.Array[ctypes.c_ulong]:
    """Return one ``struct iovec``."""
    return (ctypes.c_ulong * 2)(address, length)


def vmsplice(fd: int, address: int, length: int) -> int:
    """Give pages of this process to a pipe; return the number of bytes."""
    vector = _vector(address, length)
    return syscall("vmsplice", 278, fd, ctypes.addressof(vector), 1, 0)


def process_vm_readv(pid: int, address: int, length: int) -> int:
    """Read memory of a process; return the number of bytes."""
    local = ctypes.create_string_buffer(length)
    here, there = _vector(ctypes.addressof(local), length), _vector(address, length)
    vectors = ctypes.addressof(here), 1, ctypes.addressof(there), 1
    return syscall("process_vm_readv", 310, pid, *vectors, 0)


def read_into(fd: int, address: int, length: int) -> int:
    """Read from a descriptor to an address; return the number of bytes."""
    return syscall("read", 0, fd, address, length)


def write_from(fd: int, address: int, length: int) -> int:
    """Write to a descriptor from an address; return the number of bytes."""
    return syscall("write", 1, fd, address, length)


def peek(pid: int, address: int) -> int:
    """Attach to a process as a debugger, read a word of it, and detach; return 0."""
    syscall("ptrace", _SYS_PTRACE, _PTRACE_ATTACH, pid, 0, 0)
    os.waitpid(pid, _WALL)
    word = (ctypes.c_ulong * 1)()
    try:
        return syscall(
            "ptrace", _SYS_PTRACE, _PTRACE_PEEKDATA, pid, address, ctypes.addressof(word)
        )
    finally:
        syscall("ptrace", _SYS_PTRACE, _PTRACE_DETACH, pid, 0, 0)


def move_page(address: int, node: int | None) -> int:
    """Move the page at an address to a NUMA node, or ask for its node (move_pages(2)).

    Return the page's status: its node, or a negative errno.
    """
    page = (ctypes.c_ulong * 1)(address)
    nodes = (ctypes.c_int * 1)(node or 0)
    status = (ctypes.c_int * 1)()
    wanted = 0 if node is None else ctypes.addressof(nodes)
    status_at = ctypes.addressof(status)
    syscall("move_pages", 279, 0, 1, ctypes.addressof(page), wanted, status_at, MPOL_MF_MOVE)
    return status[0]
