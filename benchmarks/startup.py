"""Commands from start to end, beside a Python that does nothing."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.common import Figure, Lab, alternate, below

_ROUNDS: Final = 15


def _timed(*arguments: str) -> float:
    """Return the milliseconds that a new interpreter takes with these arguments."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    return (time.perf_counter() - started) * 1e3


def _nothing() -> float:
    return _timed("-c", "pass")


def start(lab: Lab) -> Iterator[Figure]:
    """Measure what the help, the import, an empty guest, and an empty program under exec take."""
    rounds = lab.rounds(_ROUNDS)
    helped = alternate(_nothing, lambda: _timed("-m", "restrictedmem", "--help"), rounds)
    yield helped.figure("restrictedmem --help", "ms", below(150, "under 150 ms"))
    imported = alternate(_nothing, lambda: _timed("-c", "import restrictedmem"), rounds)
    yield imported.figure("import restrictedmem", "ms")
    ran = alternate(
        _nothing,
        lambda: _timed("-m", "restrictedmem", "run", "--memory", "4M", "spin", "empty"),
        rounds,
    )
    yield ran.figure("restrictedmem run of an empty guest", "ms", below(1000, "under 1 s"))
    executed = alternate(
        _nothing, lambda: _timed("-m", "restrictedmem", "exec", "--", "true"), rounds
    )
    above = statistics.median(
        ours - floor for floor, ours in zip(executed.floor, executed.ours, strict=True)
    )
    yield executed.figure("restrictedmem exec of true", "ms")
    yield Figure("  above Python's own start", "ms", None, above, None, below(100, "under 100 ms"))


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {"start": start}
