"""Answers the calls that a filter stops, of all processes under it, until the last of them has ended.

What is read of a process, from its memory or from /proc, may be another's or changed by the time it is used. So nothing that is granted
rests on it: a descriptor is given for the flags in the notification alone; the kernel judges once more whatever is let through to it; and
before a byte is written, the process is known to be still the one that waits. If that is gone, and another of its number was looked at,
the kernel refuses the answer, for nobody waits for it.
"""

import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EFAULT, EINTR, EINVAL, EIO, ENODEV, ENOENT, EPERM
from typing import TYPE_CHECKING, Final, final

from restrictedmem.abi.memory import RMFD_HUGEPAGE
from restrictedmem.abi.seccomp import (
    SECCOMP_ADDFD_FLAG_SEND,
    SECCOMP_IOCTL_NOTIF_ADDFD,
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
    check_waiting,
    seccomp_data,
    seccomp_notif,
    seccomp_notif_addfd,
    seccomp_notif_resp,
)
from restrictedmem.fd import OwnedFd, peer_credentials
from restrictedmem.syscall.filter import Table

if TYPE_CHECKING:
    from restrictedmem.service.client import Service

#: ``RESTRICTEDMEM_MAGIC`` of v9 and v10: "RESM".
RESTRICTEDMEM_MAGIC: Final = 0x5245_534D

_U32: Final = 0xFFFF_FFFF
_RANGE_BYTES: Final = 16
_CACHESTAT_BYTES: Final = 40
# struct statfs of 64-bit machines; of i386, and its statfs64, which is packed there.
_STATFS: Final = struct.Struct("=7q2i7q")
_STATFS_I386: Final = struct.Struct("=2i5I2i7i")
_STATFS64_I386: Final = struct.Struct("=2I5Q2i7I")


class _Continue(Exception):  # noqa: N818 not an error
    """The kernel is to do the call as if nobody had looked."""


