"""The services of this machine: each listens on an abstract socket whose name has its pid.

Any process can take such a name, and then answer anything, or nothing. So all sockets are asked
side by side within one time limit. No descriptor is received, and each answer is checked. The
kernel alone is trusted for facts about a process.
"""

import json
import os
import re
import resource
import select
import socket
import struct
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EMFILE, EMSGSIZE, ENFILE, ENOMEM, ENOTCONN, EPROTO, ESRCH, ETIMEDOUT
from typing import Any, Final, cast, final

from restrictedmem.abi import process
from restrictedmem.burial import bury
from restrictedmem.failure import named
from restrictedmem.fd import peer_credentials, receive_flags, refuse_fds
from restrictedmem.service import wire

_NO_ANSWER: Final = "its answer is not a service's"
#: Seconds in which all services have to answer.
PATIENCE: Final = 2.0
#: Seconds until a socket without room for one more connection is asked again.
_AGAIN: Final = 0.05
#: Bytes that all services of one uid may send together.
_MOST_BYTES: Final = 32 << 20
#: Values in these bytes: a small dictionary takes 30 times the memory of its text.
_MOST_VALUES: Final = 1 << 20
#: Levels of nested lists and dictionaries. A consumer's report has 8, and begins at the fourth.
_DEEPEST: Final = 16
#: Sockets of one uid that are asked at the same time once most descriptors are taken. A further
#: socket waits until another one of its uid has answered.
_AT_ONCE: Final = 256
_LARGEST_ERRNO: Final = 4095
#: A line of /proc/net/unix for a listening SOCK_SEQPACKET socket. The word after the pid makes the
#: name one that nobody can take first.
_NAME: Final = rb"(restrictedmem/(\d{1,10})(?:/[0-9a-f]{1,64})?)"
_ROW: Final = re.compile(rb"\S+: \S+ \S+ 00010000 0005 01 +\d+ @" + _NAME)
_HEAD: Final = struct.Struct("=II")

#: The least that a state has: the type of a value, of a list's members, or of a dictionary's.
_SHAPE: Final[dict[str, object]] = {
    "owner_pid": int,
    "owner_uid": int,
    "api": str,
    "way": str,
    "descriptors": [{"ino": int, "size": int, "resident": int, "notifiers": int}],
    "consumers": [
        {"name": str, "number": int, "files": [int], "invalidations": int, "report": object}
    ],
    "last_error": str,
}  # fmt: skip


def names() -> dict[str, int]:
    """Return the names on which services of any user listen, each with the pid in it."""
    # A name may hold any byte, a line's end too. A name that is no service's is found out when it
    # is asked.
    try:
        with open("/proc/net/unix", "rb") as table:
            rows = (_ROW.fullmatch(line.rstrip(b"\n")) for line in table)
            return {row[1].decode(): int(row[2]) for row in rows if row}
    except OSError as error:
        raise named("open", error) from None


def pids() -> list[int]:
    """Return the pids of processes of any user that claim to be services."""
    return sorted(set(names().values()))


def status_of(pid: int) -> dict[str, Any]:
    """Ask one service for its state.

    Raises:
        OSError: ESRCH when there is no such service, or somebody else holds the name; ENOTCONN when
            it is another user's; ETIMEDOUT; EPROTO for an invalid answer.
    """
    asked = _ask_all([_Question(name, number) for name, number in names().items() if number == pid])
    # Another service, in a PID namespace below, may have the same number there.
    asked.sort(key=lambda question: question.pid != pid)
    error = OSError(ESRCH, f"there is no service {pid}")
    for question in asked:
        if question.error is None:
            return question.state
        error = question.error
    raise error


def statuses() -> list[dict[str, Any]]:
    """Return the state of each service, in the order of their pids.

    A service that does not tell its state has ``pid``, ``uid`` (None when unknown), and ``error``.
    """
    found = _ask_all([_Question(name, pid) for name, pid in names().items()])
    return sorted((each.entry() for each in found if not each.gone), key=lambda entry: entry["pid"])


