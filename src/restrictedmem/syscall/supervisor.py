"""The process that answers the calls which a filter stops.

It answers for all processes under the filter until the last of them has ended. It waits for nobody
meanwhile. Other processes do the work that may have to wait: the porter has the service, and scouts
look into programs.

The supervisor trusts nothing that it reads of a process, from its memory or from /proc. By the time
of use that may have changed, or be another process's. So a descriptor is given for the flags in the
notification alone. The kernel checks once more each call that is let through to it. Before a byte
is written, the supervisor knows that the process still waits. If that process is gone and another
of its number was looked at, the kernel refuses the answer, because nobody waits for it.
"""

import mmap
import os
import select
import struct
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from errno import EAGAIN, EINTR, EINVAL, EIO, EMFILE, ENFILE, ENODEV, ENOENT, ENOMEM
from typing import Final, final

from restrictedmem.abi.memory import RMFD_HUGEPAGE
from restrictedmem.abi.seccomp import (
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
    check_waiting,
    respond,
    seccomp_data,
    seccomp_notif,
    wake_up_synchronously,
)
from restrictedmem.fd import OwnedFd
from restrictedmem.syscall.filter import MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_HUGETLB, Table
from restrictedmem.syscall.porter import Porter
from restrictedmem.syscall.scout import Question, Scout
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

#: ``RESTRICTEDMEM_MAGIC`` of v9 and v10: "RESM".
RESTRICTEDMEM_MAGIC: Final = 0x5245_534D

#: Most calls that are looked into at the same time. For a further one, the oldest is given up.
_SCOUTS: Final = 64
#: Scouts that are kept for the next call.
_IDLE: Final = 4
#: Milliseconds to wait for a busy scout before there is another. An answer takes a hundredth of
#: that, a new scout half of it.
_PATIENCE: Final = 2
#: Milliseconds without other work, after which the supervisor looks for calls under way whose
#: callers were killed.
_SWEEP: Final = 1000

_U32: Final = 0xFFFF_FFFF
# struct statfs of 64-bit machines; that of i386; and i386's statfs64, which is packed there.
_STATFS: Final = struct.Struct("=7q2i7q")
_STATFS_I386: Final = struct.Struct("=2i5I2i7i")
_STATFS64_I386: Final = struct.Struct("=2I5Q2i7I")

#: Bytes of the addresses that programs have on x86-64 (TASK_SIZE), and of those that a program can
#: ask for with five levels of page tables.
_USUAL: Final = (1 << 47) - PAGE_SIZE
_FIVE_LEVELS: Final = (1 << 56) - PAGE_SIZE

#: The steps of a call. They yield questions to its scout and are sent the answers, until they
#: return (0) or raise.
_Steps = Generator[Question, bool, None]


class _Continue(Exception):  # noqa: N818 not an error
    """The kernel should do the call as if nobody had looked."""


@dataclass(slots=True)
class _Call:
    """A call that a scout looks into."""

    notification: seccomp_notif
    steps: _Steps
    scout: Scout


