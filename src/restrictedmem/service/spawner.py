"""The parent of a service and of its consumers.

It is undumpable and holds neither /dev/fuse nor memory. So its children are as safe as the service,
and start without exec. It loads all programs that consumers will execute, and nothing later. When
the service ends, for whatever reason, the spawner kills the consumers. When the spawner ends, the
kernel kills all of them (PR_SET_PDEATHSIG). When a consumer ends, the processes that it has forked
become the spawner's children (PR_SET_CHILD_SUBREAPER), and the spawner kills them, too.
"""

import os
import select
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN, EMFILE, EMSGSIZE
from types import FrameType
from typing import Final, NoReturn

from restrictedmem.abi import process
from restrictedmem.burial import bury
from restrictedmem.child import ends, fork
from restrictedmem.failure import named
from restrictedmem.fd import OwnedFd, close_all, refuse_fds
from restrictedmem.fs.invalidator import Invalidator
from restrictedmem.patience import Patience
from restrictedmem.service import daemon, sealing, wire
from restrictedmem.service.ending import OomKills, Word, words_of
from restrictedmem.service.options import VM, Options, Origin
from restrictedmem.service.privileges import drop_privileges
from restrictedmem.service.program import Programs, Serve
from restrictedmem.service.wire import Channel, Message

#: Seconds that killed consumers may take to end. The kernel may hold one for as long as a file
#: system's server likes.
_END: Final = 5.0
#: Most ends of children that one read reports.
_ENDED_AT_ONCE: Final = 4096


def run(
    owner: Channel,
    options: Options,
    origin: Origin,
    word: Word,
    invalidator: Invalidator | None,
) -> NoReturn:
    """Fork the service, and consumers as it asks, until it ends.

    ``word`` is told when the service ends before it was ready.

    Preconditions: this process is undumpable, leads a process group, and has no other thread.
    """
    process.set_name("rmem-spawner")
    # Descriptors come from the service alone, which has made them itself.
    channel, theirs = Channel.pair("service", takes_fds=True)
    endings, heard = Channel.pair("service")
    refuse_fds(heard)
    service = _fork(
        lambda: _service(
            owner,
            Channel(theirs, "spawner", takes_fds=True),
            Channel(heard, "spawner"),
            [channel, endings],
            options,
            origin,
            word,
            invalidator,
        )
    )
    if invalidator is not None:
        invalidator.close()
    owner.close()
    theirs.close()
    heard.close()
    drop_stdio()
    programs = Programs(options.consumers)
    programs.load(devices=options.become is not None)
    drop_privileges(options.become, keep=1 << process.CAP_IPC_LOCK)
    process.raise_fd_limit()
    # This process must be able to count what a consumer leaves.
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
    sealing.seal()
    channel.reply()
    _Spawner(channel, endings, service, programs, options, word).loop()
    os._exit(0)


def _service(
    owner: Channel,
    spawner: Channel,
    endings: Channel,
    parents: list[Channel],
    options: Options,
    origin: Origin,
    word: Word,
    invalidator: Invalidator | None,
) -> None:
    for parent in parents:
        parent.close()
    process.set_name("rmem-service")
    drop_stdio()
    daemon.run(owner, spawner, endings, options, origin, word, invalidator)


