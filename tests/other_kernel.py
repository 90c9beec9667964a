"""Other kernels, as far as a filter can imitate them.

``other_kernel.py KIND PROGRAM [ARG…]`` runs a program, and all that it starts, under such a kernel.

- ``old`` is Linux 5.16: newer calls fail as that kernel makes them fail. The answers of /dev/fuse
  and /dev/kvm themselves stay.
- ``broken-kvm`` has all of KVM, but no guest runs: KVM_RUN is EFAULT.
- ``stuck-kvm`` has all of KVM, but KVM_RUN never returns.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from errno import EFAULT, EINVAL, ENOSYS, ENOTTY
from pathlib import Path

from restrictedmem.abi import memory, pagemap, process, seccomp
from restrictedmem.abi._syscall import libc
from restrictedmem.abi.seccomp import (
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_USER_NOTIF,
    FilterFlag,
    sock_filter,
)

_RUN = [sys.executable, str(Path(__file__).resolve())]
#: Prefixes of a command.
OLD, BROKEN_KVM, STUCK_KVM = ([*_RUN, kind] for kind in ("old", "broken-kvm", "stuck-kvm"))

_LAST_CALL = 449  # futex_waitv, of Linux 5.16
_MEMFD_CREATE, _MADVISE, _IOCTL = 319, 28, 16
_SECCOMP = seccomp.SYS_seccomp["x86_64"]
_KVM_RUN = 0xAE80
_JUMP_IF_ABOVE = 0x25  # BPF_JMP | BPF_JGT | BPF_K


def _refuse(error: int) -> sock_filter:
    return seccomp.ret(SECCOMP_RET_ERRNO | error)


def _refuse_flag(number: int, argument: str, flag: int, error: int) -> list[sock_filter]:
    return seccomp.assemble(
        seccomp.jump_unless(number, "another call"),
        seccomp.load(argument),
        seccomp.jump_if_any(flag, "refuse"),
        seccomp.ret(SECCOMP_RET_ALLOW),
        "refuse",
        _refuse(error),
        "another call",
    )


def _answer_value(number: int, argument: str, value: int, answer: sock_filter) -> list[sock_filter]:
    return seccomp.assemble(
        seccomp.jump_unless(number, "another call"),
        seccomp.load(argument),
        seccomp.jump_unless(value, "another value"),
        answer,
        "another value",
        seccomp.ret(SECCOMP_RET_ALLOW),
        "another call",
    )


def _native(*rules: sock_filter) -> list[sock_filter]:
    """Let all but x86-64's own calls through, and put the rules to the number of each of those."""
    return seccomp.assemble(
        seccomp.load("arch"),
        seccomp.jump_unless(seccomp.AUDIT_ARCH["x86_64"], "allow"),
        seccomp.load("nr"),
        *rules,
        "allow",
        seccomp.ret(SECCOMP_RET_ALLOW),
    )


def _old() -> Sequence[sock_filter]:
    return _native(
        *_refuse_flag(_MEMFD_CREATE, "arg1", memory.MFD_NOEXEC_SEAL, EINVAL),  # 6.3
        *_answer_value(_MADVISE, "arg2", memory.MADV_COLLAPSE, _refuse(EINVAL)),  # 6.1
        *_answer_value(_IOCTL, "arg1", pagemap.PAGEMAP_SCAN.request, _refuse(ENOTTY)),  # 6.7
        *_refuse_flag(_SECCOMP, "arg1", FilterFlag.WAIT_KILLABLE_RECV, EINVAL),  # 5.19
        # cachestat (6.5), statmount, mseal and all others.
        sock_filter(code=_JUMP_IF_ABOVE, jf=1, k=_LAST_CALL),
        _refuse(ENOSYS),
    )


def _kvm_run(answer: sock_filter) -> Sequence[sock_filter]:
    return _native(*_answer_value(_IOCTL, "arg1", _KVM_RUN, answer))


def _install(program: Sequence[sock_filter]) -> None:
    instructions = (sock_filter * len(program))(*program)
    fprog = seccomp.sock_fprog(len=len(program), filter=ctypes.addressof(instructions))
    mode, flags = ctypes.c_long(seccomp.SECCOMP_SET_MODE_FILTER), ctypes.c_long(0)
    if libc.syscall(ctypes.c_long(_SECCOMP), mode, flags, ctypes.byref(fprog)):
        raise OSError(ctypes.get_errno(), "seccomp")


def main(kind: str, command: list[str]) -> None:
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    match kind:
        case "old":
            _install(_old())
        case "broken-kvm":
            _install(_kvm_run(_refuse(EFAULT)))
        case _:
            # Nobody answers while this process is there to listen.
            with seccomp.install(
                _kvm_run(seccomp.ret(SECCOMP_RET_USER_NOTIF)), FilterFlag.NEW_LISTENER
            ):
                sys.exit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
