"""The process that has the service behind a supervisor.

The porter starts the service at first need and makes descriptors. It also lets in the processes
that connect to the door, a listening socket. It is a process of its own, because all of that waits
for others. It may wait for a service that starts or was stopped, for a server that does not answer,
or for a full queue. The supervisor meanwhile answers calls that need no service.

Putting a descriptor into a caller takes until the caller has run. A program of low priority may
wait for that for seconds (SCHED_IDLE on a processor that is busy). So the porter has hands. Each
hand is a thread, and one of them is always free to take the next call.
"""

import mmap
import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EIO, ELIBACC, ENOMEM
from typing import TYPE_CHECKING, Final, final

from restrictedmem import sync, threads
from restrictedmem.abi.seccomp import give, respond
from restrictedmem.burial import bury
from restrictedmem.child import fork
from restrictedmem.failure import failed, line_of
from restrictedmem.fd import OwnedFd, above_standard, peer_credentials
from restrictedmem.text import plain
from restrictedmem.users import is_own

if TYPE_CHECKING:
    from restrictedmem.service.client import Service

#: Bytes that are written to a pipe at once, or not at all.
_LONGEST: Final = select.PIPE_BUF
#: A notification's id, and the flags of the call.
_REQUEST: Final = struct.Struct("=QI")
#: Most callers into which descriptors are being put at the same time. The porter holds one
#: descriptor for each, and no more.
_HANDS: Final = 256
#: Hands that are kept for the next calls.
_IDLE: Final = 4


@final
class Complaint:
    """A program's standard error, kept to say once why there are no descriptors.

    A process that waits for the end of a pipe waits for the program alone. So the porter closes
    standard error when some process has a descriptor, or can make some, and when the program has
    ended.
    """

    def __init__(self, program: int) -> None:
        """Take the current standard error; ``program`` is the pid of the process whose it is.

        Raises:
            OSError: EBADF when it is closed; ENOSYS, ESRCH, EMFILE.
        """
        self._stderr = above_standard(2)
        try:
            self._program = OwnedFd(os.pidfd_open(program))
        except OSError:
            self._stderr.close()
            raise

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the program has ended."""
        return self._program.fileno()

    def filenos(self) -> tuple[int, int]:
        """Return both descriptors of this object."""
        return self._program.fileno(), self._stderr.fileno()

    def say(self, error: OSError) -> None:
        """Say why there are no descriptors, and let go of standard error.

        If the reader would make this wait, or standard error was let go before, nothing is said.
        """
        if self._stderr.closed:
            return
        line = f"restrictedmem exec: no descriptor can be made: {plain(line_of(error))}\n"
        poll = select.poll()
        poll.register(self._stderr.fileno(), select.POLLOUT)
        with suppress(OSError):
            if poll.poll(0):
                os.write(self._stderr.fileno(), line.encode(errors="replace")[:_LONGEST])
        self.let_go()

    def let_go(self) -> None:
        """Close standard error, and keep the pidfd.

        Another thread may wait on the pidfd. That does not keep the program from ending.
        """
        self._stderr.close()

    def close(self) -> None:
        """Close both descriptors."""
        self.let_go()
        self._program.close()


@final
class Porter:
    """The supervisor's hold on the porter."""

    def __init__(
        self,
        listener: OwnedFd,
        door: socket.socket,
        start: Callable[[], "Service"],
        complaint: Complaint | None = None,
    ) -> None:
        """Fork the porter, which answers calls at ``listener``.

        It lets processes of this user in at ``door``. ``start`` makes the service. From then on the
        porter alone has ``complaint``.

        Raises:
            OSError: EAGAIN, ENOMEM when no process can be made.
        """
        self._device = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        theirs, ours = os.pipe()
        self._pipe: Final = OwnedFd(ours)
        with OwnedFd(theirs) as requests:
            os.set_blocking(ours, False)
            work = _Work(requests, listener, door, start, self._device, complaint)
            kept = () if complaint is None else complaint.filenos()
            fork(
                work.run,
                bound=True,
                name="rmem-porter",
                keep=[*(fd.fileno() for fd in (requests, listener, door)), *kept],
            )
            if complaint is not None:
                complaint.close()

    @property
    def device(self) -> int:
        """Device number of the service's descriptors; 0 while nobody has or can make one."""
        return self._device[0]

    def fileno(self) -> int:
        """Return a descriptor that has an error (POLLERR) when the porter has ended."""
        return self._pipe.fileno()

    def ask(self, call: int, flags: int) -> None:
        """Have a call answered with a descriptor, without waiting for that.

        Raises:
            OSError: EAGAIN when some four thousand calls wait; EPIPE when the porter has ended.
        """
        os.write(self._pipe.fileno(), _REQUEST.pack(call, flags))


