"""How a process ended, in words: by which signal, at which limit, with which errno.

Only the parent of a process is told that. For a process that is no child, Linux 6.15 and later tell
it.
"""

import os
import resource
import signal
from contextlib import suppress
from errno import EIO, ENOMEM
from typing import Final, final

from restrictedmem.failure import FAULT, failed
from restrictedmem.fd import OwnedFd
from restrictedmem.service.cgroup import Cgroup

#: For each signal, the limit that was reached.
_LIMITS: Final[dict[int, str]] = {
    signal.SIGXCPU: "the limit on CPU time, ulimit -t",
    signal.SIGXFSZ: "the limit on file sizes, ulimit -f",
}
#: Options of the shell's ulimit, which has them in KiB, except for seconds.
_ULIMITS: Final = {"-v": resource.RLIMIT_AS, "-d": resource.RLIMIT_DATA, "-t": resource.RLIMIT_CPU}
_READY: Final = b"."
#: Most bytes of what is said on a pipe, in one write.
_LONGEST: Final = 1000
_NO_MEMORY: Final = "no memory: ulimit -v, memory.max of its cgroup, or the machine's"


def words_of(status: int, *, cpu_seconds: float = 0.0, oom: str = "") -> str:
    """Say how a process with a wait status ended.

    ``cpu_seconds`` is the CPU time that it took, for a limit that kills without a word. ``oom`` is
    the cgroup in which the kernel meanwhile killed for lack of memory, if it did. The text says
    both as facts. It does not say that they were the cause.
    """
    if not os.WIFSIGNALED(status):
        return _words_of_exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = _LIMITS.get(number, "")
    if number == signal.SIGKILL:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        if most != resource.RLIM_INFINITY and cpu_seconds > most / 2:
            # The kernel limits a sum of ticks, and this is the time that was run: the sums differ.
            why = f"after {cpu_seconds:.1f} of {most} seconds of CPU time, ulimit -Ht"
        elif oom:
            # The kernel may have killed another process of the cgroup.
            why = f"and the kernel killed for want of memory in the cgroup {oom}"
    return f"killed by {name}" + (f", {why}" if why else "")


def limits() -> str:
    """Return the limits that this process passes on, to append to a text; empty if none."""
    found = {option: resource.getrlimit(kind)[0] for option, kind in _ULIMITS.items()}
    words = [
        f"ulimit {option} {most >> 10 if option != '-t' else most}"
        for option, most in found.items()
        if most != resource.RLIM_INFINITY
    ]
    return f", under {', '.join(words)}" if words else ""


def _words_of_exit(status: int) -> str:
    if status == FAULT:
        return "a fault of its program"
    if status == ENOMEM:
        return _NO_MEMORY
    return os.strerror(status) if status else "it ended by itself"


@final
class Word:
    """A pipe for the outcome of a service's start; the first to speak is heard.

    The service says on it that it is ready, or its parent says how it ended. The pipe is made
    before they are forked.
    """

    def __init__(self) -> None:
        self._reader, self._writer = map(OwnedFd, os.pipe())

    def hear(self) -> None:
        """Wait until one of them speaks.

        Raises:
            OSError: the error that was said in place of "ready"; EIO when the service was killed,
                or all its processes have died without a word.
        """
        self._writer.close()
        with self._reader:
            said = os.read(self._reader.fileno(), _LONGEST)
        if said == _READY:
            return
        number, _, words = said.decode(errors="replace").partition(" ")
        raise failed("start", int(number) if number else EIO, words or "its processes died")

    def only_tell(self) -> None:
        """Close the read end, in a process that is to speak."""
        self._reader.close()

    def ready(self) -> None:
        """Say that the service is ready, or has itself told its owner what is wrong."""
        self._tell(_READY)

    def ended(self, status: int, oom: str = "") -> None:
        """Say with which wait status the service ended."""
        number = os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAULT
        self._tell(
            f"{number if 0 < number < FAULT else EIO} {words_of(status, oom=oom)}".encode()[
                :_LONGEST
            ]
        )

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()

    def _tell(self, said: bytes) -> None:
        # The process that waited may be gone.
        with suppress(OSError):
            os.write(self._writer.fileno(), said)
        self.close()


@final
class OomKills:
    """The kernel's kills for lack of memory in this process's cgroup."""

    def __init__(self) -> None:
        #: The cgroup, and the file that counts; empty where there is none.
        self._cgroup, self._path = _counter()
        self._seen = self._count()

    def since(self) -> str:
        """Return the cgroup if the kernel killed there since the last call, else nothing."""
        before, self._seen = self._seen, self._count()
        return self._cgroup if self._seen > before else ""

    def _count(self) -> int:
        with (
            suppress(OSError, ValueError, StopIteration),
            open(self._path, encoding="ascii") as file,
        ):
            return int(next(line for line in file if line.startswith("oom_kill ")).split()[1])
        return 0


def _counter() -> tuple[str, str]:
    """Find the counter of kills.

    It is memory.events of cgroup v2, memory.oom_control of v1 (Linux 4.13).
    """
    own = Cgroup.own()
    if own is None:
        return "", ""
    return own.path, str(
        own.directory / ("memory.events" if own.version == 2 else "memory.oom_control")
    )
