"""Becoming a program that has the system call.

The filter stays with this process. The supervisor is another process. The process that was started
for the program executes it, so that terminal, signals and status are the program's own. The
supervisor is a child of nobody's: a program that waits for any child must not meet one that it does
not know.
"""

import marshal
import os
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import (
    EACCES,
    EBUSY,
    ECHILD,
    EMFILE,
    ENFILE,
    ENODEV,
    ENOENT,
    ENOEXEC,
    ENOMEM,
    ENOTDIR,
    ENOTSUP,
    ESTALE,
    ETIMEDOUT,
)
from typing import TYPE_CHECKING, Final, NoReturn

from restrictedmem.abi import process, seccomp
from restrictedmem.abi.memory import SYS_memfd_restricted, memfd_restricted
from restrictedmem.child import fork
from restrictedmem.failure import detail_of, failed, named
from restrictedmem.fd import OwnedFd, above_standard, receive_with_fds, refuse_fds, send_with_fds
from restrictedmem.service import SERVER_VARIABLE
from restrictedmem.syscall.filter import TABLES, program
from restrictedmem.syscall.porter import Complaint, Porter
from restrictedmem.syscall.supervisor import Supervisor

if TYPE_CHECKING:
    from restrictedmem.service.client import Service

#: Abstract name of the socket on which programs reach their service. It ends with a word that
#: nobody can guess.
_DOOR_NAME: Final = "restrictedmem-exec/{pid}/{secret}"
_BACKLOG: Final = 64
#: Errors after which execvp(3) looks in the next place.
_ELSEWHERE: Final = (ENOENT, ENOTDIR, ESTALE, ENODEV, ETIMEDOUT)
#: Bytes to read of a file that the kernel cannot execute.
_FIRST: Final = 256
#: Bytes of a supervisor's longest message about its start.
_WORD: Final = 4096
_CANNOT: Final = "the supervisor cannot start"
#: An error as the supervisor tells it: errno, detail, path. ``_READY`` says that it answers calls.
_Told = tuple[int, str, str | None]
_READY: Final[_Told] = (0, "", None)


@dataclass(frozen=True, slots=True)
class CallOptions:
    """The settings for a program's calls of memfd_restricted."""

    number: int = SYS_memfd_restricted
    #: Whether a call of the number that is not memfd_restricted's may be cachestat's.
    cachestat: bool = True
    #: Options of the service that is started at the first call (``service.options.Options``),
    #: unless there is a server.
    api: str = "v10"
    memory_max: int | None = None


def replace(arguments: Sequence[str]) -> NoReturn:
    """Execute a program in this one's place, found as a shell finds it.

    /bin/sh executes a script that names no interpreter.

    Raises:
        OSError: as execvp(3).
    """
    # Python ignores these signals from its start on, and exec would pass that on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    name, refused = arguments[0], failed("exec", ENOENT)
    for path in _places(name):
        try:
            os.execv(path, list(arguments))
        except OSError as error:
            if error.errno == ENOEXEC and _is_text(path):
                with suppress(OSError):
                    os.execv("/bin/sh", ["sh", "--", path, *arguments[1:]])
            if error.errno == EACCES:
                refused = error
            elif error.errno not in _ELSEWHERE:
                raise
    raise refused


def _places(name: str) -> list[str]:
    if "/" in name or not name:
        return [name] if name else []
    # An empty entry is the directory where the program is started.
    return [os.path.join(directory or ".", name) for directory in os.get_exec_path()]


