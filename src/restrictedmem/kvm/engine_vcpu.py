"""Entering and leaving the guest: how a vCPU is stopped, and what it does before it goes on.

Translations that a vCPU has cached (its TLB, its translated code) can be dropped only by itself and
only outside the guest. So who takes pages away zaps the entries first, then leaves word here and
kicks until the vCPU is out of the guest once; the vCPU drops what was named before it enters again.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EINTR
from functools import partial
from typing import Final, TypeVar, final

from restrictedmem import sync
from restrictedmem.kvm.engine import VcpuEngine
from restrictedmem.protocol.exits import Exit, Interrupted
from restrictedmem.units import gfn_t

#: Seconds between kicks. One kick may be lost (Unicorn forgets an emu_stop that comes just before
#: emu_start), a second one is not.
KICK_INTERVAL: Final = 0.0002

#: Ranges that a vCPU drops one by one when it enters, some 10 µs each; of more it drops all that
#: lies between the first and the last.
_MOST_STALE: Final = 64

_T = TypeVar("_T")


@final
class EngineVcpu:
    """One vCPU: an engine, and the word that other threads leave for it."""

    def __init__(self, engine: VcpuEngine) -> None:
        self.engine = engine
        self._lock = sync.mutex()
        self._changed = sync.condition(self._lock)
        #: Whether a run is under way, and the guest's code with it.
        self._running = False
        self._in_guest = False
        self._entries = 0
        self._holds = 0
        self._interrupted = False
        self._stale: list[tuple[gfn_t, gfn_t]] = []
        #: Nanoseconds spent running guest code and its faults.
        self.time_in_guest = 0

    # Its own thread.

    def run(self) -> Exit:
        """Run the guest until it exits or is interrupted, waiting out invalidations and kicks on the way."""
        try:
            while self._goes_on():
                exit_ = self._inside(self.engine.run)
                if exit_ is not None:
                    return exit_
        finally:
            self._running = False
        return Interrupted()

    def _goes_on(self) -> bool:
        with self._changed:
            self._running = True
            if not self._interrupted:
                return True
            self._interrupted = False
            self._changed.notify_all()
            return False

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Map pages as a read would (KVM_PRE_FAULT_MEMORY), until it fails or the vCPU is interrupted; returns how many, at least one.

        Raises:
            OSError: EINTR; what ``VcpuEngine.prefault`` raises; each only before the first page.
        """
        done = start
        try:
            while done < end:
                if self._interrupted:
                    raise OSError(EINTR, "prefault: interrupted")
                done = gfn_t(done + self._inside(partial(self.engine.prefault, done, end)))
        except OSError:
            if done == start:
                raise
        return done - start

    def complete(self, value: int) -> None:
        """Give the value that the last exit asked for."""
        with self._changed:
            while self._holds:
                self._changed.wait()
            self.engine.complete(value)

    @contextmanager
    def outside(self) -> Generator[None]:
        """Keep slots from being changed while the vCPU's own thread has the engine do something outside the guest."""
        with self._changed:
            while self._holds:
                self._changed.wait()
            yield

    def _inside(self, act: Callable[[], _T]) -> _T:
        self.engine.settle()
        self._enter()
        started = time.perf_counter_ns()
        try:
            return act()
        finally:
            self.time_in_guest += time.perf_counter_ns() - started
            self._leave()

    def _enter(self) -> None:
        with self._changed:
            while self._holds:
                self._changed.wait()
            for start, end in self._stale:
                self.engine.drop(start, end)
            self._stale.clear()
            self._in_guest = True
            self._entries += 1

    def _leave(self) -> None:
        with self._changed:
            self._in_guest = False
            self._changed.notify_all()

    # Any other.

    def interrupt(self) -> None:
        """Make ``run`` return ``Interrupted``: the one under way, or else the next; returns when it has left the guest for that."""
        with self._changed:
            self._interrupted = True
            self.engine.kick()
            while self._interrupted and self._running:
                self._changed.wait(KICK_INTERVAL)
                self.engine.kick()

    def request_drop(self, start: gfn_t, end: gfn_t) -> int | None:
        """Have the vCPU drop a range before it enters again; returns the stay in the guest that has to end first, if there is one."""
        with self._changed:
            self._stale.append((start, end))
            if len(self._stale) > _MOST_STALE:
                starts, ends = zip(*self._stale, strict=True)
                self._stale = [(min(starts), max(ends))]
            return self._entries if self._in_guest else None

    def send_out(self, stay: int) -> None:
        """Return when the vCPU has left the guest that it was in.

        Preconditions: not the vCPU's own thread; no lock held that a fault needs.
        """
        with self._changed:
            while self._in_guest and self._entries == stay:
                self.engine.kick()
                self._changed.wait(KICK_INTERVAL)

    def hold(self) -> None:
        """Stop the vCPU and keep it out of the guest until ``release``; other vCPUs may have to wait for their turn as long."""
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
class EngineVcpus:
    """All vCPUs of a VM; appended to by the VM's thread, walked by any."""

    def __init__(self) -> None:
        self.all: tuple[EngineVcpu, ...] = ()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Return when no vCPU uses a translation of a range that was zapped before the call.

        Preconditions: not a vCPU's own thread; no lock held that a fault needs.
        """
        # All are told before the first is sent out (kvm_make_all_cpus_request): where they take
        # turns, who leaves lets another in, and one that was told before it came in need not leave.
        for vcpu, stay in [(vcpu, vcpu.request_drop(start, end)) for vcpu in self.all]:
            if stay is not None:
                vcpu.send_out(stay)

    def held(self) -> "_Held":
        """Keep every vCPU out of the guest meanwhile."""
        return _Held(self.all)


@final
class _Held:
    """Some vCPUs, out of the guest inside ``with``; by hand, for a generator takes as long as all else that a slot's change begins with."""

    __slots__ = ("_vcpus",)

    def __init__(self, vcpus: tuple[EngineVcpu, ...]) -> None:
        self._vcpus = vcpus

    def __enter__(self) -> None:
        for vcpu in self._vcpus:
            vcpu.hold()

    def __exit__(self, *_: object) -> None:
        for vcpu in self._vcpus:
            vcpu.release()
