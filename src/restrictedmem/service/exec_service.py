"""How an owner starts a service: by exec of ``start``, until READY has come.

The process that runs ``start`` is the owner's child. It ends when the service runs. If it dies
before READY, the start has failed.
"""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from errno import ETIMEDOUT
from pathlib import Path
from typing import Final

from restrictedmem.failure import failed
from restrictedmem.fd import OwnedFd, above_standard, receive_with_fds
from restrictedmem.patience import Patience
from restrictedmem.service import wire
from restrictedmem.service.ending import limits, words_of
from restrictedmem.service.options import Options

#: Seconds that a service may take to start.
START_DEADLINE: Final = 30.0

_START: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from restrictedmem.service.start import main; main(sys.argv[2:])"
)
#: Runs first of all, because memory that a process has by then stays charged to its old cgroup.
_ENTER: Final = "import os, sys; fd = int(sys.argv.pop()); os.write(fd, b'0'); os.close(fd); "
#: The directory that an interpreter must have on its path to find this package.
PACKAGE_ROOT: Final = str(Path(__file__).resolve().parent.parent.parent)
#: Seconds that an interpreter that has said nothing may take to end.
_ENDING_DEADLINE: Final = 1.0


def begin(options: Options) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Run ``service.start`` by exec; return the socket for READY, and the process.

    The caller ends the process.

    Raises:
        OSError: as socketpair(2), fork(2) and execve(2).
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            return ours, start_process(theirs, options)
    except BaseException:
        ours.close()
        raise


def start_process(
    theirs: socket.socket,
    options: Options,
    inherited: Sequence[int] = (),
    *,
    own_session: bool = False,
    cgroup: OwnedFd | None = None,
) -> subprocess.Popen[bytes]:
    """Run ``service.start`` by exec, connected to ``theirs``; it ends when the service runs.

    Descriptors in ``inherited`` stay open in all processes that it forks: service, spawner and
    consumers. They share this process's session, and so its scheduling group (sched_autogroup),
    unless ``own_session`` is true. ``cgroup`` is the cgroup.procs of a cgroup for all of them.

    The interpreter is isolated. So neither PYTHON* variables nor the current directory can choose
    what a trusted process imports.
    """
    debug = {name: os.environ[name] for name in ("RESTRICTEDMEM_DEBUG",) if name in os.environ}
    # If the owner has closed its standard descriptors, these may have their numbers, and /dev/null
    # would take their place.
    with ExitStack() as stack:
        entered = () if cgroup is None else (cgroup.fileno(),)
        passed = [
            stack.enter_context(above_standard(fd)).fileno()
            for fd in (theirs.fileno(), *inherited, *entered)
        ]
        command = [sys.executable, "-I", "-c", _START, PACKAGE_ROOT, str(passed[0]), options.dump()]
        if cgroup is not None:
            command[3] = _ENTER + _START
            command.append(str(passed[-1]))
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if debug else subprocess.DEVNULL,
            pass_fds=passed,
            env={"PATH": os.environ.get("PATH", os.defpath), **debug},
            start_new_session=own_session,
        )


def receive_ready(first: socket.socket) -> tuple[bytes, list[OwnedFd]]:
    """Wait for READY; return its body, and the mount and the witness, which the caller owns.

    Raises:
        OSError: the error of the service; ETIMEDOUT when it says nothing; ECONNRESET when it died.
    """
    if not Patience(START_DEADLINE).wait(first.fileno(), select.POLLIN):
        raise failed("start", ETIMEDOUT, f"the service did not come up within {START_DEADLINE:g} s")
    return wire.parse_ready(receive_with_fds(first, wire.MAX_MESSAGE))


def ending_of(process: subprocess.Popen[bytes]) -> str:
    """Return how the process that starts a service ended, and the limits that it was under."""
    try:
        status = process.wait(_ENDING_DEADLINE)
    except subprocess.TimeoutExpired:
        return f"its interpreter is still running{limits()}"
    return (words_of(-status) if status < 0 else f"its interpreter ended with {status}") + limits()
