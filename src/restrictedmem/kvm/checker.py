"""The checker: a process that looks at the owner's descriptors before the engine has them.

To close a file of the owner's FUSE file system asks the owner's server (FUSE_FLUSH). If that server
does not answer, the process that closes the file stays in state D, where SIGKILL does not reach it.
So the engine receives without a control buffer, and leaves messages with descriptors to the
checker, which nobody needs.

The checker takes such a message, and asks the descriptor what it is in ways that no file system
hears of. It passes on only a memfd, for which the kernel alone answers, and a file of the engine's
own service (docs/understand/conversion-in-place.md). It closes what it has only
when the engine has its answer, because it may hang there for ever. So it has let go of the VM's
socket before, and gets a copy of it with each question. Otherwise the owner would wait for the
socket's end after the engine is gone.

A memfd can also hold a process that changes it. An owner's write to a memfd holds its inode's lock
until the page that it writes from comes. So the checker seals it.
"""

import array
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from errno import EAGAIN, EINVAL, EMFILE, EMSGSIZE, EPROTO, ETIMEDOUT
from typing import Final, final

from restrictedmem import threads
from restrictedmem.abi import process, stat
from restrictedmem.child import die_with, ends, fork
from restrictedmem.failure import status_of
from restrictedmem.fd import (
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_TRUNC,
    OwnedFd,
    brings_fds,
    close_all,
    receive_with_fds,
    send_with_fds,
)
from restrictedmem.kvm.half import forbid_shrinking, is_memfd
from restrictedmem.kvm.serving import RefusedError
from restrictedmem.patience import Patience
from restrictedmem.service.wire import MAX_MESSAGE, Channel, Message

#: How often, and how many milliseconds each time, the engine waits for the checker. Time in which
#: neither of them ran counts as one wait at most.
_PATIENCE: Final = (20, 100)
#: Seconds in which the kernel drops descriptors, unless one of them lingers.
_DROP: Final = 2.0
#: Seconds in which a checker that was killed ends, unless it is held.
_REAP: Final = 0.1
#: The checker's message whenever it has nothing to close; and the engine's questions after that.
_READY: Final = b"r"
_TAKE: Final = b"t"
_SEAL: Final = b"s"
#: Follows ``_TAKE``.
_DEVICE: Final = struct.Struct("=Q")
#: The checker's answer: an errno, whether the message was malformed, and then the message or the
#: text of the error.
_ANSWER: Final = struct.Struct("=II")
#: The beginning of a request: its number, and 0.
_HEAD: Final = struct.Struct("=II")


@final
class Intake:
    """The VM's socket. The checker takes those of its messages that bring descriptors."""

    def __init__(self, owner: Channel, checker: socket.socket, pid: int) -> None:
        self._owner = owner
        #: The device number of the service's files, which the owner may send, too; 0 for none.
        self.device = 0
        self._checker: socket.socket | None = checker
        self._pid = pid

    def receive(self) -> Message | None:
        """Take the next request, if there is one; None when the owner is gone.

        Raises:
            OSError: EAGAIN when there is none; EMSGSIZE for more than one descriptor; else as
                ``Channel.receive``.
            RefusedError: EINVAL for a descriptor of anything but a memfd or a file of ``device``;
                EMFILE; ETIMEDOUT when the checker is late or gone.
        """
        if not brings_fds(self._owner.sock, MSG_DONTWAIT):
            return self._owner.receive(MSG_DONTWAIT)
        answer = self._ask(_TAKE + _DEVICE.pack(self.device), self._owner.fileno())
        if answer is None:
            # The checker may have died while it had the message. The owner has to hear that, too.
            with suppress(BlockingIOError):
                if brings_fds(self._owner.sock, MSG_DONTWAIT):
                    self._drop()
            raise RefusedError(
                ETIMEDOUT,
                "descriptors are not taken any more: the process that looks at them did not answer",
            )
        data, fds = answer
        errno, malformed = _ANSWER.unpack_from(data)
        content = data[_ANSWER.size :]
        if not errno:
            number, _ = _HEAD.unpack_from(content)
            return Message(number, content[_HEAD.size :], fds)
        close_all(fds)
        raise (OSError if malformed else RefusedError)(errno, content.decode())

    def forbid_shrinking(self, fd: int) -> None:
        """Have the checker seal a memfd (``half.forbid_shrinking``).

        Raises:
            OSError: the errnos of ``half.forbid_shrinking``; ETIMEDOUT when the checker is gone, or
                late because it is held.
        """
        answer = self._ask(_SEAL, fd)
        if answer is None:
            raise OSError(
                ETIMEDOUT, "the memfd could not be sealed in time: a write to it is under way"
            )
        errno, _ = _ANSWER.unpack_from(answer[0])
        if errno:
            raise OSError(errno, answer[0][_ANSWER.size :].decode())

    def drop_rest(self) -> None:
        """Take and drop all messages that are left in a socket that was shut down.

        Otherwise a vCPU's socket in such a message would never hang up.
        """
        while True:
            try:
                message = self.receive()
            except OSError:
                # The message is gone from the queue all the same.
                continue
            if message is None:
                return
            close_all(message.fds)

    def _drop(self) -> None:
        """Have the kernel drop the next message; end the engine if a descriptor lingers.

        A descriptor lingers if it is a socket with SO_LINGER. This takes a thread: the caller's own
        would not find out that the owner is gone.
        """
        dropped = threading.Event()

        def drop() -> None:
            with suppress(OSError):
                self._owner.sock.recvmsg(MAX_MESSAGE, 0, MSG_DONTWAIT)
            dropped.set()

        try:
            threads.start(drop)
        except OSError as error:
            os._exit(status_of(error))
        if not dropped.wait(_DROP):
            os._exit(ETIMEDOUT)

    def _ask(self, question: bytes, fd: int) -> tuple[bytes, list[OwnedFd]] | None:
        """Have the checker answer a question about a descriptor.

        Return None when it does not answer, now or ever.
        """
        if self._checker is None:
            return None
        try:
            # The checker speaks first: if it is held, a question would wait with the VM's socket in
            # it.
            if _speaks(self._checker) and self._checker.recv(1):
                send_with_fds(self._checker, question, [fd], MSG_DONTWAIT)
                if _speaks(self._checker):
                    answer = receive_with_fds(self._checker, _ANSWER.size + MAX_MESSAGE)
                    if answer[0]:
                        return answer
        except OSError as error:
            if error.errno == EMSGSIZE:
                raise RefusedError(EMFILE, "there is no room for one more descriptor") from None
        except BaseException:
            # The checker's answer may still come, and the next question would take it for its own.
            self.close()
            raise
        self.close()
        return None

    def close(self) -> None:
        """End the checker. If a server of the owner holds it for ever, leave it behind."""
        if self._checker is None:
            return
        self._checker.close()
        self._checker = None
        # The checker was not reaped yet, so the number is its own.
        os.kill(self._pid, signal.SIGKILL)
        with suppress(OSError):
            if ends(self._pid, Patience(_REAP)):
                os.waitpid(self._pid, 0)


