"""The order in which a service starts, so that its owner cannot look into it.

The owner runs this by exec. Until PR_SET_DUMPABLE is 0 a process of the same user may open
/proc/PID/mem or attach, and keeps what it opened; so this process takes neither /dev/fuse nor
memory. It forks once it is undumpable and untraced: a child's memory is new, and nobody holds a way
into it. No process of a service enters a user namespace but those that mount, for a moment
(``fs.mounter``).
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from errno import EINVAL, ENOMEM, EPERM
from math import inf
from types import NoneType
from typing import Any, Final, NoReturn, Self, cast

from restrictedmem.abi import process
from restrictedmem.failure import failed, status_of
from restrictedmem.fd import peer_credentials, refuse_fds
from restrictedmem.mm import design
from restrictedmem.mm.notifier import Api
from restrictedmem.service import program, spawner
from restrictedmem.service.ending import Word
from restrictedmem.service.wire import Channel

_TRACED: Final = "the service is being traced; strace -f does that, strace without -f and restrictedmem exec -- strace -f PROG do not"


def _is(*kinds: type) -> Callable[[Any], bool]:
    """Return a check that a value is exactly of one of some types, and, where it is a number, one that counts something."""
    return lambda value: (
        type(value) in kinds and (type(value) not in (int, float) or 0 <= value < inf)
    )


def _is_pair(kind: type, value: Any) -> bool:
    return type(value) is tuple and [type(each) for each in cast("tuple[object, ...]", value)] == [
        kind,
        kind,
    ]


#: What values of ``Options`` are like: they come over a command line.
_FITS: Final[dict[str, Callable[[Any], bool]]] = {
    "api": lambda value: value in [api.value for api in Api],
    "design": _is(str, NoneType),
    "memory_max": _is(int, NoneType),
    "backing": _is(str),
    "pin": _is(bool),
    "consumers": lambda value: all(_is_pair(str, each) for each in value),
    "max_consumers": _is(int, NoneType),
    "usage": _is(bool),
    "deadline": _is(float, int),
    "become": lambda value: value is None or _is_pair(int, value),
    "signing_key": _is(str, NoneType),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What an owner may ask of the service it starts."""

    api: str = "v10"
    #: What consumers hear (``mm.design.NAMES``); None for that of the posting.
    design: str | None = None
    memory_max: int | None = None
    #: Where pages lie (``mm.backing``): memfd, thp, hugetlb-2m or hugetlb-1g.
    backing: str = "memfd"
    #: Whether consumers keep the pages they take where they are.
    pin: bool = False
    #: Consumers beside the library's own: name and path of the program.
    consumers: tuple[tuple[str, str], ...] = ()
    #: How many consumers there may be at once, those counted that have ended and left a process;
    #: None for no limit.
    max_consumers: int | None = None
    #: Whether to count what owners do, for STATUS.
    usage: bool = False
    #: Seconds a consumer may take to answer an invalidation.
    deadline: float = 5.0
    #: User to become once the mount is made (``serve``); None stays.
    become: tuple[int, int] | None = None
    #: File with the key that reports are signed with; None makes one when it is needed.
    signing_key: str | None = None

    def dump(self) -> str:
        """Return the options as one argument of a command line."""
        return json.dumps(asdict(self))

    def check(self) -> None:
        """Check what can be known without a file or a consumer.

        Raises:
            OSError: EINVAL for a value that is none, a design, or consumers' names.
        """
        for name, fits in _FITS.items():
            if not fits(value := getattr(self, name)):
                raise OSError(EINVAL, f"start options: {name}: {value!r}")
        design.make(self.design or self.api)
        program.check_names(self.consumers)

    @classmethod
    def load(cls, text: str) -> Self:
        """Read what ``dump`` wrote.

        Raises:
            OSError: EINVAL for anything else.
        """
        try:
            fields = json.loads(text)
            if fields["become"] is not None:
                fields["become"] = tuple(fields["become"])
            fields["consumers"] = tuple(tuple(pair) for pair in fields.get("consumers", ()))
            return cls(**fields)
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise OSError(EINVAL, f"start options: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Origin:
    """The process that a service was started for."""

    pid: int
    uid: int


def main(arguments: list[str]) -> None:
    """Start a service: the number of a connected socket, then the options. Returns when it is ready, in processes of its own.

    What goes wrong is told to the owner over the socket, in place of READY.
    """
    # An owner that ignores SIGCHLD passes that on by exec, and nobody could wait for a child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The spawner hears of its children by it, and whoever administers the machine sends others.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    channel = Channel(socket.socket(fileno=int(arguments[0])), "owner")
    try:
        refuse_fds(channel.sock)
        options = Options.load(arguments[1])
        options.check()
        pid, uid, _ = peer_credentials(channel.sock)
        harden()
        refuse_tracer()
        os.chdir("/")
        os.umask(0o077)
        word = Word()
        if os.fork() == 0:
            # A tracer that came between its permission check and ours has the child too
            # (PTRACE_O_TRACEFORK). Later none can come.
            refuse_tracer()
            # A process group of its own: a terminal's interrupt is for its owner. But in the
            # session of its owner, who started it, and so in its scheduling group
            # (sched_autogroup): each call of the owner waits for the service, which must not queue
            # behind other sessions for it. ``serve`` has begun a session for it.
            os.setpgid(0, 0)
            _be_spawner(channel, options, Origin(pid, uid), word)
        word.hear()
    except MemoryError:
        channel.reply_error(failed("start", ENOMEM))
        sys.exit(1)
    except OSError as error:
        channel.reply_error(error)
        sys.exit(1)


def _be_spawner(channel: Channel, options: Options, origin: Origin, word: Word) -> NoReturn:
    word.only_tell()
    try:
        spawner.run(channel, options, origin, word)
    except BaseException as error:  # noqa: BLE001  the child must not go on as a second copy of its parent
        # The owner's socket is the service's by now.
        status = status_of(error)
        word.ended(status << 8)
        os._exit(status)


def refuse_tracer() -> None:
    """Make sure that nobody traces this process.

    Raises:
        OSError: EPERM.
    """
    if process.tracer_pid():
        raise failed("start", EPERM, _TRACED)


def harden() -> None:
    """Refuse dumps, traces and core files.

    Not new privileges: ``Way.FUSERMOUNT`` has still to run a set-uid program.

    Raises:
        OSError: EPERM when this process is dumpable all the same.
    """
    process.prctl(process.PR_SET_DUMPABLE, 0)
    # Against accidents: a seccomp filter may have answered in the kernel's place, and could here,
    # too.
    if process.prctl(process.PR_GET_DUMPABLE):
        raise failed("prctl(PR_SET_DUMPABLE)", EPERM, "the process is dumpable still")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The owner's limit on file sizes is the kernel's to apply, to the owner's calls; under it no
    # memfd here could have its size.
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
