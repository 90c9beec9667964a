"""The loop between /dev/fuse and the file system: who waits for whom, and for nobody else."""

import _thread
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EAGAIN, EIO, ENODEV, ENOENT, ENOMEM
from typing import Self, final

import pytest

from restrictedmem import threads
from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.memory import PUNCH
from restrictedmem.failure import status_of
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.fs import filesystem as filesystem_module
from restrictedmem.fs import fuse_server as server_module
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.fuse_server import MAX_THREADS, FuseServer
from restrictedmem.fs.owner_abi import NAME
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_SIZE, pgoff_t
from waiting import wait_until

PATIENCE = 10.0


@final
class Consumer:
    """A consumer that answers when it is let, and counts who waits for it."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.waiting = 0
        self.most = 0
        self._mutex = threading.Lock()

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        with self._mutex:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        assert self.answers.wait(PATIENCE), "waited 10 s to be let answer"
        with self._mutex:
            self.waiting -= 1

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        pass

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


def _threads() -> int:
    # This counts Python's threads: /proc/self/task still has one that was joined a moment ago.
    return _thread._count()


@final
class Served:
    """A file system that is served from a socket in place of /dev/fuse."""

    def __init__(self) -> None:
        self.filesystem = FileSystem("v10", max_files=1000)
        self.replies: dict[int, int] = {}
        self._sent = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._before = _threads()
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(PATIENCE)
        self._stack.enter_context(self._ours)
        self._device = OwnedFd(theirs.detach())
        self.server = FuseServer(self._device, self.filesystem)
        read = self.server._read

        def read_or_end() -> Request | None:
            # The end of a socket reads as nothing; /dev/fuse says ENODEV instead.
            request = read()
            return request if request and request.unique else None

        self.server._read = read_or_end  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.shutdown(socket.SHUT_WR)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "waited 10 s for the server's end"
        wait_until(lambda: _threads() == self._before, "the end of the server's threads")
        self._device.close()
        self._stack.close()
        for file in self.filesystem.files().values():
            file.put()

    @property
    def threads(self) -> int:
        return _threads() - self._before

    def send(self, opcode: int, nodeid: int = fuse.ROOT_ID, body: bytes = b"") -> int:
        """Send a request and return its number."""
        self._sent += 1
        self._ours.send(
            fuse.IN_HEADER.pack(
                fuse.IN_HEADER.size + len(body), opcode, self._sent, nodeid, 0, 0, 0, 0, 0
            )
            + body
        )
        return self._sent

    def reply_to(self, unique: int) -> int:
        """Wait for the reply to a request and return its errno; others are kept."""
        while unique not in self.replies:
            _, error, number = fuse.OUT_HEADER.unpack_from(self._ours.recv(4096))
            assert number not in self.replies, "answered twice"
            self.replies[number] = -error
        return self.replies[unique]

    def ask(self, opcode: int, nodeid: int = fuse.ROOT_ID, body: bytes = b"") -> int:
        return self.reply_to(self.send(opcode, nodeid, body))

    def create(self, consumer: Consumer | None = None, holder: int | None = None) -> int:
        """Create a file, for a consumer with a number, and return its node."""
        assert (
            self.ask(
                Opcode.CREATE,
                body=bytes(
                    fuse.fuse_create_in(flags=os.O_RDWR, mode=0o100600, umask=0, open_flags=0)
                )
                + NAME
                + b"\0",
            )
            == 0
        )
        node, file = max(self.filesystem.files().items())
        if consumer is not None:
            file.holder = holder
            file.register_notifier(consumer)
        return node

    def punch(self, node: int, length: int = PAGE_SIZE) -> int:
        """Send a punch and return the request's number."""
        return self.send(Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.pack(0, 0, length, PUNCH, 0))

    def serves(self) -> None:
        """Do what waits for nobody."""
        assert self.ask(Opcode.STATFS) == 0
        node = self.create()
        assert self.reply_to(self.punch(node)) == 0
        assert self.ask(Opcode.RELEASE, node, bytes(24)) == 0


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as found:
        yield found