def _is_text(path: str) -> bool:
    """Say whether a file that the kernel cannot execute may be a script for a shell.

    Shells judge it the same way: by its first line.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_FIRST)
    except OSError:
        return False
    return not head.startswith(b"\x7fELF") and b"\0" not in head.partition(b"\n")[0]


def install(call: CallOptions, *, usage: bool = False) -> bool:
    """Put this thread and its future children under a supervisor of its own.

    If it is under one already, leave it to that one. Returns whether the supervisor is its own.
    Then ``SERVER_VARIABLE`` names the socket on which programs reach the service behind their
    descriptors. The supervisor uses the server that this variable named before, if it did. With
    ``usage``, its own service counts what is done.

    Raises:
        OSError: ENOTSUP for a machine whose numbers are not known; as seccomp(2), with EBUSY when a
            filter above has a listener that is not this program's; the error that keeps the
            supervisor from starting. Then this thread may be under a filter whose calls nobody
            answers.
    """
    machine = os.uname().machine
    if machine not in TABLES:
        raise failed("exec", ENOTSUP, f"numbers of system calls on {machine} are not known here")
    name = _DOOR_NAME.format(pid=os.getpid(), secret=os.urandom(8).hex())
    with _starting():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        # Before the filter, because children inherit it.
        with _starting(), _door(name) as door:
            _fork_supervisor(theirs, door, machine, call, usage=usage)
        theirs.close()
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        flags = seccomp.FilterFlag.NEW_LISTENER
        if seccomp.flags_known(flags | seccomp.FilterFlag.WAIT_KILLABLE_RECV):
            flags |= seccomp.FilterFlag.WAIT_KILLABLE_RECV
        try:
            listener = seccomp.install(program(machine, call.number), flags)
        except OSError as error:
            if error.errno == EBUSY and _is_present(call.number):
                return False
            raise
        # If the supervisor has ended, ``_hear`` reports it.
        with listener, suppress(ConnectionError):
            send_with_fds(ours, b"listener", [listener.fileno()])
        _hear(ours)
    os.environ[SERVER_VARIABLE] = "@" + name
    return True


def _door(name: str) -> socket.socket:
    """Return the socket on which programs reach the service.

    It has an abstract name: a path would be left behind if the supervisor were killed.
    """
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Anybody can connect. Dropping a stranger's socket may take as long as it lingers
        # (SO_LINGER).
        refuse_fds(door)
        door.bind("\0" + name)
        door.listen(_BACKLOG)
    except BaseException:
        door.close()
        raise
    return door


def _is_present(number: int) -> bool:
    """Say whether a call of the number already gives a restricted descriptor."""
    try:
        memfd_restricted(number=number).close()
    except OSError:
        return False
    return True


@contextmanager
def _starting() -> Generator[None]:
    """Report an error of the block as one of a supervisor that cannot start."""
    try:
        yield
    except OSError as error:
        raise _cannot(*_words(error)) from None


def _words(error: OSError | MemoryError) -> _Told:
    if isinstance(error, MemoryError):
        return ENOMEM, "", None
    return error.errno or ECHILD, detail_of(error), error.filename


def _cannot(errno: int, detail: str, path: str | None) -> OSError:
    return failed("exec", errno, _CANNOT + (f": {detail}" if detail else ""), path)


def _hear(supervisor: socket.socket) -> None:
    """Wait until the supervisor answers calls.

    Raises:
        OSError: the error that keeps it from that.
    """
    try:
        word = supervisor.recv(_WORD)
    except ConnectionResetError:
        # The supervisor has ended without receiving the listener. Its message comes after that.
        word = supervisor.recv(_WORD)
    told: _Told = marshal.loads(word) if word else (ECHILD, "it was killed", None)
    if told != _READY:
        raise _cannot(*told)


def _tell(channel: socket.socket, told: _Told) -> None:
    # Under an outer supervisor nobody waits for this one's message.
    with suppress(OSError):
        channel.send(marshal.dumps(told), socket.MSG_NOSIGNAL)


def _fork(channel: socket.socket, body: Callable[[], None]) -> int:
    """Fork a child that runs ``body``, and sends an error in it to ``channel``."""

    def telling() -> None:
        try:
            body()
        except (OSError, MemoryError) as error:
            _tell(channel, _words(error))

    return fork(telling)


def _fork_supervisor(
    channel: socket.socket, door: socket.socket, machine: str, call: CallOptions, *, usage: bool
) -> None:
    """Start the supervisor; it waits at ``channel`` for the listener, and reports there.

    The supervisor's parent ends at once. Then it belongs to the process that reaps such orphans:
    init, or the nearest subreaper above this process.

    Raises:
        OSError: EAGAIN, ENOMEM when no process can be made.
    """
    program_pid, subreaper = os.getpid(), process.is_subreaper()
    # The program may be a subreaper. It must not meet a child that it does not know, the service
    # and its processes included.
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 0)
    pending = signal.SIGCHLD in signal.sigpending()
    try:
        child = _fork(
            channel,
            lambda: _be_its_parent(channel, door, machine, call, program_pid, usage=usage),
        )
        # If SIGCHLD is ignored, the kernel reaps the child, and waitpid waits until it has.
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        if not pending:
            _forget_end()
    finally:
        process.prctl(process.PR_SET_CHILD_SUBREAPER, subreaper)


def _forget_end() -> None:
    """Take the pending SIGCHLD of a child that was waited for, if the signal is blocked.

    The program never had that child. Only one signal of a kind is pending, so it may stand for
    another child, too.
    """
    if signal.SIGCHLD in signal.sigpending():
        signal.sigtimedwait({signal.SIGCHLD}, 0)
        with suppress(ChildProcessError):
            if os.waitid(
                os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT
            ):
                os.kill(os.getpid(), signal.SIGCHLD)


def _be_its_parent(
    channel: socket.socket,
    door: socket.socket,
    machine: str,
    call: CallOptions,
    program_pid: int,
    *,
    usage: bool,
) -> None:
    # The soft limit is meant for the program.
    process.raise_fd_limit()
    # The program may have closed its standard descriptors. These sockets must not have their
    # numbers.
    channel, door = (
        socket.socket(fileno=above_standard(sock.fileno()).detach()) for sock in (channel, door)
    )
    with process.proc() as found:
        proc = above_standard(found.fileno())
    with channel, door, proc:
        _fork(
            channel,
            lambda: _supervise(channel, door, proc, machine, call, program_pid, usage=usage),
        )


def _supervise(
    channel: socket.socket,
    door: socket.socket,
    proc: OwnedFd,
    machine: str,
    call: CallOptions,
    program_pid: int,
    *,
    usage: bool,
) -> None:
    # Signals from the terminal are for the program. So are its descriptors: a process that waits
    # for the end of a pipe waits for the program alone.
    os.setpgid(0, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    process.set_name("rmem-supervisor")
    complaint = _complaint(program_pid)
    try:
        null = os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        raise named("open", error) from None
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    kept = () if complaint is None else complaint.filenos()
    process.close_others((channel.fileno(), door.fileno(), proc.fileno(), *kept))
    # With SIGCHLD ignored, no child would be there to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server = os.environ.get(SERVER_VARIABLE)
    os.chdir("/")
    _, fds = receive_with_fds(channel, 16)
    if not fds:
        return

    def start() -> "Service":
        # Import late: a program's start makes calls that stop, and waits for no more than it must.
        from restrictedmem.service.client import Service
        from restrictedmem.service.options import Options

        options = Options(api=call.api, memory_max=call.memory_max, usage=usage)
        return Service.connect(server) if server else Service.start(options)

    with channel:
        porter = Porter(fds[0], door, start, complaint)
        _tell(channel, _READY)
    Supervisor(fds[0], porter, proc, TABLES[machine], call.number, cachestat=call.cachestat).run()


def _complaint(program: int) -> Complaint | None:
    """Keep a program's standard error.

    Returns None where it is closed, or where processes cannot be watched.

    Raises:
        OSError: EMFILE, ENFILE, because nobody could be told why there are no descriptors.
    """
    try:
        return Complaint(program)
    except OSError as error:
        if error.errno in (EMFILE, ENFILE):
            raise
        return None
