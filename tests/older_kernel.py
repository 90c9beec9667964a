"""Linux 5.16, as far as a filter can make it of a newer one: ``older_kernel.py PROGRAM [ARG…]`` runs a program, and all that it starts.

What came later is refused as that kernel refuses it. What only /dev/fuse or /dev/kvm say of themselves stays as it is.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from errno import EINVAL, ENOSYS, ENOTTY
from pathlib import Path

from restrictedmem.abi import memory, pagemap, process, seccomp
from restrictedmem.abi._syscall import libc
from restrictedmem.abi.seccomp import SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, FilterFlag, sock_filter

#: What to put before a command.
OLDER = [sys.executable, str(Path(__file__).resolve())]

_LAST_CALL = 449  # futex_waitv, of Linux 5.16
_MEMFD_CREATE, _MADVISE, _IOCTL = 319, 28, 16
_SECCOMP = seccomp.SYS_seccomp["x86_64"]
_JUMP_IF_ABOVE = 0x25  # BPF_JMP | BPF_JGT | BPF_K


def _refuse(error: int) -> sock_filter:
    return seccomp.answer(SECCOMP_RET_ERRNO | error)


def _refuse_flag(number: int, argument: str, flag: int, error: int) -> list[sock_filter]:
    allow = seccomp.answer(SECCOMP_RET_ALLOW)
    return [seccomp.skip_unless(number, 4), seccomp.load(argument), seccomp.skip_if_any(flag, 1), allow, _refuse(error)]


def _refuse_value(number: int, argument: str, value: int, error: int) -> list[sock_filter]:
    allow = seccomp.answer(SECCOMP_RET_ALLOW)
    return [seccomp.skip_unless(number, 4), seccomp.load(argument), seccomp.skip_unless(value, 1), _refuse(error), allow]


def _filter() -> Sequence[sock_filter]:
    allow = seccomp.answer(SECCOMP_RET_ALLOW)
    return [
        seccomp.load("arch"),
        sock_filter(code=0x15, jt=1, k=seccomp.AUDIT_ARCH["x86_64"]),
        allow,
        seccomp.load("nr"),
        *_refuse_flag(_MEMFD_CREATE, "arg1", memory.MFD_NOEXEC_SEAL, EINVAL),  # 6.3
        *_refuse_value(_MADVISE, "arg2", memory.MADV_COLLAPSE, EINVAL),  # 6.1
        *_refuse_value(_IOCTL, "arg1", pagemap.PAGEMAP_SCAN.request, ENOTTY),  # 6.7
        *_refuse_flag(_SECCOMP, "arg1", FilterFlag.WAIT_KILLABLE_RECV, EINVAL),  # 5.19
        # cachestat (6.5), statmount, mseal and all others.
        sock_filter(code=_JUMP_IF_ABOVE, jf=1, k=_LAST_CALL),
        _refuse(ENOSYS),
        allow,
    ]


def become_older() -> None:
    """Put this process under the filter, for good."""
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    program = _filter()
    instructions = (sock_filter * len(program))(*program)
    fprog = seccomp.sock_fprog(len=len(program), filter=ctypes.addressof(instructions))
    mode, flags = ctypes.c_long(seccomp.SECCOMP_SET_MODE_FILTER), ctypes.c_long(0)
    if libc.syscall(ctypes.c_long(_SECCOMP), mode, flags, ctypes.byref(fprog)):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    become_older()
    os.execv(sys.argv[1], sys.argv[1:])
