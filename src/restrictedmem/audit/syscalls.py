"""System calls that look into another process or a file, and that the standard library lacks.

The numbers are those of x86-64.
"""

import ctypes
import mmap
import os
import struct
from typing import Final

from restrictedmem.abi._syscall import libc, raise_errno, syscall
from restrictedmem.fd import OwnedFd

PTRACE_DETACH: Final = 17
PTRACE_ATTACH: Final = 16
PTRACE_SEIZE: Final = 0x4206
#: __WALL of waitpid(2).
WALL: Final = 0x4000_0000
_SYS_KCMP: Final = 312
_SYS_BPF: Final = 321
_SYS_MOVE_PAGES: Final = 279
_SYS_PERF_EVENT_OPEN: Final = 298
_SYS_GET_ROBUST_LIST: Final = 274
_SYS_IO_URING_SETUP: Final = 425
_SYS_IO_URING_ENTER: Final = 426
_SYS_PIDFD_GETFD: Final = 438
_SYS_PROCESS_MADVISE: Final = 440
_MADV_PAGEOUT: Final = 21
_AT_FDCWD: Final = -100
_AT_SYMLINK_FOLLOW: Final = 0x400
_FD_NSFS_ROOT: Final = -10003
#: ``struct file_handle`` (bytes, type) with ``struct nsfs_file_handle`` (number, CLONE_NEW*, inode
#: number).
_NAMESPACE: Final = struct.Struct("=IiQII")
_NAMESPACE_BYTES: Final = 16
_FILEID_NSFS: Final = 0xF1
_BPF_PROG_LOAD: Final = 5
_BPF_PROG_TYPE_KPROBE: Final = 2

libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
libc.process_vm_readv.restype = ctypes.c_ssize_t
libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]


class _iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def process_vm_readv(pid: int, address: int, length: int) -> bytes:
    """Read ``length`` bytes of another process's memory (process_vm_readv(2)).

    Raises:
        OSError: EPERM if the caller may not; EFAULT where nothing is mapped.
    """
    buffer = ctypes.create_string_buffer(length)
    local, remote = _iovec(ctypes.addressof(buffer), length), _iovec(address, length)
    count: int = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count < 0:
        raise_errno("process_vm_readv")
    return buffer.raw[:count]


def ptrace(request: int, pid: int) -> None:
    """Call ptrace(2) without address and data.

    Raises:
        OSError: EPERM if the caller may not trace the process.
    """
    if libc.ptrace(request, pid, None, None) < 0:
        raise_errno("ptrace")


def pidfd_getfd(pid: int, number: int) -> OwnedFd:
    """Duplicate another process's descriptor (pidfd_getfd(2)); the caller owns the duplicate.

    Raises:
        OSError: EPERM if the caller may not; EBADF for a number that is not open there.
    """
    with OwnedFd(os.pidfd_open(pid)) as pidfd:
        return OwnedFd(syscall("pidfd_getfd", _SYS_PIDFD_GETFD, pidfd.fileno(), number, 0))


def namespace_handle(path: str) -> tuple[int, int]:
    """Return the number and the inode number by which a namespace can be opened (Linux 6.18).

    Raises:
        OSError: EOPNOTSUPP on older kernels.
    """
    handle, mount = (
        ctypes.create_string_buffer(_NAMESPACE.pack(_NAMESPACE_BYTES, 0, 0, 0, 0)),
        ctypes.c_int(),
    )
    if libc.name_to_handle_at(
        _AT_FDCWD, path.encode(), handle, ctypes.byref(mount), _AT_SYMLINK_FOLLOW
    ):
        raise_errno("name_to_handle_at")
    _, _, number, _, inode = _NAMESPACE.unpack(handle.raw[: _NAMESPACE.size])
    return number, inode


def open_namespace(number: int, kind: int, inode: int) -> OwnedFd | None:
    """Open a namespace by its handle (open_by_handle_at(2), Linux 6.18).

    The caller owns the descriptor. The result is None, and not an error, if no namespace has these
    numbers or it is another user's, because callers try a great many numbers.
    """
    handle = _NAMESPACE.pack(_NAMESPACE_BYTES, _FILEID_NSFS, number, kind, inode)
    fd: int = libc.open_by_handle_at(_FD_NSFS_ROOT, handle, os.O_RDONLY | os.O_CLOEXEC)
    return OwnedFd(fd) if fd >= 0 else None


def setns(pid: int, kind: int) -> None:
    """Join a namespace of another process (setns(2) with a pidfd).

    Raises:
        OSError: EPERM if the caller may not.
    """
    with OwnedFd(os.pidfd_open(pid)) as pidfd:
        if libc.setns(pidfd.fileno(), kind):
            raise_errno("setns")


