"""<linux/seccomp.h>: filters, and notifications to a process that answers system calls."""

import ctypes
import functools
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntFlag
from errno import EFAULT, EINVAL, EOPNOTSUPP
from typing import Final, TypeVar

from restrictedmem.abi._ioctl import Dir, Ioctl
from restrictedmem.abi._struct import ZERO, c_struct, s32, s64, u8, u16, u32, u64
from restrictedmem.abi._syscall import libc, raise_errno
from restrictedmem.fd import OwnedFd

_A = TypeVar("_A", bound=ctypes.Structure)

SYS_seccomp: Final = {"x86_64": 317, "aarch64": 277}
AUDIT_ARCH: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7, "i386": 0x4000_0003}
#: The bit that marks an x32 call (__X32_SYSCALL_BIT), whose architecture is x86-64's.
X32_BIT: Final = 0x4000_0000

SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_GET_ACTION_AVAIL: Final = 2
SECCOMP_GET_NOTIF_SIZES: Final = 3

SECCOMP_RET_ERRNO: Final = 0x0005_0000
SECCOMP_RET_USER_NOTIF: Final = 0x7FC0_0000
SECCOMP_RET_ALLOW: Final = 0x7FFF_0000

SECCOMP_USER_NOTIF_FLAG_CONTINUE: Final = 1 << 0
SECCOMP_ADDFD_FLAG_SEND: Final = 1 << 1
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: Final = 1 << 0

_BPF_LD_W_ABS: Final = 0x20
_BPF_JMP_JEQ_K: Final = 0x15
_BPF_JMP_JSET_K: Final = 0x45
_BPF_ALU_AND_K: Final = 0x54
_BPF_RET_K: Final = 0x06
#: The most instructions that a conditional jump can skip.
_FARTHEST: Final = 255


class FilterFlag(IntFlag):
    """``SECCOMP_FILTER_FLAG_*``."""

    NEW_LISTENER = 1 << 3
    WAIT_KILLABLE_RECV = 1 << 5


@c_struct(size=8)
class sock_filter(ctypes.Structure):
    """One instruction of classic BPF."""

    code: u16
    jt: u8 = 0
    jf: u8 = 0
    k: u32


@c_struct(size=16)
class sock_fprog(ctypes.Structure):
    """A program: its length in instructions and its address."""

    len: u16
    filter: u64


@c_struct(size=6)
class seccomp_notif_sizes(ctypes.Structure):
    """Sizes in bytes of the running kernel's structs."""

    seccomp_notif: u16 = 0
    seccomp_notif_resp: u16 = 0
    seccomp_data: u16 = 0


@c_struct(size=64)
class seccomp_data(ctypes.Structure):
    """A system call as a filter sees it."""

    nr: s32 = 0
    arch: u32 = 0
    instruction_pointer: u64 = 0
    arg0: u64 = 0
    arg1: u64 = 0
    arg2: u64 = 0
    arg3: u64 = 0
    arg4: u64 = 0
    arg5: u64 = 0


@c_struct(size=80)
class seccomp_notif(ctypes.Structure):
    """A call that waits for an answer; it must be zero when it is passed to the kernel."""

    id: u64 = 0
    pid: u32 = 0
    flags: u32 = 0
    data: seccomp_data = ZERO


@c_struct(size=8)
class _word(ctypes.Structure):
    # The kernel's header has a bare integer.
    value: u64


@c_struct(size=24)
class seccomp_notif_resp(ctypes.Structure):
    """The answer to a call.

    It is a return value, minus an errno, or SECCOMP_USER_NOTIF_FLAG_CONTINUE.
    """

    id: u64
    val: s64 = 0
    error: s32 = 0
    flags: u32 = 0


@c_struct(size=24)
class seccomp_notif_addfd(ctypes.Structure):
    """A descriptor to install in the caller.

    With SECCOMP_ADDFD_FLAG_SEND, the call returns its number.
    """

    id: u64
    flags: u32
    srcfd: u32
    newfd: u32 = 0
    newfd_flags: u32 = 0


