"""The process that has only the descriptor: it punches and allocates pages."""

import random
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final, final

from restrictedmem.abi import memory
from restrictedmem.stress.board import Lane
from restrictedmem.stress.ground import Ground
from restrictedmem.stress.party import reporting, told_to_stop
from restrictedmem.stress.plan import OPERATIONS, Plan
from restrictedmem.stress.progress import Progress
from restrictedmem.units import PAGE_SHIFT

_BLOCK_PAGES: Final = 512
#: The most pages that one call punches or allocates, except for a block.
MOST_PAGES: Final = 32
#: One pause in so many operations, of at most so many seconds. Without pauses, the guest's pages
#: would be punched all the time, and it would hold none.
_PAUSE_EVERY, _PAUSE = 8, 0.002


@final
class Puncher:
    """A holder of the descriptor with a lane of its own, who can punch and allocate pages."""

    def __init__(self, ground: Ground, lane: Lane, progress: Progress, seed: str) -> None:
        self.ground = ground
        self.lane = lane
        self.progress = progress
        self.random = random.Random(seed)

    def some(self, most: int = MOST_PAGES) -> range:
        """Pick a few consecutive pages, in about half of the cases a single one."""
        count = self.random.choice((1, 1, 1, 2, 8, most))
        start = self.random.randrange(self.ground.pages)
        return range(start, min(start + count, self.ground.pages))

    def punch(self) -> None:
        """Punch a few pages."""
        self.take(self.some())

    def punch_block(self) -> None:
        """Punch 2 MiB, or all pages if there are fewer."""
        blocks = -(-self.ground.pages // _BLOCK_PAGES)
        start = self.random.randrange(blocks) * _BLOCK_PAGES
        self.take(range(start, min(start + _BLOCK_PAGES, self.ground.pages)))

    def take(self, pages: range) -> None:
        """Punch pages, and announce this before and after on the board."""
        with self.lane.taking(pages), self.progress.punching(len(pages)):
            memory.fallocate(
                self.ground.fd, memory.PUNCH, self._at(pages), len(pages) << PAGE_SHIFT
            )

    def allocate(self) -> None:
        """Allocate a few pages; pages that are there keep their content."""
        pages = self.some()
        memory.fallocate(
            self.ground.fd, memory.FallocMode.KEEP_SIZE, self._at(pages), len(pages) << PAGE_SHIFT
        )

    def _at(self, pages: range) -> int:
        return self.ground.offset + (pages.start << PAGE_SHIFT)

    def go_on(self, methods: Mapping[str, Callable[[], None]], over: Callable[[], bool]) -> None:
        """Do one operation after the other until ``over`` returns true."""
        names = list(methods)
        weights = [OPERATIONS[name] for name in names]
        while not over():
            (name,) = self.random.choices(names, weights)
            with self.progress.doing(name):
                methods[name]()
            if not self.random.randrange(_PAUSE_EVERY):
                time.sleep(self.random.random() * _PAUSE)


def be_second(ground: Ground, plan: Plan, progress: Progress, parent: socket.socket) -> None:
    """Do operations on the mere descriptor until the parent says stop, and send a report."""
    with reporting(parent):
        puncher = Puncher(ground, ground.board.lane(1), progress, plan.seed + " second")
        methods: dict[str, Callable[[], None]] = {
            "punch": puncher.punch,
            "punch-block": puncher.punch_block,
            "allocate": puncher.allocate,
        }
        chosen = {name: method for name, method in methods.items() if name in plan.operations}
        if chosen:
            puncher.go_on(chosen, lambda: told_to_stop(parent))
        else:
            parent.recv(1)