@final
class Supervisor:
    """One filter's listener, and the service whose descriptors it hands out."""

    def __init__(
        self,
        listener: OwnedFd,
        door: socket.socket,
        tables: tuple[Table, ...],
        number: int,
        start: Callable[[], "Service"],
        *,
        cachestat: bool,
    ) -> None:
        """Answer for ``listener``, and let processes of this user into the service at ``door``; ``start`` makes it at the first call.

        ``cachestat``: a call of the number that cannot be memfd_restricted's may be cachestat's.
        """
        self._listener = listener
        self._door = door
        self._tables = {table.arch: table for table in tables}
        self._number = number
        self._start = start
        self._cachestat = cachestat
        self._service: Service | None = None

    def run(self) -> None:
        """Answer until no process is left under the filter."""
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        poll.register(self._door.fileno(), select.POLLIN)
        while True:
            for fd, events in poll.poll():
                if fd == self._door.fileno():
                    self._let_in()
                elif events & (select.POLLHUP | select.POLLERR):
                    return
                else:
                    self._serve()

    def _serve(self) -> None:
        notification = seccomp_notif(data=seccomp_data())
        try:
            SECCOMP_IOCTL_NOTIF_RECV(self._listener, notification)
        except OSError as error:
            # The caller was killed before it was heard.
            if error.errno in (ENOENT, EINTR):
                return
            raise
        # It may be gone at any time.
        with suppress(FileNotFoundError):
            self._answer(notification)

    def _let_in(self) -> None:
        """Make who knocks an owner of the service; one that nothing can be done for finds the connection closed."""
        with suppress(OSError), self._door.accept()[0] as sock:
            if peer_credentials(sock)[1] == os.geteuid():
                self._started().share(sock)

    def _started(self) -> "Service":
        if self._service is None:
            self._service = self._start()
        return self._service

    def _answer(self, notification: seccomp_notif) -> None:
        response = seccomp_notif_resp(id=notification.id)
        try:
            if self._handle(notification):
                return
        except _Continue:
            response.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE
        except OSError as error:
            response.error = -(error.errno or EIO)
        SECCOMP_IOCTL_NOTIF_SEND(self._listener, response)

    def _handle(self, notification: seccomp_notif) -> bool:
        """Do a call; returns whether it has been answered, else it returns 0."""
        data, table = notification.data, self._tables[notification.data.arch]
        if data.nr == self._number:
            flags = data.arg0 & _U32
            if flags & ~RMFD_HUGEPAGE:
                self._pass_cachestat(notification)
            self._give(notification, flags)
            return True
        if data.nr == table.mmap:
            if self._is_ours(notification, data.arg4):
                raise OSError(ENODEV, "mmap: restricted memory cannot be mapped")
            raise _Continue
        if not self._is_ours(notification, data.arg0):
            raise _Continue
        self._tell_file_system(notification, table)
        return False

    # memfd_restricted, and cachestat.

    def _give(self, notification: seccomp_notif, flags: int) -> None:
        """Create a descriptor and put it into the caller, as the call's result: lowest free number, not close-on-exec."""
        with OwnedFd(self._started().memfd_restricted(flags)) as fd:
            answer = seccomp_notif_addfd(id=notification.id, flags=SECCOMP_ADDFD_FLAG_SEND, srcfd=fd.fileno())
            SECCOMP_IOCTL_NOTIF_ADDFD(self._listener, answer)

    def _pass_cachestat(self, notification: seccomp_notif) -> None:
        """Let a call through that can only be cachestat: the kernel writes to memory that the caller named, and to no other.

        Raises:
            _Continue: it is one.
            OSError: EINVAL: it is memfd_restricted with flags that are none.
        """
        data = notification.data
        if self._cachestat and not data.arg3 & _U32 and (data.arg1 | data.arg2) & 7 == 0:
            opened = os.path.lexists(f"/proc/{notification.pid}/fd/{data.arg0 & _U32}")
            if opened and _is_mapped(notification.pid, (data.arg1, _RANGE_BYTES), (data.arg2, _CACHESTAT_BYTES)):
                raise _Continue
        raise OSError(EINVAL, "memfd_restricted: unknown flags")

    # What FUSE cannot say.

    def _is_ours(self, notification: seccomp_notif, fd: int) -> bool:
        """Say whether a descriptor of the caller's is one that this supervisor's service has made."""
        if self._service is None:
            return False
        try:
            return os.stat(f"/proc/{notification.pid}/fd/{fd & _U32}").st_dev == self._service.device
        except OSError:
            # None, or of a process that nobody may look into.
            return False

    def _tell_file_system(self, notification: seccomp_notif, table: Table) -> None:
        """Answer fstatfs as the proposal's file system would (simple_statfs).

        Raises:
            _Continue: nobody may write to the caller (Yama): it gets what FUSE says.
            OSError: EFAULT; EINVAL for another size of the struct.
        """
        data = notification.data
        head, tail = (RESTRICTEDMEM_MAGIC, 4096, 0, 0, 0, 0, 0, 0, 0), (255, 4096, 0, 0, 0, 0, 0)
        if data.nr == table.fstatfs64:
            if data.arg1 & _U32 != _STATFS64_I386.size:
                raise OSError(EINVAL, "fstatfs64: another struct")
            address, content = data.arg2 & _U32, _STATFS64_I386.pack(*head, *tail)
        elif table.fstatfs64 is not None:
            address, content = data.arg1 & _U32, _STATFS_I386.pack(*head, *tail)
        else:
            address, content = data.arg1, _STATFS.pack(*head, *tail)
        try:
            memory = os.open(f"/proc/{notification.pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (EACCES, EPERM):
                raise _Continue from None
            raise
        with OwnedFd(memory):
            # What was opened is the caller's if the caller still waits.
            check_waiting(self._listener, notification)
            try:
                written = os.pwrite(memory, content, address)
            except (OSError, OverflowError):
                written = 0
            if written < len(content):
                raise OSError(EFAULT, "fstatfs: not all of the struct is mapped")


def _is_mapped(pid: int, *wanted: tuple[int, int]) -> bool:
    """Say whether ranges of a process's addresses, as start and bytes, are mapped whole."""
    try:
        with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as maps:
            spans = [tuple(int(edge, 16) for edge in line.split(" ", 1)[0].split("-")) for line in maps]
    except OSError:
        return False
    for start, size in wanted:
        at = start
        for first, last in spans:
            if first <= at < last:
                at = last
        if at < start + size:
            return False
    return True