_MAGIC: Final = ord("!")
SECCOMP_IOCTL_NOTIF_RECV: Final = Ioctl(
    "SECCOMP_IOCTL_NOTIF_RECV", _MAGIC, 0, Dir.READ | Dir.WRITE, seccomp_notif
)
SECCOMP_IOCTL_NOTIF_SEND: Final = Ioctl(
    "SECCOMP_IOCTL_NOTIF_SEND", _MAGIC, 1, Dir.READ | Dir.WRITE, seccomp_notif_resp
)
SECCOMP_IOCTL_NOTIF_ID_VALID: Final = Ioctl(
    "SECCOMP_IOCTL_NOTIF_ID_VALID", _MAGIC, 2, Dir.WRITE, _word
)
SECCOMP_IOCTL_NOTIF_ADDFD: Final = Ioctl(
    "SECCOMP_IOCTL_NOTIF_ADDFD", _MAGIC, 3, Dir.WRITE, seccomp_notif_addfd
)
SECCOMP_IOCTL_NOTIF_SET_FLAGS: Final = Ioctl(
    "SECCOMP_IOCTL_NOTIF_SET_FLAGS", _MAGIC, 4, Dir.WRITE, _word
)


def _seccomp(
    operation: int, flags: int, argument: ctypes.Structure | ctypes.c_uint32 | None
) -> int:
    # The number -1 gives ENOSYS, which is right for a machine whose number is not known here.
    number = ctypes.c_long(SYS_seccomp.get(os.uname().machine, -1))
    pointer = None if argument is None else ctypes.byref(argument)
    result: int = libc.syscall(number, ctypes.c_long(operation), ctypes.c_long(flags), pointer)
    if result < 0:
        raise_errno("seccomp")
    return result


def action_available(action: int) -> bool:
    """Say whether the kernel knows a filter's return action (SECCOMP_GET_ACTION_AVAIL).

    Raises:
        OSError: ENOSYS without seccomp; EINVAL before Linux 4.14.
    """
    try:
        _seccomp(SECCOMP_GET_ACTION_AVAIL, 0, ctypes.c_uint32(action))
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            raise
        return False
    return True


def notif_sizes() -> seccomp_notif_sizes:
    """Return the sizes of the notification structs in the running kernel (SECCOMP_GET_NOTIF_SIZES).

    Raises:
        OSError: EINVAL before Linux 5.0.
    """
    sizes = seccomp_notif_sizes()
    _seccomp(SECCOMP_GET_NOTIF_SIZES, 0, sizes)
    return sizes


def flags_known(flags: FilterFlag) -> bool:
    """Say whether the kernel knows the flags, without installing a filter.

    The kernel checks flags before it reads the program. So a null program gives EFAULT if the flags
    are known (seccomp(2)).

    Raises:
        OSError: ENOSYS without seccomp.
    """
    try:
        _seccomp(SECCOMP_SET_MODE_FILTER, flags, None)
    except OSError as error:
        if error.errno not in (EFAULT, EINVAL):
            raise
        return error.errno == EFAULT
    raise AssertionError("seccomp took a filter without a program")


def install(program: Sequence[sock_filter], flags: FilterFlag) -> OwnedFd:
    """Put this thread and its future children under a filter; return its listener.

    The filter is permanent. The caller owns the listener.

    Preconditions: PR_SET_NO_NEW_PRIVS or CAP_SYS_ADMIN; ``NEW_LISTENER`` among the flags.

    Raises:
        OSError: EACCES without the precondition; EBUSY when an outer filter already has a listener;
            EINVAL for the program or flags.
    """
    instructions = (sock_filter * len(program))(*program)
    fprog = sock_fprog(len=len(program), filter=ctypes.addressof(instructions))
    return OwnedFd(_seccomp(SECCOMP_SET_MODE_FILTER, flags, fprog))


def _uninterrupted(request: Ioctl[_A], listener: OwnedFd, argument: _A) -> int:
    """Issue a request at a listener, and repeat it after EINTR.

    EINTR means that nothing was done: this process was stopped, frozen or traced while it waited
    for the listener's lock.
    """
    while True:
        # contextlib would be too slow, because each answer passes here.
        try:
            return request(listener, argument)
        except InterruptedError:
            continue


def respond(listener: OwnedFd, call: int, error: int = 0, flags: int = 0, value: int = 0) -> None:
    """Answer a call, by its notification's id, with a value or an errno, if it still waits."""
    with suppress(FileNotFoundError):
        answer = seccomp_notif_resp(id=call, val=value, error=-error, flags=flags)
        _uninterrupted(SECCOMP_IOCTL_NOTIF_SEND, listener, answer)