def test_others_go_on_however_many_consumers_do_not_answer(served: Served) -> None:
    consumers = [Consumer() for _ in range(3 * MAX_THREADS)]
    nodes = [served.create(consumer, number) for number, consumer in enumerate(consumers)]
    punches: list[int] = []
    for node, consumer in zip(nodes, consumers, strict=True):
        punches.append(served.punch(node))
        wait_until(lambda consumer=consumer: consumer.waiting == 1, "a punch to reach its consumer")  # type: ignore[misc]
        served.serves()
    assert served.threads == len(consumers) + 2
    assert not set(punches) & served.replies.keys()
    # Any of them alone.
    for punch, consumer in [*zip(punches, consumers, strict=True)][::-1]:
        consumer.answers.set()
        assert served.reply_to(punch) == 0
    served.serves()
    wait_until(lambda: served.threads <= MAX_THREADS + 3, "threads that nobody needs to end")


def test_a_consumer_that_does_not_answer_takes_one_thread(served: Served) -> None:
    silent, other = Consumer(), Consumer()
    other.answers.set()
    punches = [served.punch(served.create(silent, 1)) for _ in range(100)]
    wait_until(lambda: silent.waiting == 1, "a punch to reach the consumer")
    for _ in range(3):
        served.serves()
        assert served.reply_to(served.punch(served.create(other, 2))) == 0
    assert (silent.most, len(served.filesystem.files())) == (1, 103)
    assert served.threads <= 5
    assert not set(punches) & served.replies.keys()
    silent.answers.set()
    assert [served.reply_to(punch) for punch in punches] == [0] * 100
    # Each once, in the order in which they came.
    assert [number for number in served.replies if number in punches] == punches
    assert silent.most == 1