def kcmp(pid: int) -> int:
    """Compare descriptor 0 of another process with our own (kcmp(2), KCMP_FILE).

    Raises:
        OSError: EPERM if the caller may not look into the process.
    """
    return syscall("kcmp", _SYS_KCMP, os.getpid(), pid, 0, 0, 0)


def move_pages(pid: int) -> int:
    """Call move_pages(2) on another process with no page, as a test of permission.

    Raises:
        OSError: EPERM if the caller may not look into the process.
    """
    return syscall("move_pages", _SYS_MOVE_PAGES, pid, 0, b"", b"", b"", 0)


def get_robust_list(pid: int) -> int:
    """Ask for the address of another process's list of robust futexes (get_robust_list(2)).

    Raises:
        OSError: EPERM if the caller may not look into the process.
    """
    return syscall("get_robust_list", _SYS_GET_ROBUST_LIST, pid, bytes(8), bytes(8))


def process_madvise(pid: int, address: int) -> int:
    """Ask the kernel to swap out a page of another process (process_madvise(2), MADV_PAGEOUT).

    Raises:
        OSError: EPERM if the caller may not.
    """
    with OwnedFd(os.pidfd_open(pid)) as pidfd:
        vector = bytes(_iovec(address, mmap.PAGESIZE))
        return syscall(
            "process_madvise", _SYS_PROCESS_MADVISE, pidfd.fileno(), vector, 1, _MADV_PAGEOUT, 0
        )


def perf_event_open(pid: int, cpu: int = -1) -> OwnedFd:
    """Sample another process, or a whole CPU if ``pid`` is -1 (perf_event_open(2)).

    The event is the task clock in user space. The caller owns the descriptor.

    Raises:
        OSError: EACCES or EPERM if the caller may not.
    """
    # struct perf_event_attr: PERF_TYPE_SOFTWARE, its size, PERF_COUNT_SW_TASK_CLOCK; exclude_kernel
    # and exclude_hv at byte 40.
    attr = struct.pack("=IIQ24xQ16x", 1, 64, 1, 0x60)
    return OwnedFd(syscall("perf_event_open", _SYS_PERF_EVENT_OPEN, attr, pid, cpu, -1, 0))


def bpf_prog_load() -> OwnedFd:
    """Load a program for a kprobe that returns 0 (bpf(2)); the caller owns the descriptor.

    Raises:
        OSError: EPERM without CAP_BPF and CAP_PERFMON.
    """
    # r0 = 0; exit
    program = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))
    text = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQ", _BPF_PROG_TYPE_KPROBE, 2, ctypes.addressof(program), ctypes.addressof(text)
    )
    return OwnedFd(syscall("bpf", _SYS_BPF, _BPF_PROG_LOAD, attr, len(attr)))


_URING_RING_AT: Final = 0
_URING_SQES_AT: Final = 0x1000_0000
_URING_PARAMS: Final = 120
_URING_OP_READ: Final = 22
_URING_GETEVENTS: Final = 1
_SQE: Final = struct.Struct("=BBHiQQIIQ24x")
_CQE: Final = struct.Struct("=QiI")


def io_uring_read(fd: int, length: int) -> bytes:
    """Read the first bytes of a file by a ring (io_uring_enter(2), IORING_OP_READ).

    Raises:
        OSError: the error of the read; EPERM where rings are forbidden
            (kernel.io_uring_disabled).
    """
    params = ctypes.create_string_buffer(_URING_PARAMS)
    into = ctypes.create_string_buffer(length)
    with OwnedFd(
        syscall("io_uring_setup", _SYS_IO_URING_SETUP, 1, ctypes.addressof(params))
    ) as ring:
        entries, cq_entries = struct.unpack_from("=II", params)
        # struct io_sqring_offsets at byte 40 and io_cqring_offsets at byte 80 (<linux/io_uring.h>).
        _, sq_tail, _, _, _, _, sq_array = struct.unpack_from("=7I", params, 40)
        _, _, _, _, _, cqes = struct.unpack_from("=6I", params, 80)
        rings = mmap.mmap(
            ring.fileno(),
            max(sq_array + 4 * entries, cqes + _CQE.size * cq_entries),
            offset=_URING_RING_AT,
        )
        with rings, mmap.mmap(ring.fileno(), _SQE.size * entries, offset=_URING_SQES_AT) as sqes:
            _SQE.pack_into(
                sqes, 0, _URING_OP_READ, 0, 0, fd, 0, ctypes.addressof(into), length, 0, 0
            )
            struct.pack_into("=I", rings, sq_array, 0)
            struct.pack_into("=I", rings, sq_tail, 1)
            # Without a signal mask the kernel does not look at its size.
            syscall(
                "io_uring_enter", _SYS_IO_URING_ENTER, ring.fileno(), 1, 1, _URING_GETEVENTS, None
            )
            _, result, _ = _CQE.unpack_from(rings, cqes)
    if result < 0:
        raise_errno("io_uring read", -result)
    return into.raw[:result]
