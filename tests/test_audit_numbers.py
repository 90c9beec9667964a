"""The numbers with which an attempt calls the kernel.

With a wrong number the kernel would refuse the attempt, and it would prove nothing.
"""

from typing import Final

import pytest

from restrictedmem import fd
from restrictedmem.audit import attacker, held_guest, syscalls
from restrictedmem.kvm import half
from restrictedmem.mm import sequence

#: arch/x86/entry/syscalls/syscall_64.tbl, and the headers in brackets.
NUMBERS: Final[dict[object, dict[str, int]]] = {
    syscalls: {
        "_SYS_GET_ROBUST_LIST": 274,
        "_SYS_MOVE_PAGES": 279,
        "_SYS_PERF_EVENT_OPEN": 298,
        "_SYS_KCMP": 312,
        "_SYS_BPF": 321,
        "_SYS_IO_URING_SETUP": 425,
        "_SYS_IO_URING_ENTER": 426,
        "_SYS_PIDFD_GETFD": 438,
        "_SYS_PROCESS_MADVISE": 440,
        # <linux/ptrace.h>, <linux/wait.h>
        "PTRACE_ATTACH": 16,
        "PTRACE_DETACH": 17,
        "PTRACE_SEIZE": 0x4206,
        "WALL": 0x40000000,
        # <linux/fcntl.h>, <linux/exportfs.h>, <linux/nsfs.h>
        "_AT_FDCWD": -100,
        "_AT_SYMLINK_FOLLOW": 0x400,
        "_FD_NSFS_ROOT": -10003,
        "_FILEID_NSFS": 0xF1,
        "_NAMESPACE_BYTES": 16,
        # <linux/mman.h>, <linux/bpf.h>
        "_MADV_PAGEOUT": 21,
        "_BPF_PROG_LOAD": 5,
        "_BPF_PROG_TYPE_KPROBE": 2,
        # <linux/io_uring.h>
        "_URING_RING_AT": 0,
        "_URING_SQES_AT": 0x10000000,
        "_URING_PARAMS": 120,
        "_URING_OP_READ": 22,
        "_URING_GETEVENTS": 1,
    },
    # <linux/prctl.h>
    attacker: {"_PR_CAPBSET_DROP": 24, "_PR_CAP_AMBIENT": 47, "_PR_CAP_AMBIENT_CLEAR_ALL": 4},
    held_guest: {"_SYS_POLL": 7},
    # <asm-generic/socket.h>
    fd: {"_SO_PEERPIDFD": 77, "_SO_PASSRIGHTS": 83},
    # <linux/fcntl.h>
    half: {"_F_ADD_SEALS": 1033, "_F_GET_SEALS": 1034, "_F_SEAL_SHRINK": 2},
    sequence: {"_F_SEAL_FUTURE_WRITE": 16},
}


@pytest.mark.parametrize("module", NUMBERS)
def test_numbers_are_the_kernels(module: object) -> None:
    wanted = NUMBERS[module]
    assert {name: getattr(module, name) for name in wanted} == wanted


def test_no_number_is_left_out() -> None:
    found = {
        name for name, value in vars(syscalls).items() if isinstance(value, int) and name.isupper()
    }
    assert found == set(NUMBERS[syscalls])