class _Spawner:
    def __init__(
        self,
        channel: Channel,
        endings: Channel,
        service: int,
        programs: Programs,
        options: Options,
        word: Word,
    ) -> None:
        self._channel = channel
        self._endings = endings
        self._programs = programs
        self._options = options
        self._service = service
        self._word = word
        # Not poll(2): it fails where the limit on descriptors is below the number of those to
        # watch.
        self._poll = select.epoll()
        self._pidfds: dict[int, OwnedFd] = {}
        # A pipe gets a byte for each child that ends: processes that consumers leave have no pidfd
        # here.
        self._ended, self._ends = map(OwnedFd, os.pipe())
        for end in (self._ended, self._ends):
            os.set_blocking(end.fileno(), False)
        signal.signal(signal.SIGCHLD, _note)
        signal.set_wakeup_fd(self._ends.fileno(), warn_on_full_buffer=False)
        #: Numbers of the consumers in these processes, by pid.
        self._numbers: dict[int, int] = {}
        #: Sessions of VMs' engines. An engine leaves its checker, which ends by itself.
        self._engines: set[int] = set()
        self._oom = OomKills()
        #: Sockets that the service may still have open.
        self._to_bury: list[socket.socket] = []

    def loop(self) -> None:
        """Serve the service until its end of the channel closes, then end all consumers.

        Every child is killed. Those that end in time are reaped.
        """
        for fd in (self._channel.fileno(), self._ended.fileno()):
            self._poll.register(fd, select.EPOLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._channel.fileno():
                    if not self._serve():
                        self._end()
                        return
                elif fd == self._ended.fileno():
                    os.read(fd, _ENDED_AT_ONCE)
                    # Without a free number, this is done at the next end of a child.
                    with suppress(OSError):
                        self._kill_left()
                else:
                    self._poll.unregister(fd)
                    self._reap(fd)
            self._reap_left()

    def _serve(self) -> bool:
        """Do what the service asks for next; return false when the service is gone.

        An error at a limit of this process concerns one consumer, and no other.
        """
        try:
            message = self._channel.receive()
        except OSError as error:
            # Without a free number the kernel cuts descriptors off. They are FORK's: BURY has one,
            # and a FORK leaves more than that free.
            number = EMFILE if error.errno == EMSGSIZE else error.errno
            self._channel.reply_error(OSError(number, error.strerror))
            return True
        if message is None:
            return False
        if message.number == wire.FORK.number:
            try:
                pidfd = self._consumer(message)
                self._channel.reply(fds=[pidfd.fileno()])
            except OSError as error:
                self._channel.reply_error(error)
            finally:
                close_all(message.fds)
        elif message.number == wire.BURY.number:
            if message.fds:
                self._to_bury.append(socket.socket(fileno=message.take_fd().detach()))
            else:
                # The service has closed its own copies.
                while self._to_bury:
                    bury(self._to_bury.pop())
        return True

    def _consumer(self, message: Message) -> OwnedFd:
        """Fork a consumer; return its pidfd, which stays this process's.

        Raises:
            OSError: EAGAIN beyond the service's limit; EAGAIN, ENOMEM, EMFILE as fork(2) and
                pidfd_open(2); the error of loading its program.
        """
        limit = self._options.max_consumers
        if limit is not None and self._descendants() >= limit:
            raise OSError(
                EAGAIN, f"this service has {limit} consumers, counting those that cannot end"
            )
        name, _, arguments = (
            message.body[wire.NUMBER.size :].decode(errors="replace").partition(" ")
        )
        program = self._programs.find(name)
        # A kill that is counted from here on may be one of this consumer.
        self._oom.since()
        child = _fork(lambda: self._be(name, program, message.fds, arguments))
        try:
            pidfd = OwnedFd(os.pidfd_open(child))
        except OSError as error:
            # Kill it. It is reaped at its end like a process that a consumer leaves, and nobody
            # waits for it.
            os.kill(child, signal.SIGKILL)
            raise named("pidfd_open", error) from None
        self._pidfds[child] = pidfd
        # A consumer's session has the consumer's pid as its number. No session of an earlier
        # process with that pid is left.
        self._engines.discard(child)
        if name == VM:
            self._engines.add(child)
        (self._numbers[child],) = wire.NUMBER.unpack_from(message.body)
        self._poll.register(pidfd.fileno(), select.EPOLLIN)
        return pidfd

    def _descendants(self) -> int:
        """Count the consumers, and the processes that ended consumers have left (``run``).

        Such a process is a checker that a FUSE server of the owner's holds in state D.
        """
        self._reap_left()
        return len(self._children() - {self._service})

    def _children(self) -> set[int]:
        """Return the children of this process, as far as the kernel tells."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:
                return set(map(int, children.read().split()))
        except FileNotFoundError:
            # This is a kernel without CONFIG_PROC_CHILDREN.
            return {self._service, *self._pidfds}

    def _kill_left(self) -> list[int]:
        """Kill the processes that ended consumers had forked, and return them."""
        sessions = {
            child: os.getsid(child) for child in self._children() - {self._service, *self._pidfds}
        }
        self._engines &= {*self._pidfds, *sessions.values()}
        left = [child for child, session in sessions.items() if session not in self._engines]
        for child in left:
            # The process may execute a set-uid program.
            with suppress(PermissionError):
                os.kill(child, signal.SIGKILL)
        return left

    def _reap_left(self) -> None:
        """Reap the processes that ended consumers have left, and those of burials."""
        known = {self._service, *self._pidfds}
        # If several have ended, waitid tells only the first. A known one is reaped elsewhere, in
        # another turn.
        while (
            ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ) and ended.si_pid not in known:
            os.waitpid(ended.si_pid, 0)

    def _be(self, name: str, program: Serve, fds: list[OwnedFd], arguments: str) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._channel.close()
        self._endings.close()
        self._word.close()
        self._poll.close()
        close_all([*self._pidfds.values(), self._ended, self._ends])
        process.set_name(f"rmem-{name}")
        # A scheduling group of its own (sched_autogroup): a guest that never rests must not share
        # the service's.
        os.setsid()
        # The processes that its children leave are its own, until it ends.
        process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
        owner, service, notify = (socket.socket(fileno=fd.detach()) for fd in fds)
        program(owner, service, notify, self._options, arguments)

    def _reap(self, fd: int) -> None:
        child = next(child for child, pidfd in self._pidfds.items() if pidfd.fileno() == fd)
        # Its pid may be that of an earlier child that a burial was about to reap.
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)
            _, status, usage = os.wait4(child, 0)
            self._tell_ending(child, status, usage.ru_utime + usage.ru_stime)
        del self._numbers[child]
        self._pidfds.pop(child).close()

    def _tell_ending(self, child: int, status: int, cpu_seconds: float) -> None:
        oom = self._oom.since() if os.WIFSIGNALED(status) else ""
        words = words_of(status, cpu_seconds=cpu_seconds, oom=oom)
        # A service that does not receive it now has no use for it.
        with suppress(OSError):
            self._endings.post(
                wire.ENDED,
                wire.NUMBER.pack(self._numbers[child]) + words.encode(errors="replace"),
                wait=False,
            )

    def _end(self) -> None:
        for pidfd in self._pidfds.values():
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        patience = Patience(_END)
        for pidfd in self._pidfds.values():
            if patience.wait(pidfd.fileno(), select.POLLIN):
                os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED)
        close_all(list(self._pidfds.values()))
        self._end_left(patience)
        _, status = os.waitpid(self._service, 0)
        self._word.ended(status, self._oom.since())

    def _end_left(self, patience: Patience) -> None:
        """Kill the processes that consumers had forked, until none is left.

        Their own children follow when they have ended. This stops at a process that does not end in
        time.
        """
        while left := self._kill_left():
            for child in left:
                if not ends(child, patience):
                    return
                os.waitpid(child, 0)


def _note(_number: int, _frame: FrameType | None) -> None:
    """Let the signal be written to the wake-up descriptor; an ignored signal is not."""


def _fork(body: Callable[[], None]) -> int:
    """Fork a child of the spawner's, which is killed when the spawner ends."""

    def telling() -> None:
        try:
            body()
        except BaseException:
            # Nobody else may read the traceback of a trusted process.
            if os.environ.get("RESTRICTEDMEM_DEBUG"):
                traceback.print_exc()
            raise

    return fork(telling, bound=True)


def drop_stdio() -> None:
    """Replace the owner's terminal and pipes by /dev/null.

    They must not stay open for as long as the service lives.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(2 if os.environ.get("RESTRICTEDMEM_DEBUG") else 3):
        os.dup2(null, fd)
    os.close(null)