def _with_errno(error: Exception) -> OSError:
    """Return an error, such as a lack of memory, as an OSError of what was asked for.

    It must not be the end of the porter.
    """
    if isinstance(error, OSError):
        return error
    if isinstance(error, MemoryError | RuntimeError | SystemError):
        # The interpreter has many texts for a lack of memory: "can't allocate read lock" is a
        # RuntimeError.
        return failed("start", ENOMEM, str(error))
    if isinstance(error, ImportError):
        return failed("start", ELIBACC, str(error))
    return failed("start", EIO, f"{type(error).__name__}: {error}")


@final
class _Work:
    def __init__(
        self,
        requests: OwnedFd,
        listener: OwnedFd,
        door: socket.socket,
        start: Callable[[], "Service"],
        device: "memoryview[int]",
        complaint: Complaint | None = None,
    ) -> None:
        self._requests = requests
        self._listener = listener
        self._door = door
        self._start = start
        self._device = device
        self._complaint = complaint
        self._service: Service | None = None
        #: Protects the service while it starts, and the complaint.
        self._mutex = sync.mutex()
        #: Protects the number of hands, and the number of those that are free.
        self._hands_mutex = sync.mutex()
        self._hands = self._free = 0

    def run(self) -> None:
        """Let in connecting processes, while hands serve requests, until the end."""
        try:
            self._add_hand()
        except OSError as error:
            self._end_complaint(error)
            self._refuse_all(error)
            return
        poll = select.poll()
        # A hand reads the requests. But poll always reports that the supervisor is gone.
        poll.register(self._requests.fileno(), 0)
        poll.register(self._door.fileno(), select.POLLIN)
        if self._complaint is not None:
            poll.register(self._complaint.fileno(), select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._door.fileno():
                    self._let_in()
                elif fd == self._requests.fileno():
                    return
                else:
                    poll.unregister(fd)
                    self._end_complaint()

    def _refuse_all(self, error: OSError) -> None:
        """Answer every request with an error, because not even one thread can be made."""
        self._door.close()
        while request := os.read(self._requests.fileno(), _REQUEST.size):
            respond(self._listener, _REQUEST.unpack(request)[0], error.errno or EIO)

    def _add_hand(self) -> None:
        with self._hands_mutex:
            self._hands += 1
            self._free += 1
        try:
            threads.start(self._serve)
        except OSError:
            with self._hands_mutex:
                self._hands -= 1
                self._free -= 1
            raise

    def _serve(self) -> None:
        """Serve requests until the supervisor is gone, or enough other hands are free."""
        while request := os.read(self._requests.fileno(), _REQUEST.size):
            with self._hands_mutex:
                self._free -= 1
            self._answer(*_REQUEST.unpack(request))
            with self._hands_mutex:
                if self._free >= _IDLE:
                    self._hands -= 1
                    return
                self._free += 1

    def _answer(self, call: int, flags: int) -> None:
        """Create a descriptor and put it into the caller, as the call's result.

        It has the lowest free number there, and is not close-on-exec.
        """
        try:
            with self._made(flags) as fd:
                self._leave_a_hand_free()
                give(self._listener, call, fd)
        except Exception as error:  # noqa: BLE001  one call's trouble
            respond(self._listener, call, _with_errno(error).errno or EIO)

    def _leave_a_hand_free(self) -> None:
        """Make another hand if no other is free, because this hand may wait.

        If none can be made, other calls wait for this one.
        """
        with self._hands_mutex:
            enough = self._free or self._hands >= _HANDS
        if not enough:
            with suppress(OSError):
                self._add_hand()

    def _let_in(self) -> None:
        """Make a connecting process an owner of the service.

        If that fails, the process finds the connection closed.
        """
        with suppress(Exception), ExitStack() as undo:
            sock, _ = self._door.accept()
            undo.callback(bury, sock)
            if is_own(peer_credentials(sock)[1]):
                self._started().share(sock)
                self._end_complaint()

    def _made(self, flags: int) -> OwnedFd:
        service = self._started()
        try:
            fd = service.memfd_restricted(flags)
        except OSError as error:
            self._end_complaint(error)
            raise
        self._end_complaint()
        return OwnedFd(fd)

    def _started(self) -> "Service":
        with self._mutex:
            if self._service is None:
                try:
                    service = self._start()
                except Exception as error:  # noqa: BLE001  so is this
                    told = _with_errno(error)
                    if self._complaint is not None:
                        self._complaint.say(told)
                    raise told from None
                # Do this before any process has a descriptor: its first mmap must already stop.
                self._device[0] = service.device
                self._service = service
            return self._service

    def _end_complaint(self, error: OSError | None = None) -> None:
        """Say why there are no descriptors. If there are some, never say anything."""
        if self._complaint is None:
            return
        with self._mutex:
            if error is None:
                self._complaint.let_go()
            else:
                self._complaint.say(error)