@pytest.mark.parametrize("at_all", [True, False], ids=["one thread", "no thread"])
@pytest.mark.parametrize("dies", [False, True], ids=["refused", "died"])
def test_no_thread_to_be_had(at_all: bool, dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threads.start, 0

    def refuse(run: Callable[[], object]) -> None:
        nonlocal started
        started += 1
        if at_all and started == 1:
            start(run)
            return
        if not dies:
            raise OSError(EAGAIN, "no thread to be had")
        with monkeypatch.context() as patch:
            patch.setattr(threads, "_PATIENCE", (1, 0.01))
            patch.setattr(_thread, "start_new_thread", forget)
            start(run)

    def forget(*_: object) -> None:
        """Have a thread that dies at once."""

    monkeypatch.setattr(threads, "start", refuse)
    with Served() as served:
        first, second = Consumer(), Consumer()
        nodes = [served.create(first, 1), served.create(second, 2), served.create(second, 2)]
        punches = [served.punch(nodes[0])]
        wait_until(lambda: first.waiting == 1, "a punch to reach its consumer")
        second.answers.set()
        punches += [served.punch(node) for node in nodes[1:]]
        if at_all:
            # Requests that need not wait do not, and waiting requests come to their turn.
            served.serves()
            assert not set(punches) & served.replies.keys()
        first.answers.set()
        assert [served.reply_to(punch) for punch in punches] == [0, 0, 0]
        served.serves()


@pytest.mark.parametrize("what", ["allocation", "release"])
def test_what_takes_long_delays_nobody(
    served: Served, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go = threading.Semaphore(0), threading.Event()

    def wait(*_: object) -> bool:
        inside.release()
        assert go.wait(PATIENCE), "waited 10 s to be let go"
        return True

    monkeypatch.setattr(filesystem_module, "_HUGE_REQUEST", 0)
    nodes = [served.create() for _ in range(2 * MAX_THREADS)]
    requests: dict[str, Callable[[int], int]] = {
        "allocation": lambda node: served.send(
            Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.pack(0, 0, PAGE_SIZE, 0, 0)
        ),
        "release": lambda node: served.send(Opcode.RELEASE, node, bytes(24)),
    }
    files = list(served.filesystem.files().values())
    for file in files:
        os.posix_fallocate(file.backing.fileno(), 0, PAGE_SIZE)
    with monkeypatch.context() as slow:
        slow.setattr(RestrictedFile, "fallocate_unheard" if what == "allocation" else "put", wait)
        sent = [requests[what](node) for node in nodes]
        for _ in range(MAX_THREADS):
            assert inside.acquire(timeout=PATIENCE), "waited 10 s for the work to begin"
        assert served.ask(Opcode.STATFS) == 0
        served.create()
        assert not inside.acquire(blocking=False)
        assert not set(sent) & served.replies.keys()
        go.set()
        assert [served.reply_to(unique) for unique in sent] == [0] * len(nodes)
    if what == "release":
        for file in files:
            file.put()
    # Once each.
    assert sum(inside.acquire(blocking=False) for _ in nodes) == len(nodes) - MAX_THREADS


def test_a_consumer_that_comes_in_the_middle_is_waited_for_aside(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer, node = Consumer(), served.create()
    file = served.filesystem.files()[node]
    unheard = RestrictedFile.fallocate_unheard

    def register_first(
        self: RestrictedFile, mode: int, offset: int, length: int, abandoned: Callable[[], bool]
    ) -> bool:
        if self is file and not self.notifier_count:
            self.holder = 1
            self.register_notifier(consumer)
        return unheard(self, mode, offset, length, abandoned)

    monkeypatch.setattr(RestrictedFile, "fallocate_unheard", register_first)
    punch = served.punch(node)
    wait_until(lambda: consumer.waiting == 1, "the punch to reach the consumer")
    served.serves()
    consumer.answers.set()
    assert served.reply_to(punch) == 0


def test_a_reference_is_taken_while_memory_is(served: Served) -> None:
    """As PROVE and ``ps`` do."""
    node = served.create()
    file = served.filesystem.files()[node]

    def take() -> None:
        file.get()
        assert file.get_unless_zero()
        for _ in range(2):
            file.put()

    with file._mutex:
        taken = threading.Thread(target=take)
        taken.start()
        taken.join(PATIENCE)
        assert not taken.is_alive(), "waited 10 s for a reference"


@pytest.mark.parametrize(("failure", "errno"), [(MemoryError, ENOMEM), (ValueError, EIO)])
def test_what_a_request_fails_of_is_its_own(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception], errno: int
) -> None:
    def fail(*_: object) -> bytes:
        raise failure

    def no_memory(*_: object) -> None:
        raise MemoryError

    with Served() as served:
        with monkeypatch.context() as patch:
            patch.setattr(served.filesystem, "handle", fail)
            # The log has no memory either.
            patch.setattr(server_module.log, "exception", no_memory)
            assert served.ask(Opcode.GETATTR, body=bytes(16)) == errno
        served.create()


@pytest.mark.parametrize(("errno", "logged"), [(ENOENT, False), (ENODEV, False), (EIO, True)])
def test_a_reply_to_a_caller_that_was_killed_is_no_failure(
    errno: int, logged: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failing = os.write, [True]

    def write(fd: int, data: bytes) -> int:
        if fd != device or not failing:
            return real(fd, data)
        failing.clear()
        raise OSError(errno, "write")

    with Served() as served:
        device = served.server._device
        monkeypatch.setattr(os, "write", write)
        unheard = served.send(Opcode.STATFS)
        served.create()
        assert unheard not in served.replies
        monkeypatch.undo()
    assert bool(caplog.records) is logged


@pytest.mark.parametrize(("call", "done"), [("readv", False), ("readv", True), ("write", False)])
def test_no_request_is_lost_while_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, call: str, done: bool
) -> None:
    """Memory runs out before a call of the server's, or after it has read."""
    real = getattr(os, call)
    short = [3]

    def scarce(fd: int, data: object) -> object:
        if fd != device or not short[0]:
            return real(fd, data)
        short[0] -= 1
        if done:
            real(fd, data)
        raise MemoryError

    with Served() as served:
        device = served.server._device
        monkeypatch.setattr(os, call, scarce)
        while short[0]:
            served.create()
        served.create()
        monkeypatch.undo()


@pytest.mark.parametrize("failure", [OSError(EIO, "readv"), MemoryError(), ValueError()], ids=repr)
def test_a_thread_that_cannot_go_on_ends_the_process(failure: Exception) -> None:
    """Another thread reads, and the main one waits.

    Else /dev/fuse would stay open without a reader.
    """
    child = os.fork()
    if child == 0:
        try:
            _serve_until(failure)
        finally:
            os._exit(2)
    with OwnedFd(os.pidfd_open(child)) as ended:
        done = readable([ended], PATIENCE)
    if not done:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert done, "waited 10 s for the end of a process that cannot serve"
    assert os.waitstatus_to_exitcode(status) == status_of(failure)


def _serve_until(failure: Exception) -> None:
    def fail(*_: object) -> int:
        raise failure

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.readv = fail
    server = FuseServer(OwnedFd(theirs.detach()), FileSystem("v10", max_files=10))
    threading.Thread(target=server.run).start()
    assert not ours.recv(1), "a word of a server that cannot read"
    signal.pause()


def test_only_enodev_ends_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> int:
        raise OSError(ENODEV, "readv")

    monkeypatch.setattr(os, "readv", gone)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, OwnedFd(theirs.detach()) as device:
        thread = threading.Thread(target=FuseServer(device, FileSystem("v10", max_files=10)).run)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "waited 10 s for the end of the mount"