@final
@dataclass(eq=False)
class _Question:
    """One name, and the result of asking there."""

    name: str
    #: The pid in the name, then the pid of the process that listens there.
    pid: int
    uid: int | None = None
    sock: socket.socket | None = None
    said: bytearray = field(default_factory=bytearray)
    #: Whether the whole state was received.
    whole: bool = False
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    error: OSError | None = None
    #: Whether the service ended before it was asked.
    gone: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to come."""
        return self.whole or self.error is not None

    def entry(self) -> dict[str, Any]:
        """Return the entry that ``ps`` shows."""
        if self.error is None:
            return self.state
        return {"pid": self.pid, "uid": self.uid, "error": self.error.strerror or str(self.error)}

    def fail(self, number: int, words: str) -> None:
        """End with an error instead of a state."""
        self.error = OSError(number, words)

    def check(self, budget: dict[int, int]) -> None:
        """Check what was received, once nothing more is waited for."""
        try:
            if self.whole:
                assert self.uid is not None
                values = sum(map(self.said.count, (b"{", b"[", b",")))
                budget[self.uid] = budget.get(self.uid, _MOST_VALUES) - values
                if budget[self.uid] < 0:
                    self.fail(
                        EMSGSIZE, f"uid {self.uid}'s services say more than {_MOST_VALUES} values"
                    )
                    return
                self.state = {**_check(self.said), "pid": self.pid, "uid": self.uid}
            elif self.error is None:
                self.fail(ETIMEDOUT, f"did not answer within {PATIENCE:g} s")
        except MemoryError:
            self.fail(ENOMEM, "no memory for its answer")
        except OSError as error:
            self.error = error

    def connect(self, admit: Callable[[int], bool]) -> bool:
        """Connect and send the first request; return false when there is no room for now.

        The room may be missing at the socket or here. ``admit`` says whether one more socket of a
        uid may be asked now. If not, this only connects, and the connection shows whose the socket
        is. Root then connects again as that user: a service in a user namespace of its own cannot
        tell root from a stranger. So root asks no service over a connection of another user than
        the service's.
        """
        try:
            self.sock = self._connected()
            peer, uid, _ = peer_credentials(self.sock)
            self.uid = uid
            if not admit(uid):
                return True
            if self.pid not in _numbers_of(peer):
                holder = f"process {peer}" if peer else "a process of another PID namespace"
                self.fail(ESRCH, f"the name is held by {holder}, of uid {uid}")
                return True
            if os.geteuid() == 0 != uid:
                bury(self.sock)
                with _as_user(uid):
                    self.sock = self._connected()
                if peer_credentials(self.sock)[:2] != (peer, uid):
                    self.fail(ESRCH, "another process has taken the name meanwhile")
                    return True
            self.pid = peer
            self._request()
        except BlockingIOError:
            return False
        except (ConnectionRefusedError, BrokenPipeError, ConnectionResetError):
            self.gone = self.uid is None
            self.fail(ENOTCONN, "ended, or answers nobody of this user")
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                return False
            self.error = error
        return True

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            refuse_fds(sock)
            sock.connect(f"\0{self.name}")
        except BaseException:
            sock.close()
            raise
        return sock

    def _request(self) -> None:
        assert self.sock is not None
        message = _HEAD.pack(wire.STATUS.number, 0) + wire.NUMBER.pack(len(self.said))
        self.sock.send(message, socket.MSG_NOSIGNAL)

    def receive(self, budget: dict[int, int]) -> None:
        """Receive one piece of the answer, and ask for the next."""
        assert self.sock is not None
        assert self.uid is not None
        try:
            data, flags = receive_flags(self.sock, wire.MAX_MESSAGE + 1)
            if flags & socket.MSG_CTRUNC:
                raise OSError(EPROTO, _NO_ANSWER)
            if not data:
                self.fail(ENOTCONN, "ended, or answers nobody of this user")
                return
            total, piece = _parse(data)
            budget[self.uid] = budget.get(self.uid, _MOST_BYTES) - len(piece)
            if budget[self.uid] < 0:
                self.fail(EMSGSIZE, f"uid {self.uid}'s services say more than {_MOST_BYTES} bytes")
                return
            self.said += piece
            if len(self.said) < total:
                self._request()
            else:
                self.whole = True
        except BlockingIOError:
            return
        except ConnectionError:
            self.fail(ENOTCONN, "ended, or answers nobody of this user")
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Close the connection."""
        if self.sock is not None:
            bury(self.sock)
            self.sock = None


def _ask_all(questions: list[_Question]) -> list[_Question]:
    """Ask all services side by side, within one time limit.

    The answers are checked afterwards, because that takes time of its own.
    """
    _hear(questions)
    budget = dict[int, int]()
    for question in questions:
        question.check(budget)
        question.said.clear()
    return questions


def _hear(questions: Iterable[_Question]) -> None:
    waiting = list(questions)
    with select.epoll() as epoll, closing(_Asking(epoll)) as asking:
        # A connection shows whose a name is. Only then the time limit for all begins.
        waiting = [each for each in waiting if not asking.begin(each)]
        deadline = time.monotonic() + PATIENCE
        while (waiting or asking.open) and (left := deadline - time.monotonic()) > 0:
            for fd, _ in epoll.poll(min(left, _AGAIN) if waiting else left):
                waiting += asking.hear(fd)
            waiting = [each for each in waiting if not asking.begin(each)]