def _speaks(checker: socket.socket) -> bool:
    """Wait until the checker has sent something, or has ended."""
    poll = select.poll()
    poll.register(checker, select.POLLIN)
    times, milliseconds = _PATIENCE
    return any(poll.poll(milliseconds) for _ in range(times))


def start(owner: Channel, others: Sequence[socket.socket]) -> Intake:
    """Fork the checker of the VM's socket.

    The checker keeps neither that socket nor ``others``. It does keep the descriptor by which
    ``serve`` sees that something of a client's service is left: a checker that cannot end counts.

    Preconditions: no other thread, and nothing else in this process that the checker must not have.

    Raises:
        OSError: EAGAIN, ENOMEM as fork(2); EMFILE.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine = os.getpid()

    def be_checker() -> None:
        for sock in (ours, owner.sock, *others):
            sock.close()
        process.set_name("rmem-checker")
        _answer_questions(theirs, engine)

    try:
        pid = fork(be_checker, bound=True)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    theirs.close()
    return Intake(owner, ours, pid)


def _answer_questions(engine: socket.socket, parent: int) -> None:
    engine.send(_READY)
    while True:
        question, fds = receive_with_fds(engine, len(_TAKE) + _DEVICE.size)
        if not question:
            return
        fd = fds.pop()
        if question == _SEAL:
            with fd:
                engine.send(_sealed(fd.fileno()))
            engine.send(_READY)
            continue
        # If the checker were killed with the socket and a descriptor, it would keep the socket for
        # as long as the descriptor holds it. So the engine's end does not kill it meanwhile.
        process.prctl(process.PR_SET_PDEATHSIG, 0)
        with socket.socket(fileno=fd.detach()) as owner:
            taken = _take(owner)
        die_with(parent)
        (device,) = _DEVICE.unpack_from(question, len(_TAKE))
        _answer(taken, engine, device)
        # This may hang for ever.
        for held in taken.fds:
            os.close(held)
        engine.send(_READY)


def _sealed(fd: int) -> bytes:
    """Seal a memfd; this may hang, too."""
    try:
        forbid_shrinking(fd)
    except OSError as error:
        return _ANSWER.pack(error.errno or EINVAL, 0) + (error.strerror or "").encode()
    return _ANSWER.pack(0, 0)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A message of the owner, its descriptors and recvmsg's flags; or why there is none."""

    data: bytes = b""
    fds: tuple[int, ...] = ()
    flags: int = 0
    error: OSError | None = None


def _take(owner: socket.socket) -> _Taken:
    # There is room for one: the kernel drops the others, and this process never has to close them.
    fds, room = array.array("i"), socket.CMSG_LEN(array.array("i").itemsize)
    try:
        data, ancillary, flags, _ = owner.recvmsg(
            MAX_MESSAGE, room, MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except OSError as error:
        return _Taken(error=error)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload)
    return _Taken(data, tuple(fds), flags)


def _answer(taken: _Taken, engine: socket.socket, device: int) -> None:
    """Pass a message on, or say what is wrong with it; ``device`` is that of ``Intake``."""
    if taken.error is not None:
        engine.send(
            _ANSWER.pack(taken.error.errno or EAGAIN, 1) + (taken.error.strerror or "").encode()
        )
    elif taken.flags & (MSG_CTRUNC | MSG_TRUNC):
        engine.send(_ANSWER.pack(EMSGSIZE, 1) + b"recvmsg: message or descriptors cut off")
    elif len(taken.data) < _HEAD.size:
        engine.send(_ANSWER.pack(EPROTO, 1) + f"message of {len(taken.data)} bytes".encode())
    elif all(is_memfd(fd) or stat.identity(fd)[0] == device for fd in taken.fds):
        send_with_fds(engine, _ANSWER.pack(0, 0) + taken.data, taken.fds)
    else:
        engine.send(_ANSWER.pack(EINVAL, 0) + b"the descriptor is not a memfd")
