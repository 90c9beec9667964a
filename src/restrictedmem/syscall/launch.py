"""Become a program that has the system call: the filter stays with this process, the supervisor is another.

The program is exec'ed by the process that was asked for it, so that its terminal, signals and status are its own. The supervisor is a child
of nobody's: a program that waits for any child must not meet one that it does not know.
"""

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from errno import EBUSY, ENOTSUP
from typing import TYPE_CHECKING, Final, NoReturn

from restrictedmem.abi import process, seccomp
from restrictedmem.abi.memory import SYS_memfd_restricted, memfd_restricted
from restrictedmem.failure import failed
from restrictedmem.fd import above_standard, receive_with_fds, refuse_fds, send_with_fds
from restrictedmem.service import SERVER_VARIABLE
from restrictedmem.syscall.filter import TABLES, program
from restrictedmem.syscall.porter import Complaint, Porter
from restrictedmem.syscall.supervisor import Supervisor

if TYPE_CHECKING:
    from restrictedmem.service.client import Service

#: The name, in the abstract namespace, of the socket where programs reach their service; behind it a word that nobody can guess.
_DOOR_NAME: Final = "restrictedmem-exec/{pid}/{secret}"
_BACKLOG: Final = 64


@dataclass(frozen=True, slots=True)
class Call:
    """What a program's calls of memfd_restricted come to."""

    number: int = SYS_memfd_restricted
    #: Whether a call of the number that is none of memfd_restricted's may be cachestat's.
    cachestat: bool = True
    #: What the service is asked for that is started at the first call (``service.start.Options``), unless there is a server.
    api: str = "v10"
    memory_max: int | None = None


def replace(arguments: Sequence[str]) -> NoReturn:
    """Execute a program in this one's place, found as a shell finds it.

    Raises:
        OSError: as execvp(3).
    """
    # Python ignores them from its start on, and exec would pass that on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(arguments[0], list(arguments))


def install(call: Call, *, usage: bool = False) -> bool:
    """Put this thread and its future children under a supervisor of its own, or leave it to the one it is under already.

    Returns whether it is its own; ``SERVER_VARIABLE`` then names the socket on which programs reach the service behind their descriptors.
    The supervisor uses the server that this variable named before, if it did. ``usage`` has its own service count what is done.

    Raises:
        OSError: ENOTSUP for a machine whose numbers are not known; as seccomp(2), EBUSY when a filter above has a listener that is none of
            this program's.
    """
    machine = os.uname().machine
    if machine not in TABLES:
        raise failed("exec", ENOTSUP, f"numbers of system calls on {machine} are not known here")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    name = _DOOR_NAME.format(pid=os.getpid(), secret=os.urandom(8).hex())
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        # Anybody can connect. To drop a stranger's socket may take as long as it lingers (SO_LINGER).
        refuse_fds(door)
        # It leaves nothing behind, as a path would if the supervisor were killed.
        door.bind("\0" + name)
        door.listen(_BACKLOG)
        # Before the filter, which children inherit.
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
        with listener:
            # It need not have been received before a program begins, whose calls wait for that.
            send_with_fds(ours, b"listener", [listener.fileno()])
    os.environ[SERVER_VARIABLE] = "@" + name
    return True


def _is_present(number: int) -> bool:
    """Say whether a call of the number already gives a restricted descriptor."""
    try:
        memfd_restricted(number=number).close()
    except OSError:
        return False
    return True


def _fork_supervisor(channel: socket.socket, door: socket.socket, machine: str, call: Call, *, usage: bool) -> None:
    """Start the supervisor, as a grandchild that init inherits."""
    program_pid = os.getpid()
    child = os.fork()
    if child:
        # Where SIGCHLD is ignored the kernel reaps it, and this waits until it has.
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        return
    status = 1
    try:
        if os.fork() == 0:
            _supervise(channel, door, machine, call, program_pid, usage=usage)
        status = 0
    finally:
        os._exit(status)


def _supervise(channel: socket.socket, door: socket.socket, machine: str, call: Call, program_pid: int, *, usage: bool) -> None:
    # What a terminal sends is for the program, and so are its descriptors: who waits for the end of a pipe waits for the program alone.
    os.setpgid(0, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    process.set_name("rmem-supervisor")
    complaint: Complaint | None = None
    with suppress(OSError):
        complaint = Complaint(program_pid)
    # The program may have closed its standard descriptors; these are not to be in their place.
    channel, door = (socket.socket(fileno=above_standard(sock.fileno()).detach()) for sock in (channel, door))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    process.close_others((channel.fileno(), door.fileno(), *(() if complaint is None else complaint.filenos())))
    # Or a child would not be there to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server = os.environ.get(SERVER_VARIABLE)
    os.chdir("/")
    with channel:
        _, fds = receive_with_fds(channel, 16)
    if not fds:
        return

    def start() -> "Service":
        # Late: a program's start makes calls that stop, and waits for no more than it must.
        from restrictedmem.service.client import Service
        from restrictedmem.service.start import Options

        options = Options(api=call.api, memory_max=call.memory_max, usage=usage)
        return Service.connect(server) if server else Service.start(options)

    Supervisor(fds[0], Porter(fds[0], door, start, complaint), TABLES[machine], call.number, cachestat=call.cachestat).run()