@final
class Supervisor:
    """One filter's listener, and the processes that work for it."""

    def __init__(
        self,
        listener: OwnedFd,
        porter: Porter,
        proc: OwnedFd,
        tables: tuple[Table, ...],
        number: int,
        *,
        cachestat: bool,
    ) -> None:
        """Answer for ``listener``, with descriptors that ``porter`` makes.

        Scouts look into programs by way of ``proc`` (``abi.process``). With ``cachestat``, a call
        of the number that cannot be memfd_restricted's may be cachestat's.
        """
        self._listener = listener
        self._porter = porter
        self._proc = proc
        self._tables = {table.arch: table for table in tables}
        self._number = number
        self._cachestat = cachestat
        self._poll = select.poll()
        #: Polls the scouts alone, even idle ones: to take one out and in again costs more.
        self._scouts = select.poll()
        #: By the number of their scout's socket, the oldest first.
        self._calls: dict[int, _Call] = {}
        self._idle: list[Scout] = []
        #: Pids of processes that were killed, and are to be reaped.
        self._killed: set[int] = set()

    def run(self) -> None:
        """Answer until no process is left under the filter, or the porter is gone.

        Without the porter there are no descriptors.
        """
        wake_up_synchronously(self._listener)
        self._poll.register(self._listener.fileno(), select.POLLIN)
        # The porter says nothing. But poll always reports that it is gone.
        self._poll.register(self._porter.fileno(), 0)
        # Programs may use up all processes that there may be.
        with suppress(OSError):
            self._idle.append(self._new_scout())
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Wait, and serve what comes.

        Returns false when no process is left, or the porter is gone.
        """
        waits = self._calls or self._killed
        found = self._poll.poll(_SWEEP if waits else None)
        if waits and not found:
            self._sweep()
        for fd, events in found:
            if fd == self._listener.fileno():
                if events & select.POLLHUP:
                    return False
                # POLLERR alone: this process was stopped while it waited for the listener's lock.
                if events & select.POLLIN:
                    self._hear()
            elif fd == self._porter.fileno():
                return False
            else:
                self._go_on(fd)
        return True

    def _hear(self) -> None:
        notification = seccomp_notif()
        try:
            SECCOMP_IOCTL_NOTIF_RECV(self._listener, notification)
        except OSError as error:
            # The caller was killed before its call was received.
            if error.errno in (ENOENT, EINTR):
                return
            raise
        data, table = notification.data, self._tables[notification.data.arch]
        if data.nr == self._number:
            flags = data.arg0 & _U32
            if flags & ~RMFD_HUGEPAGE:
                self._begin(notification, self._pass_cachestat(notification))
            else:
                self._ask_porter(notification.id, flags)
        elif not self._porter.device:
            # No process has a descriptor yet.
            respond(self._listener, notification.id, flags=SECCOMP_USER_NOTIF_FLAG_CONTINUE)
        elif data.nr == table.mmap and _is_refused_anyway(data, table):
            respond(self._listener, notification.id, flags=SECCOMP_USER_NOTIF_FLAG_CONTINUE)
        elif data.nr == table.mmap:
            self._begin(
                notification,
                self._refuse_mmap(notification, "is_restricted", notification.data.arg4),
            )
        elif data.nr == table.old_mmap:
            self._begin(
                notification,
                self._refuse_mmap(notification, "is_mapped_privately", notification.data.arg0),
            )
        else:
            self._begin(notification, self._tell_file_system(notification, table))

    def _ask_porter(self, call: int, flags: int) -> None:
        try:
            self._porter.ask(call, flags)
        except OSError as error:
            respond(self._listener, call, error.errno or EIO)

    # Calls that are looked into.

    def _begin(self, notification: seccomp_notif, steps: _Steps) -> None:
        question = self._step(notification, steps, None)
        if question is None:
            return
        if len(self._calls) == _SCOUTS:
            self._give_up(next(iter(self._calls.values())))
        try:
            scout = self._sent_out(question)
        except OSError as error:
            self._step(notification, steps, error)
        else:
            self._calls[scout.fileno()] = _Call(notification, steps, scout)

    def _sent_out(self, question: Question) -> Scout:
        if self._calls and not self._idle:
            for fd, _ in self._scouts.poll(_PATIENCE):
                self._go_on(fd)
        while self._idle:
            scout = self._idle.pop()
            try:
                scout.ask(question)
            except BrokenPipeError:
                self._kill(scout)
            else:
                return scout
        # All scouts are busy. Some may work for callers that are gone.
        self._sweep()
        scout = self._new_scout()
        try:
            scout.ask(question)
        except OSError:
            self._kill(scout)
            raise
        return scout

    def _new_scout(self) -> Scout:
        scout = Scout(self._proc)
        for poll in (self._poll, self._scouts):
            poll.register(scout.fileno(), select.POLLIN)
        return scout

    def _go_on(self, fd: int) -> None:
        call = self._calls.get(fd)
        if call is None:
            # An idle scout has ended, or a scout that was killed a moment ago had an answer.
            for scout in [scout for scout in self._idle if scout.fileno() == fd]:
                self._idle.remove(scout)
                self._kill(scout)
            return
        try:
            answer: bool | OSError = call.scout.answer()
        except BlockingIOError:
            # The event was another scout's, of the same number, which has ended since.
            return
        except OSError as error:
            answer = error
        question = self._step(call.notification, call.steps, answer)
        if question is not None:
            # If the scout has ended, the next event says so.
            with suppress(BrokenPipeError):
                call.scout.ask(question)
            return
        del self._calls[fd]
        if len(self._idle) < _IDLE:
            self._idle.append(call.scout)
        else:
            self._kill(call.scout)

    def _step(
        self, notification: seccomp_notif, steps: _Steps, answer: bool | OSError | None
    ) -> Question | None:
        """Take a call's next step; return its next question, or None if the call was answered.

        ``answer`` is the answer to its last question, or the error of that.
        """
        try:
            if isinstance(answer, OSError):
                return steps.throw(answer)
            return next(steps) if answer is None else steps.send(answer)
        except StopIteration:
            respond(self._listener, notification.id)
        except _Continue:
            respond(self._listener, notification.id, flags=SECCOMP_USER_NOTIF_FLAG_CONTINUE)
        except OSError as error:
            respond(self._listener, notification.id, error.errno or EIO)
        return None

    def _give_up(self, call: _Call) -> None:
        """Answer a call without further questions."""
        del self._calls[call.scout.fileno()]
        self._kill(call.scout)
        question = self._step(call.notification, call.steps, OSError(EIO, "given up"))
        assert question is None

    def _kill(self, scout: Scout) -> None:
        for poll in (self._poll, self._scouts):
            poll.unregister(scout.fileno())
        scout.kill()
        self._killed.add(scout.pid)

    def _sweep(self) -> None:
        """Give up calls whose callers were killed, and reap scouts that were killed."""
        for call in list(self._calls.values()):
            try:
                check_waiting(self._listener, call.notification)
            except FileNotFoundError:
                self._give_up(call)
        self._killed = {pid for pid in self._killed if not os.waitpid(pid, os.WNOHANG)[0]}

    def _pass_cachestat(self, notification: seccomp_notif) -> _Steps:
        """Let a call through that can only be cachestat's.

        The kernel then writes to memory that the caller named, and to no other.

        Raises:
            _Continue: when it is cachestat's.
            OSError: EINVAL when it is memfd_restricted with unknown flags; EAGAIN when there is no
                scout to tell.
        """
        data = notification.data
        if self._cachestat and not data.arg3 & _U32 and (data.arg1 | data.arg2) & 7 == 0:
            try:
                if (
                    yield (
                        "may_be_cachestat",
                        (notification.pid, data.arg0 & _U32, data.arg1, data.arg2),
                    )
                ):
                    raise _Continue
            except OSError as error:
                # EIO: the scout was killed, or the call was given up.
                if error.errno in (EAGAIN, ENOMEM, EMFILE, ENFILE, EIO):
                    raise OSError(EAGAIN, os.strerror(EAGAIN)) from None
        raise OSError(EINVAL, "memfd_restricted: unknown flags")

    # Answers that FUSE cannot give, for descriptors of this supervisor's service. For other
    # descriptors, and where nobody may look, the kernel answers.

    def _refuse_mmap(self, notification: seccomp_notif, question: str, about: int) -> _Steps:
        try:
            ours = yield question, (notification.pid, about & _U32, self._porter.device)
        except OSError:
            ours = False
        if ours:
            raise OSError(ENODEV, "mmap: restricted memory cannot be mapped")
        raise _Continue

    def _tell_file_system(self, notification: seccomp_notif, table: Table) -> _Steps:
        """Answer fstatfs as the proposal's file system would (simple_statfs).

        Raises:
            _Continue: for another file, or when nobody may write to the caller (for instance,
                because of Yama). Then the caller gets what its file system says.
            OSError: EINVAL for another size of the struct.
        """
        data = notification.data
        try:
            ours = yield "open_memory", (notification.pid, data.arg0 & _U32, self._porter.device)
        except OSError:
            raise _Continue from None
        if not ours:
            raise _Continue
        head, tail = (RESTRICTEDMEM_MAGIC, 4096, 0, 0, 0, 0, 0, 0, 0), (255, 4096, 0, 0, 0, 0, 0)
        if data.nr == table.fstatfs64:
            if data.arg1 & _U32 != _STATFS64_I386.size:
                raise OSError(EINVAL, "fstatfs64: another struct")
            address, content = data.arg2 & _U32, _STATFS64_I386.pack(*head, *tail)
        elif table.fstatfs64 is not None:
            address, content = data.arg1 & _U32, _STATFS_I386.pack(*head, *tail)
        else:
            address, content = data.arg1, _STATFS.pack(*head, *tail)
        # The memory that was opened is the caller's if the caller still waits.
        check_waiting(self._listener, notification)
        try:
            written = yield "write", (address, content)
        except OSError:
            written = False
        if not written:
            # The kernel then says EFAULT. Or it waits as long as somebody may bring the page
            # (userfaultfd), and then says what FUSE does.
            raise _Continue


def _is_refused_anyway(data: seccomp_data, table: Table) -> bool:
    """Say whether the kernel refuses an mmap for its numbers (ksys_mmap_pgoff, do_mmap).

    It checks them before it asks which file it is. An executable mapping of a restricted file is
    EPERM, as in the proposal.
    """
    fixed = data.arg3 & (MAP_FIXED | MAP_FIXED_NOREPLACE)
    if table.old_mmap is None:
        address, length, offset = data.arg0, data.arg1, data.arg5
    else:
        # i386 has words of 32 bits, and its offset is in pages.
        address, length, offset = data.arg0 & _U32, data.arg1 & _U32, 0
    return (
        not 0 < length <= (_FIVE_LEVELS if fixed else _USUAL)
        or bool(fixed and (address % PAGE_SIZE or address > _FIVE_LEVELS - length))
        or bool(data.arg3 & MAP_HUGETLB)
        # Every way to mount makes the service's file system noexec.
        or bool(data.arg2 & mmap.PROT_EXEC)
        or bool(offset % PAGE_SIZE)
        or offset > MAX_FILE_BYTES - length
    )