def give(listener: OwnedFd, call: int, fd: OwnedFd) -> None:
    """Put a copy of a descriptor into a caller, and answer its call with the number.

    Wait until the caller has run. If only a fatal signal ends a caller's wait (WAIT_KILLABLE_RECV),
    the copy and the answer are two steps. As one step (SECCOMP_ADDFD_FLAG_SEND), the call would
    return 0 without a descriptor if this process was stopped, frozen or killed meanwhile. In this
    case seccomp_notify_addfd() takes the descriptor back, but leaves the call answered. On older
    kernels a signal to the caller could come between two steps, so one step is used there.

    Raises:
        OSError: ENOENT when the call waits no more; EMFILE when the caller's table is full.
    """
    gift = seccomp_notif_addfd(id=call, flags=0, srcfd=fd.fileno())
    if _waits_killably():
        respond(listener, call, value=_uninterrupted(SECCOMP_IOCTL_NOTIF_ADDFD, listener, gift))
    else:
        gift.flags = SECCOMP_ADDFD_FLAG_SEND
        _uninterrupted(SECCOMP_IOCTL_NOTIF_ADDFD, listener, gift)


@functools.cache
def _waits_killably() -> bool:
    """Say whether filters are installed with WAIT_KILLABLE_RECV, which needs Linux 5.19."""
    return flags_known(FilterFlag.NEW_LISTENER | FilterFlag.WAIT_KILLABLE_RECV)


def check_waiting(listener: OwnedFd, notification: seccomp_notif) -> None:
    """Check that a call still waits for its answer.

    If it does, files of its caller that were opened before are really the caller's.

    Raises:
        OSError: ENOENT when it does not.
    """
    _uninterrupted(SECCOMP_IOCTL_NOTIF_ID_VALID, listener, _word(value=notification.id))


def wake_up_synchronously(listener: OwnedFd) -> None:
    """Have callers and this process run in turn on one processor, which is faster for both.

    Before Linux 6.6 this does nothing.

    Raises:
        OSError: EBADF.
    """
    try:
        SECCOMP_IOCTL_NOTIF_SET_FLAGS(listener, _word(value=SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP))
    except OSError as error:
        if error.errno != EINVAL:
            raise


# The instructions of a filter, and their assembly.


def load(field: str) -> sock_filter:
    """Load the low 32 bits of a field of ``struct seccomp_data``."""
    return sock_filter(code=_BPF_LD_W_ABS, k=getattr(seccomp_data, field).offset)


def keep(bits: int) -> sock_filter:
    """Clear all other bits of the loaded value."""
    return sock_filter(code=_BPF_ALU_AND_K, k=bits)


def ret(action: int) -> sock_filter:
    """End the filter with an action."""
    return sock_filter(code=_BPF_RET_K, k=action)


@dataclass(frozen=True, slots=True)
class Jump:
    """A conditional jump to a label; ``assemble`` computes the distance."""

    code: int
    k: int
    target: str
    #: Whether it jumps if the condition holds (True) or if it does not.
    when: bool


def jump_unless(value: int, target: str) -> Jump:
    """Jump unless the loaded value equals ``value``."""
    return Jump(_BPF_JMP_JEQ_K, value, target, when=False)


def jump_if_any(bits: int, target: str) -> Jump:
    """Jump if the loaded value has any of some bits."""
    return Jump(_BPF_JMP_JSET_K, bits, target, when=True)


def assemble(*lines: sock_filter | Jump | str) -> list[sock_filter]:
    """Return the instructions with every jump resolved; a string labels the next instruction.

    Jumps are relative, so the instructions may become part of a larger program.

    Raises:
        KeyError: for a label that does not exist.
        ValueError: for a label before the jump, or more than 255 instructions after it.
    """
    labels: dict[str, int] = {}
    found: list[sock_filter | Jump] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(found)
        else:
            found.append(line)
    return [
        _resolved(line, labels[line.target] - at - 1) if isinstance(line, Jump) else line
        for at, line in enumerate(found)
    ]


def _resolved(jump: Jump, distance: int) -> sock_filter:
    # ctypes would truncate the distance.
    if not 0 <= distance <= _FARTHEST:
        raise ValueError(f"{jump.target!r} is {distance} instructions away")
    jt, jf = (distance, 0) if jump.when else (0, distance)
    return sock_filter(code=jump.code, jt=jt, jf=jf, k=jump.k)
