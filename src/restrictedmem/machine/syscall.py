"""Probes for memfd_restricted(2) in unmodified programs: seccomp's user notification."""

import os
import signal
from collections.abc import Iterator
from errno import EBUSY, EINVAL, ENOSYS, EPROTO
from typing import Final

from restrictedmem.abi import memory, process, seccomp
from restrictedmem.child import fork
from restrictedmem.machine.finding import Finding, State, reason
from restrictedmem.machine.memory_kinds import allocated_pages
from restrictedmem.probe import in_child

_CONSEQUENCE: Final = "unmodified programs cannot have memfd_restricted(2)"


def probe() -> Iterator[Finding]:
    """Yield the findings about the system call."""
    yield action()
    yield flag(seccomp.FilterFlag.NEW_LISTENER, "Linux 5.0 or later")
    yield flag(
        seccomp.FilterFlag.NEW_LISTENER | seccomp.FilterFlag.WAIT_KILLABLE_RECV,
        "Linux 5.19 or later",
    )
    yield answered_call()
    yield number()
    yield presence()


def action() -> Finding:
    """Ask whether the kernel has the filter's return action, and for its structs' sizes."""
    name = "user notification"
    try:
        if not seccomp.action_available(seccomp.SECCOMP_RET_USER_NOTIF):
            return Finding(
                name,
                State.NO,
                "SECCOMP_RET_USER_NOTIF is unknown",
                _CONSEQUENCE,
                "Linux 5.0 or later",
            )
        sizes = seccomp.notif_sizes()
    except OSError as error:
        return Finding(
            name, State.NO, reason(error), _CONSEQUENCE, "a kernel with CONFIG_SECCOMP_FILTER"
        )
    return Finding(
        name,
        State.YES,
        f"structs of {sizes.seccomp_notif}, {sizes.seccomp_notif_resp} and"
        f" {sizes.seccomp_data} bytes",
    )


def flag(flags: seccomp.FilterFlag, since: str) -> Finding:
    """Ask whether the kernel knows a filter flag; only WAIT_KILLABLE_RECV is optional."""
    optional = seccomp.FilterFlag.WAIT_KILLABLE_RECV in flags
    name = "WAIT_KILLABLE_RECV" if optional else "NEW_LISTENER"
    consequence = (
        "a signal can make a program repeat a call that was answered in part"
        if optional
        else _CONSEQUENCE
    )
    try:
        known = seccomp.flags_known(flags)
    except OSError:
        known = False
    return (
        Finding(name, State.YES, "known")
        if known
        else Finding(name, State.NO, "unknown", consequence, since)
    )


def answered_call() -> Finding:
    """Put a child under a filter, and answer its call of number 451 with a descriptor.

    The supervisor of ``exec`` does the same.
    """
    name = "answered call"
    try:
        in_child(_answer_one_call)
    except OSError as error:
        if error.errno == EBUSY:
            return Finding(
                name,
                State.UNKNOWN,
                "an outer filter has a listener already, such as that of restrictedmem exec",
            )
        remedy = "Linux 5.14 or later (SECCOMP_ADDFD_FLAG_SEND), and no outer listener"
        return Finding(name, State.NO, reason(error), _CONSEQUENCE, remedy)
    return Finding(
        name,
        State.YES,
        "a child's call of number 451 was answered with a descriptor (SECCOMP_ADDFD_FLAG_SEND)",
    )


def _answer_one_call() -> None:
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    program = seccomp.assemble(
        seccomp.load("arch"),
        seccomp.jump_unless(seccomp.AUDIT_ARCH.get(os.uname().machine, 0), "allow"),
        seccomp.load("nr"),
        seccomp.jump_unless(memory.SYS_memfd_restricted, "allow"),
        seccomp.ret(seccomp.SECCOMP_RET_USER_NOTIF),
        "allow",
        seccomp.ret(seccomp.SECCOMP_RET_ALLOW),
    )
    with (
        memory.memfd_create("restrictedmem-doctor") as file,
        seccomp.install(program, seccomp.FilterFlag.NEW_LISTENER) as listener,
    ):
        caller = fork(lambda: _call(os.fstat(file.fileno())))
        notification = seccomp.seccomp_notif(data=seccomp.seccomp_data())
        seccomp.SECCOMP_IOCTL_NOTIF_RECV(listener, notification)
        answer = seccomp.seccomp_notif_addfd(
            id=notification.id, flags=seccomp.SECCOMP_ADDFD_FLAG_SEND, srcfd=file.fileno()
        )
        try:
            seccomp.SECCOMP_IOCTL_NOTIF_ADDFD(listener, answer)
        except BaseException:
            os.kill(caller, signal.SIGKILL)
            raise
        _, status = os.waitpid(caller, 0)
        if status:
            raise OSError(EPROTO, "the call was answered with something else")


def _call(expected: os.stat_result) -> None:
    """Make the call, which has to return the expected file.

    Raises:
        OSError: ENOSYS without a listener; EPROTO for another file.
    """
    with memory.memfd_restricted() as came:
        if not os.path.samestat(os.fstat(came.fileno()), expected):
            raise OSError(EPROTO, "another file")


def number() -> Finding:
    """Report what the kernel itself does at number 451."""
    name = "number 451"
    try:
        in_child(allocated_pages)
    except OSError as error:
        if error.errno == ENOSYS:
            return Finding(name, State.YES, "free: the kernel has no such call")
        taken = "taken by something else" if error.errno == EINVAL else reason(error)
        return Finding(name, State.UNKNOWN, taken)
    return Finding(
        name,
        State.PARTLY,
        "cachestat(2) in this kernel",
        "under a supervisor a call of 451 with first argument 0 is memfd_restricted, so cachestat"
        " of descriptor 0 does not work",
    )


def presence() -> Finding:
    """Call memfd_restricted(2) itself."""
    name = "memfd_restricted(2)"
    try:
        memory.memfd_restricted().close()
    except OSError:
        return Finding(
            name,
            State.NO,
            "absent",
            "a program that calls it gets an error here",
            "restrictedmem exec -- PROGRAM",
        )
    return Finding(
        name, State.YES, f"present: syscall({memory.SYS_memfd_restricted}, 0) gave a descriptor"
    )
