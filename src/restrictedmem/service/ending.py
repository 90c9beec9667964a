"""How a process ended, in words: by which signal, at which limit, with which errno.

Its parent alone learns that; of a process that is no child, Linux 6.15 and later tell it.
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

#: By signal, the limit that it says was reached.
_LIMITS: Final[dict[int, str]] = {
    signal.SIGXCPU: "the limit on CPU time, ulimit -t",
    signal.SIGXFSZ: "the limit on file sizes, ulimit -f",
}
#: Options of the shell's, which has them in KiB, but for seconds.
_ULIMITS: Final = {"-v": resource.RLIMIT_AS, "-d": resource.RLIMIT_DATA, "-t": resource.RLIMIT_CPU}
_READY: Final = b"."
#: Bytes of a word, which are written at once.
_LONGEST: Final = 1000
_NO_MEMORY: Final = "no memory: ulimit -v, memory.max of its cgroup, or the machine's"


def words_of(status: int, *, cpu_seconds: float = 0.0, oom: str = "") -> str:
    """Say how a process with a wait status ended.

    ``cpu_seconds`` is the time that it took of processors, for a limit that kills without a word;
    ``oom`` the cgroup in which the kernel killed for want of memory meanwhile, if it did. Of either
    it is said what is known: that it was the cause is not.
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
            # The kernel counts by ticks what it limits, and here what was run: the sums differ.
            why = f"after {cpu_seconds:.1f} of {most} seconds of CPU time, ulimit -Ht"
        elif oom:
            # It may have been another of them.
            why = f"and the kernel killed for want of memory in the cgroup {oom}"
    return f"killed by {name}" + (f", {why}" if why else "")


def limits() -> str:
    """Return which limits this process passes on, in words that follow others; empty when there is none."""
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
    """A pipe on which a service that starts says that it is ready, or its parent how it ended; the first to speak is heard.

    Made before they are forked.
    """

    def __init__(self) -> None:
        self._reader, self._writer = map(OwnedFd, os.pipe())

    def hear(self) -> None:
        """Wait for the word.

        Raises:
            OSError: what is said in place of "ready"; EIO when it was killed, or all have died
                without a word.
        """
        self._writer.close()
        with self._reader:
            said = os.read(self._reader.fileno(), _LONGEST)
        if said == _READY:
            return
        number, _, words = said.decode(errors="replace").partition(" ")
        raise failed("start", int(number) if number else EIO, words or "its processes died")

    def only_tell(self) -> None:
        """Let go of the end to hear with, in a process that is to speak."""
        self._reader.close()

    def ready(self) -> None:
        """Say that the service is ready, or has told its owner itself what is wrong."""
        self._tell(_READY)

    def ended(self, status: int, oom: str = "") -> None:
        """Say with which wait status it ended."""
        number = os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAULT
        self._tell(
            f"{number if 0 < number < FAULT else EIO} {words_of(status, oom=oom)}".encode()[
                :_LONGEST
            ]
        )

    def close(self) -> None:
        """Let go of it."""
        self._reader.close()
        self._writer.close()

    def _tell(self, said: bytes) -> None:
        # Whoever waited may be gone.
        with suppress(OSError):
            os.write(self._writer.fileno(), said)
        self.close()


@final
class OomKills:
    """Whether the kernel killed a process of this one's cgroup for want of memory, since this was asked last."""

    def __init__(self) -> None:
        #: The cgroup, and the file that counts; empty where there is none.
        self._cgroup, self._path = _counter()
        self._seen = self._count()

    def since(self) -> str:
        """Return the cgroup if it did, else nothing."""
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
    """Find the counter of kills: memory.events of cgroup v2, memory.oom_control of v1 (Linux 4.13)."""
    own = Cgroup.own()
    if own is None:
        return "", ""
    return own.path, str(
        own.directory / ("memory.events" if own.version == 2 else "memory.oom_control")
    )
