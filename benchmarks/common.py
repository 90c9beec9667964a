"""Parts that every benchmark uses: measuring in turns, statistics, the C programs, the table.

A figure compares our code with a floor, the least the same work could cost. The two are measured in
turns in one run, and the ratio is the median of the pairs' ratios. So a machine that is shared, or
that slows down half way, does not decide the result.
"""

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from restrictedmem.service.client import Service
from restrictedmem.service.options import Options

FLOOR: Final = Path(__file__).parent / "floor"
_INCLUDE: Final = FLOOR.parent.parent / "guests" / "include"
#: The core that the parties of a round trip share while it is timed.
_CORE: Final = 0


class BenchError(Exception):
    """The error of a benchmark that cannot run here, with the reason and a hint, a line each."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Aim:
    """The limit of a figure: of its ratio to the floor, or of the value if there is no floor."""

    text: str
    limit: float
    of_ratio: bool = True


def within(times: float) -> Aim:
    """Return the aim of at most ``times`` the floor."""
    return Aim(f"within {times:g}x", times)


def at_speed(share: float) -> Aim:
    """Return the aim of at least this share of the floor's speed."""
    return Aim(f"≥ {share:g} of its speed", 1 / share)


def below(limit: float, text: str) -> Aim:
    """Return the aim of a value under a limit, in the figure's unit."""
    return Aim(text, limit, of_ratio=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: medians in ``unit``, and the median of the pairs' ratios."""

    what: str
    unit: str
    floor: float | None
    ours: float
    ratio: float | None
    aim: Aim | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim was met; None without an aim."""
        if self.aim is None:
            return None
        value = self.ratio if self.aim.of_ratio else self.ours
        return value is not None and value <= self.aim.limit

    def as_data(self) -> dict[str, Any]:
        """Return the figure for JSON."""
        return {**asdict(self), "aim": self.aim and self.aim.text, "met": self.met}

    def as_row(self) -> str:
        """Return the figure as a line of the table."""
        floor = "-" if self.floor is None else f"{self.floor:.4g}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        met = {None: "", True: "met", False: "MISSED"}[self.met]
        aim = self.aim.text if self.aim else "-"
        row = (
            f"{self.what:58} {floor:>8} {self.ours:>8.4g} {self.unit:7} {ratio:>6}  {aim:20} {met}"
        )
        return row.rstrip() + (f"\n    {self.note}" if self.note else "")


HEAD: Final = f"{'what':58} {'floor':>8} {'ours':>8} {'unit':7} {'ratio':>6}  {'aim':20} met"


@dataclass(frozen=True, slots=True)
class Lab:
    """The place where benchmarks run, and how thoroughly; ``quick`` only shows that they run."""

    directory: Path
    quick: bool

    def rounds(self, count: int) -> int:
        """Return how many pairs to measure, after a first pair that does not count."""
        return 1 if self.quick else count

    def amount(self, full: int, quick: int) -> int:
        """Return the amount of work of one measurement: ``full``, or ``quick`` in a quick run."""
        return quick if self.quick else full

    def program(self, name: str) -> str:
        """Return a C program of ``floor/``, compiled at the first call.

        Raises:
            BenchError: there is no compiler, or it fails.
        """
        built = self.directory / name
        if not built.exists():
            compiler = shutil.which("cc") or shutil.which("gcc")
            if compiler is None:
                raise BenchError(
                    "the floors are C programs and there is no C compiler",
                    "apt-get install gcc libc6-dev",
                )
            command = [
                compiler,
                "-O2",
                "-Wall",
                "-I",
                str(_INCLUDE),
                "-o",
                str(built),
                str(FLOOR / f"{name}.c"),
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise BenchError(
                    f"{name}.c does not compile: {done.stderr.strip()}",
                    "apt-get install gcc libc6-dev linux-libc-dev",
                )
        return str(built)

    def run(self, name: str, *arguments: object, pass_fds: Sequence[int] = ()) -> list[int]:
        """Run a C program of ``floor/`` to its end, and return the numbers it printed."""
        command = [self.program(name), *map(str, arguments)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds
        )
        return [int(word) for word in done.stdout.split()]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Values measured in turns: the floor's, and ours."""

    floor: list[float]
    ours: list[float]

    def figure(self, what: str, unit: str, aim: Aim | None = None, note: str = "") -> Figure:
        """Return the medians as a figure."""
        ratio = statistics.median(
            ours / floor for floor, ours in zip(self.floor, self.ours, strict=True)
        )
        return Figure(
            what,
            unit,
            statistics.median(self.floor),
            statistics.median(self.ours),
            ratio,
            aim,
            note,
        )


def alternate(floor: Callable[[], float], ours: Callable[[], float], rounds: int) -> Pairs:
    """Measure the floor and ours in turns.

    The first pair warms caches and memory up, and does not count.
    """
    pairs = [(floor(), ours()) for _ in range(rounds + 1)][1:]
    return Pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that ``percent`` percent of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


@contextmanager
def one_core(*pids: int) -> Generator[None]:
    """Keep this process, its new children, and the threads of ``pids`` on one core.

    A round trip between sleeping cores costs as much as waking a core: a hundred microseconds on a
    virtual machine. The scheduler may then keep one of two servers on the caller's core. That would
    say nothing about either server.
    """
    threads = [0, *(int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task"))]
    before = {thread: os.sched_getaffinity(thread) for thread in threads}
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {_CORE})
        yield
    finally:
        for thread, cores in before.items():
            # The thread may have ended.
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores)


@contextmanager
def service(options: Options | None = None) -> Generator[Service]:
    """Start a service for one benchmark.

    Raises:
        BenchError: the service cannot start.
    """
    try:
        started = Service.start(options)
    except OSError as error:
        raise BenchError(
            f"the service does not start: {error.strerror}",
            "restrictedmem doctor says what is missing",
        ) from None
    with started:
        yield started


@cache
def machine() -> dict[str, str]:
    """Describe the machine and the versions that the figures come from."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        or "unknown",
        "python": platform.python_version(),
        "unicorn": version("unicorn"),
    }


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        rows = (line.split(":", 1) for line in file if ":" in line)
        return next(
            (value.strip() for key, value in rows if key.strip() == "model name"),
            platform.machine(),
        )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
