"""Descriptors of the owner are looked at by a process that nobody needs, before the engine has them.

To close a file of the owner's FUSE file system asks the owner's server (FUSE_FLUSH). One that does
not answer keeps whoever closes in state D, where SIGKILL does not reach. So the engine receives
without a control buffer, and what comes with descriptors is left to the checker. It takes the
message, asks the descriptor what it is in ways that no file system hears of, and passes on what the
kernel alone answers for: a memfd. Only when the engine has its answer, the checker closes what it
has. It may hang there for ever, and so it has let go of the VM's socket before, of which it gets a
copy with each question: with the engine gone, the owner is not to wait for it.

A memfd can hold whoever changes it, too: an owner's write to it has its inode's lock, for as long
as the page that it writes from does not come. So the checker seals it.
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
from restrictedmem.abi import process
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

#: How often, and how many milliseconds each time, the engine waits for the checker: time in which
#: neither ran counts once at most.
_PATIENCE: Final = (20, 100)
#: Seconds in which the kernel drops descriptors, unless one lingers.
_DROP: Final = 2.0
#: Seconds in which a checker that was killed ends, unless it is held.
_REAP: Final = 0.1
#: What the checker says whenever it has nothing to close, and what the engine asks it then.
_READY: Final = b"r"
_TAKE: Final = b"t"
_SEAL: Final = b"s"
#: The checker's answer: an errno, whether the message was malformed, and then the message or what
#: is wrong with it.
_ANSWER: Final = struct.Struct("=II")
#: How a request begins: its number, 0.
_HEAD: Final = struct.Struct("=II")


@final
class Intake:
    """The VM's socket: its messages, of which the checker takes those that bring descriptors."""

    def __init__(self, owner: Channel, checker: socket.socket, pid: int) -> None:
        self._owner = owner
        self._checker: socket.socket | None = checker
        self._pid = pid

    def receive(self) -> Message | None:
        """Take the next request, if there is one; None when the owner is gone.

        Raises:
            OSError: EAGAIN when there is none; EMSGSIZE for more than one descriptor; else as
                ``Channel.receive``.
            RefusedError: EINVAL for a descriptor of anything but a memfd; EMFILE; ETIMEDOUT when
                the checker is late or gone.
        """
        if not brings_fds(self._owner.sock, MSG_DONTWAIT):
            return self._owner.receive(MSG_DONTWAIT)
        answer = self._ask(_TAKE, self._owner.fileno())
        if answer is None:
            # The checker may have died with it in its hands: the owner is to hear that, too.
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
            OSError: as that; ETIMEDOUT when the checker is late, for it is held, or gone.
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
        """Take what is left in a socket that was shut down, for nothing: a vCPU's owner among it would never hang up."""
        while True:
            try:
                message = self.receive()
            except OSError:
                # It is gone from the queue all the same.
                continue
            if message is None:
                return
            close_all(message.fds)

    def _drop(self) -> None:
        """Have the kernel drop the next message. One that lingers (SO_LINGER) ends the engine.

        In a thread: this one would not find out that the owner is gone.
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
        """Have the checker answer a question about a descriptor; None when it does not answer, now or ever."""
        if self._checker is None:
            return None
        try:
            # While it is held, a question would wait with the VM's socket in it.
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
            # Its answer may still come, and would be taken for the next one's.
            self.close()
            raise
        self.close()
        return None

    def close(self) -> None:
        """End the checker. One that a server of the owner's holds for ever is left to it."""
        if self._checker is None:
            return
        self._checker.close()
        self._checker = None
        # Not reaped yet, so the number is its own.
        os.kill(self._pid, signal.SIGKILL)
        with suppress(OSError):
            if ends(self._pid, Patience(_REAP)):
                os.waitpid(self._pid, 0)


def _speaks(checker: socket.socket) -> bool:
    """Wait for a word of the checker's, or its end."""
    poll = select.poll()
    poll.register(checker, select.POLLIN)
    times, milliseconds = _PATIENCE
    return any(poll.poll(milliseconds) for _ in range(times))


def start(owner: Channel, others: Sequence[socket.socket]) -> Intake:
    """Fork the checker of the VM's socket, which keeps neither that nor ``others``.

    What says that a client of ``serve`` still has something, it does keep: one that cannot end
    counts.

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
        question, fds = receive_with_fds(engine, len(_TAKE))
        if not question:
            return
        fd = fds.pop()
        if question == _SEAL:
            with fd:
                engine.send(_sealed(fd.fileno()))
            engine.send(_READY)
            continue
        # Killed with both in its hands, it would keep the VM's socket for as long as it is held.
        process.prctl(process.PR_SET_PDEATHSIG, 0)
        with socket.socket(fileno=fd.detach()) as owner:
            taken = _take(owner)
        die_with(parent)
        _answer(taken, engine)
        # Here it may hang, and for ever.
        for held in taken.fds:
            os.close(held)
        engine.send(_READY)


def _sealed(fd: int) -> bytes:
    """Seal a memfd; here, too, it may hang."""
    try:
        forbid_shrinking(fd)
    except OSError as error:
        return _ANSWER.pack(error.errno or EINVAL, 0) + (error.strerror or "").encode()
    return _ANSWER.pack(0, 0)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A message of the owner's, the descriptors with it, and recvmsg's flags; or why there is none."""

    data: bytes = b""
    fds: tuple[int, ...] = ()
    flags: int = 0
    error: OSError | None = None


def _take(owner: socket.socket) -> _Taken:
    # Room for one: the kernel drops the others, and they never are this process's to close.
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


def _answer(taken: _Taken, engine: socket.socket) -> None:
    """Pass a message on, or say what is wrong with it."""
    if taken.error is not None:
        engine.send(
            _ANSWER.pack(taken.error.errno or EAGAIN, 1) + (taken.error.strerror or "").encode()
        )
    elif taken.flags & (MSG_CTRUNC | MSG_TRUNC):
        engine.send(_ANSWER.pack(EMSGSIZE, 1) + b"recvmsg: message or descriptors cut off")
    elif len(taken.data) < _HEAD.size:
        engine.send(_ANSWER.pack(EPROTO, 1) + f"message of {len(taken.data)} bytes".encode())
    elif all(is_memfd(fd) for fd in taken.fds):
        send_with_fds(engine, _ANSWER.pack(0, 0) + taken.data, taken.fds)
    else:
        engine.send(_ANSWER.pack(EINVAL, 0) + b"the descriptor is not a memfd")
