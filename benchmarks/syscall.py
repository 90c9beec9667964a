"""Programs under ``restrictedmem exec``: the cost of memfd_restricted(2) and of other calls.

The floor of memfd_restricted(2) is a supervisor and a FUSE server in C. Other system calls, and
programs as a whole, should take as long as outside.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks.common import BenchError, Figure, Lab, Pairs, alternate, at_speed, one_core, within
from benchmarks.descriptor import served_by_c

_EXEC: Final = (sys.executable, "-m", "restrictedmem", "exec", "--")
_SOURCE: Final = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv)
{
    for (int i = 0; i < argc; i++)
        puts(argv[i]);
    return strlen(argv[0]) == 0;
}
"""


def _numbers(*command: str, pass_fds: tuple[int, ...] = ()) -> list[int]:
    """Run a program to its end, and return the numbers it printed.

    Raises:
        BenchError: the program fails.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True, pass_fds=pass_fds)
    if done.returncode:
        raise BenchError(
            done.stderr.strip().splitlines()[-1], "restrictedmem doctor says what is missing"
        )
    return [int(word) for word in done.stdout.split()]


def create(lab: Lab) -> Iterator[Figure]:
    """Make a descriptor and close it.

    All processes are on one core, then where the scheduler puts them; one thread calls, then eight.
    """
    supervise, program = lab.program("supervise"), lab.program("create")
    count, rounds = str(lab.amount(2000, 50)), lab.rounds(15)

    def ours(threads: int = 1) -> float:
        return _numbers(*_EXEC, program, count, str(threads))[0] / 1e3

    def floor(root: int) -> float:
        return _numbers(supervise, str(root), program, count, "1", pass_fds=(root,))[0] / 1e3

    with one_core(), served_by_c(lab) as root:
        pinned = alternate(lambda: floor(root), ours, rounds)
    yield pinned.figure("memfd_restricted and close, all on one core", "µs", within(3))
    with served_by_c(lab) as root:
        free = alternate(lambda: floor(root), ours, rounds)
    yield free.figure("  where the scheduler puts them", "µs", within(3))
    threads = alternate(ours, lambda: ours(8), rounds)
    yield threads.figure("  eight threads at once, beside one", "µs", at_speed(1))


def others(lab: Lab) -> Iterator[Figure]:
    """Make calls that the filter allows, beside a filter that allows everything."""
    program, count = lab.program("calls"), lab.amount(100_000, 1000)
    getppid, mmap = Pairs([], []), Pairs([], [])
    for _ in range(lab.rounds(15)):
        floor, ours = _numbers(program, str(count), "1"), _numbers(*_EXEC, program, str(count), "0")
        for pairs, index in ((getppid, 0), (mmap, 1)):
            pairs.floor.append(floor[index] / 1e6)
            pairs.ours.append(ours[index] / 1e6)
    yield getppid.figure("a system call under exec, beside an empty filter", "µs", within(1.02))
    yield mmap.figure("  anonymous mmap and munmap", "µs", within(1.02))


def programs(lab: Lab) -> Iterator[Figure]:
    """Start programs under exec, beside the same programs outside.

    The start of exec itself is another figure (``start``).
    """
    source = Path(lab.directory) / "hello.c"
    source.write_text(_SOURCE)
    compiler = ("cc", "-O2", "-o", str(source.with_suffix("")), str(source))
    repeat, count = lab.program("repeat"), str(lab.amount(10, 1))
    for what, command in (
        ("a Python that does nothing", (sys.executable, "-c", "pass")),
        ("a run of the C compiler", compiler),
    ):

        def outside(command: tuple[str, ...] = command) -> float:
            return statistics.median(_numbers(repeat, count, *command)) / 1e3

        def under(command: tuple[str, ...] = command) -> float:
            return statistics.median(_numbers(*_EXEC, repeat, count, *command)) / 1e3

        pairs = alternate(outside, under, lab.rounds(11))
        yield pairs.figure(f"{what}, under exec", "ms", within(1.05))


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "exec-create": create,
    "exec-others": others,
    "exec-programs": programs,
}