@final
class _Asking:
    """The services that are asked side by side.

    With few descriptors left, only some of each uid are asked at the same time.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._plenty = resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4
        #: By the socket's descriptor.
        self.open: dict[int, _Question] = {}
        self._of: Counter[int] = Counter()
        #: Questions of a uid that wait for others of that uid.
        self._later: defaultdict[int, deque[_Question]] = defaultdict(deque)
        self._budget: dict[int, int] = {}

    def begin(self, question: _Question) -> bool:
        """Ask, or let the question wait for others of its uid; return false to try again."""
        begun = question.connect(self._admits)
        if begun and question.sock is not None and not question.over:
            assert question.uid is not None
            if self._admits(question.uid):
                self._of[question.uid] += 1
                self._epoll.register(question.sock.fileno(), select.EPOLLIN)
                self.open[question.sock.fileno()] = question
                return True
            self._later[question.uid].append(question)
        question.close()
        return begun

    def _admits(self, uid: int) -> bool:
        return len(self.open) < self._plenty or self._of[uid] < _AT_ONCE

    def hear(self, fd: int) -> list[_Question]:
        """Receive a piece of an answer; after the last, return a question that waited."""
        question = self.open[fd]
        question.receive(self._budget)
        if not question.over:
            return []
        assert question.uid is not None
        del self.open[fd]
        self._of[question.uid] -= 1
        # A child may have a copy for a moment (``bury``), and epoll would report its events.
        self._epoll.unregister(fd)
        question.close()
        later = self._later[question.uid]
        return [later.popleft()] if later else []

    def close(self) -> None:
        """Close all questions; those that were not asked get an error."""
        for question in self.open.values():
            question.close()
        for uid, later in self._later.items():
            for question in later:
                question.fail(ETIMEDOUT, f"was not asked: others of uid {uid} did not answer")


def _numbers_of(pid: int) -> set[int]:
    """Return a process's pids here and in its own PID namespace; none if it is not seen."""
    if not pid:
        return set()
    try:
        with process.proc() as proc:
            return {pid, *map(int, process.status(pid, b"NSpid:", proc))}
    except OSError:
        return {pid}


@contextmanager
def _as_user(uid: int) -> Generator[None, None, None]:
    """Be another user than root for a moment, if the user namespace has such a user."""
    dumpable = process.prctl(process.PR_GET_DUMPABLE)
    with suppress(OSError):
        os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        # The change of uid took it away, from a process that is the caller's.
        if dumpable == 1:
            process.prctl(process.PR_SET_DUMPABLE, dumpable)


def _parse(data: bytes) -> tuple[int, bytes]:
    """Return the size of the whole state in bytes, and the bytes in one reply.

    Raises:
        OSError: the errno of the reply; EPROTO for an invalid reply.
    """
    if _HEAD.size <= len(data) <= wire.MAX_MESSAGE:
        number, _ = _HEAD.unpack_from(data)
        if 0 < number <= _LARGEST_ERRNO:
            words = data[_HEAD.size :].decode(errors="replace")[:200]
            raise OSError(number, words or os.strerror(number))
        body = data[_HEAD.size :]
        if number == 0 and len(body) > wire.NUMBER.size:
            (total,) = wire.NUMBER.unpack_from(body)
            return total, body[wire.NUMBER.size :]
    raise OSError(EPROTO, _NO_ANSWER)


def _check(text: bytearray) -> dict[str, Any]:
    """Return the state in a service's JSON.

    Raises:
        OSError: EPROTO for anything else.
    """
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        raise OSError(EPROTO, "its answer is not JSON") from None
    if not _fits(found, _SHAPE) or not _is_shallow(found, _DEEPEST):
        raise OSError(EPROTO, "its answer is not a service's state")
    state: dict[str, Any] = found
    return state


def _is_shallow(value: object, depth: int) -> bool:
    match value:
        case list() | dict():
            items = cast("Iterable[object]", value.values() if isinstance(value, dict) else value)
            return depth > 0 and all(_is_shallow(item, depth - 1) for item in items)
        case _:
            return True


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _finite(text: str) -> float:
    found = float(text)
    return found if abs(found) < float("inf") else _refuse(text)


def _fits(value: Any, shape: Any) -> bool:
    if type(shape) is dict:
        members = cast("dict[str, Any]", shape)
        return type(value) is dict and all(
            name in value and _fits(value[name], inner) for name, inner in members.items()
        )
    if type(shape) is list:
        items: list[Any] = value
        return type(value) is list and all(_fits(each, shape[0]) for each in items)
    if shape is int:
        # bool is an int to Python, and is refused. No number here has more than 64 bits.
        return type(value) is int and 0 <= value < 1 << 64
    return shape is object or type(value) is shape
