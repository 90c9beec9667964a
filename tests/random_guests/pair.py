"""The two engines side by side, and a difference between them made small."""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from typing import Final, Self

from restrictedmem.service.client import Service

from . import places
from .compare import difference
from .machines import VCPUS, Machine
from .program import Item, Program, reads_undefined
from .x86 import RSP

ENGINES: Final = ("software", "kernel")
#: Programs that one pair of VMs runs: what a program leaves behind may make a later one fail, which
#: is then told with it.
LIFE: Final = 150
#: Seconds that a program may run.
HANG: Final = 30.0


class Pair:
    """A VM on each engine, for some programs."""

    def __init__(self, service: Service, vcpus: int = VCPUS) -> None:
        """Make the VMs; the service stays the caller's.

        Raises:
            OSError: as ``Machine``.
        """
        with ExitStack() as stack:
            self._threads = stack.enter_context(ThreadPoolExecutor(len(ENGINES)))
            self._machines = [
                stack.enter_context(Machine(service, engine, vcpus)) for engine in ENGINES
            ]
            self._resources = stack.pop_all()
        #: The programs that ran, in order; and how many exits of the last were compared.
        self.history: list[Program] = []
        self.exits = 0

    @property
    def spent(self) -> bool:
        """Whether it is time for another pair."""
        return len(self.history) >= LIFE or any(machine.spent for machine in self._machines)

    def run(self, program: Program) -> str:
        """Run a program on both; returns the difference in words, or nothing."""
        self.history.append(program)
        runs = [self._threads.submit(machine.run, program) for machine in self._machines]
        # On Ctrl-C both are late: the process that closes the VMs waits for the threads that run
        # them.
        late = {*runs}
        try:
            late = wait(runs, HANG).not_done
        finally:
            for machine, run in zip(self._machines, runs, strict=True):
                if run in late:
                    machine.stop()
        software, kernel = (run.result() for run in runs)
        self.exits = len(kernel.events)
        return difference(program, software, kernel)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def differs_after(service: Service, before: Sequence[Program], program: Program) -> str:
    """Run a program in new VMs after some others.

    A storm runs several times, because it depends on chance.
    """
    for _ in range(10 if program.storm else 1):
        with Pair(service, vcpus=len(before) + 1) as pair:
            for earlier in before:
                pair.run(earlier)
            found = pair.run(program)
        if found:
            return found
    return ""


def kind_of(difference: str) -> str:
    """Return the key by which two differences count as the same while a program is reduced."""
    return re.sub(r"^event \d+|0x[0-9a-f]+|\d{4,}|\b[0-9a-f]{32}\b", "#", difference)[:60]


class _Shrinking:
    """A program that differs, and what its difference is, while it becomes smaller."""

    def __init__(self, program: Program, differs: Callable[[Program], str]) -> None:
        self.program = program
        self._differs = differs
        self.difference = differs(program)
        self._kind = kind_of(self.difference)

    def take(self, candidate: Program) -> bool:
        """Go on with another program if it differs in the same way."""
        if any(True for _ in reads_undefined(candidate)):
            return False
        seen = self._differs(candidate)
        if kind_of(seen) != self._kind:
            return False
        self.program, self.difference = candidate, seen
        return True

    def take_without(self, size: int) -> bool:
        """Leave out runs of items, wherever that can be; says whether it could."""
        changed, at = False, 0
        while at < len(self.program.items):
            if any(self.take(candidate) for candidate in _without(self.program, at, size)):
                changed = True
            else:
                at += size
        return changed


def shrink(program: Program, differs: Callable[[Program], str]) -> tuple[Program, str]:
    """Remove all parts of a program that its difference does not need.

    Returns the rest and the difference.
    """
    small = _Shrinking(program, differs)
    small.take(replace(small.program, storm=False))
    small.take(replace(small.program, punched=frozenset(), unmended=frozenset()))
    small.take(
        replace(
            small.program,
            private=frozenset(page for page, private in places.AT_REST.items() if private),
        )
    )
    size = max(1, len(program.items) // 2)
    while small.take_without(size) or size > 1:
        size = max(1, size // 2)
    small.take(replace(small.program, actions=()))
    for number in range(16):
        registers = (*small.program.registers[:number], 0, *small.program.registers[number + 1 :])
        if number != RSP and registers != small.program.registers:
            small.take(replace(small.program, registers=registers))
    return small.program, small.difference


def _without(program: Program, at: int, size: int) -> Iterator[Program]:
    """Yield the program without some items, the rest where it was before or behind them."""
    left = (*program.items[:at], *program.items[at + size :])
    bytes_gone = sum(
        len(piece.code) for item in program.items[at : at + size] for piece in item.pieces
    )
    yield replace(program, items=left)
    if program.before_border >= bytes_gone:
        yield replace(program, items=left, before_border=program.before_border - bytes_gone)
    if size == 1 and len(program.items[at].pieces) > 1:
        yield from _without_pieces(program, at)


def _without_pieces(program: Program, at: int) -> Iterator[Program]:
    item = program.items[at]
    if any(piece.jump is not None and piece.jump.item == item.number for piece in item.pieces):
        return
    for index in range(len(item.pieces)):
        pieces = item.pieces[:index] + item.pieces[index + 1 :]
        yield replace(
            program,
            items=(*program.items[:at], Item(item.number, pieces), *program.items[at + 1 :]),
        )
