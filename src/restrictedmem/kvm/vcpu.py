"""Entering and leaving the guest: how a vCPU is stopped, and what it does before it goes on.

Translations that a vCPU has cached (its TLB, its translated code) can be dropped only by itself and only outside the guest. So who takes
pages away zaps the entries first, then leaves word here and kicks until the vCPU is out of the guest once; the vCPU drops what was named
before it enters again.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

from restrictedmem import sync
from restrictedmem.kvm.engine import VcpuEngine
from restrictedmem.kvm.exits import Exit
from restrictedmem.units import gfn_t

#: Seconds between kicks. One kick may be lost (Unicorn forgets an emu_stop that comes just before emu_start), a second one is not.
KICK_INTERVAL: Final = 0.0002


@final
class Vcpu:
    """One vCPU: an engine, and the word that other threads leave for it."""

    def __init__(self, engine: VcpuEngine) -> None:
        self.engine = engine
        self._lock = sync.mutex()
        self._changed = sync.condition(self._lock)
        self._in_guest = False
        self._entries = 0
        self._holds = 0
        self._stale: list[tuple[gfn_t, gfn_t]] = []
        #: Nanoseconds spent running guest code and its faults.
        self.time_in_guest = 0

    def run(self) -> Exit:
        """Run the guest until it exits, waiting out invalidations and kicks on the way."""
        while True:
            self.engine.settle()
            self._enter()
            started = time.perf_counter_ns()
            try:
                exit_ = self.engine.run()
            finally:
                self.time_in_guest += time.perf_counter_ns() - started
                self._leave()
            if exit_ is not None:
                return exit_

    def _enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._holds)
            for start, end in self._stale:
                self.engine.drop(start, end)
            self._stale.clear()
            self._in_guest = True
            self._entries += 1

    def _leave(self) -> None:
        with self._changed:
            self._in_guest = False
            self._changed.notify_all()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Return when the vCPU uses no translation of a range that was zapped before the call.

        Preconditions: not the vCPU's own thread; no lock held that a fault needs.
        """
        with self._changed:
            self._stale.append((start, end))
            entries = self._entries
            while self._in_guest and self._entries == entries:
                self.engine.kick()
                self._changed.wait(KICK_INTERVAL)

    def hold(self) -> None:
        """Stop the vCPU and keep it out of the guest until ``release``."""
        with self._changed:
            self._holds += 1
            while self._in_guest:
                self.engine.kick()
                self._changed.wait(KICK_INTERVAL)

    def release(self) -> None:
        """Let a held vCPU enter again."""
        with self._changed:
            self._holds -= 1
            self._changed.notify_all()


@final
class Vcpus:
    """All vCPUs of a VM; appended to by the VM's thread, walked by any."""

    def __init__(self) -> None:
        self.all: tuple[Vcpu, ...] = ()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Return when no vCPU uses a translation of a range that was zapped before the call (``Vcpu.drop``)."""
        for vcpu in self.all:
            vcpu.drop(start, end)

    @contextmanager
    def held(self) -> Generator[None]:
        """Keep every vCPU out of the guest meanwhile."""
        held = self.all
        for vcpu in held:
            vcpu.hold()
        try:
            yield
        finally:
            for vcpu in held:
                vcpu.release()
