"""Entering and leaving the guest: how a vCPU is stopped, and what it does before it goes on.

Only the vCPU itself can drop the translations that it has cached (its TLB, its translated code),
and only outside the guest. So a thread that takes pages away zaps the entries first. Then it queues
a drop here, and kicks the vCPU until it has exited the guest once. The vCPU makes the queued drops
before it enters again.
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

#: Seconds between kicks. One kick may be lost, because Unicorn forgets an emu_stop that comes just
#: before emu_start. A second kick is not lost.
KICK_INTERVAL: Final = 0.0002

#: Ranges that a vCPU drops one by one when it enters, at some 10 µs each. If there are more, it
#: drops everything from the first to the last.
_MOST_STALE: Final = 64

_T = TypeVar("_T")


@final
class EngineVcpu:
    """One vCPU: an engine, and the requests that other threads have left for it."""

    def __init__(self, engine: VcpuEngine) -> None:
        self.engine = engine
        self._lock = sync.mutex()
        self._changed = sync.condition(self._lock)
        #: Whether a run is under way; and whether the vCPU is in the guest.
        self._running = False
        self._in_guest = False
        self._entries = 0
        self._holds = 0
        self._interrupted = False
        self._stale: list[tuple[gfn_t, gfn_t]] = []
        #: Nanoseconds spent running guest code and its faults.
        self.time_in_guest = 0

    # For the vCPU's own thread.

    def run(self) -> Exit:
        """Run the guest until it exits or is interrupted.

        On the way, the vCPU waits out invalidations and kicks.
        """
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
        """Map pages as a read would (KVM_PRE_FAULT_MEMORY), and return how many: at least one.

        It ends early at the first failure, or when the vCPU is interrupted.

        Raises:
            OSError: EINTR; the errnos of ``VcpuEngine.prefault``; each only before the first page.
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
        """Pass on the value that the last exit asked for."""
        with self._changed:
            while self._holds:
                self._changed.wait()
            self.engine.complete(value)

    @contextmanager
    def outside(self) -> Generator[None]:
        """Keep slots from being changed meanwhile.

        The vCPU's own thread uses it when it has the engine do something outside the guest.
        """
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

    # For any other thread.

    def interrupt(self) -> None:
        """Make ``run`` return ``Interrupted``: the present call, or else the next.

        Return when the present call has left the guest for that.
        """
        with self._changed:
            self._interrupted = True
            self.engine.kick()
            while self._interrupted and self._running:
                self._changed.wait(KICK_INTERVAL)
                self.engine.kick()

    def request_drop(self, start: gfn_t, end: gfn_t) -> int | None:
        """Queue a range that the vCPU drops before it enters again.

        Return the number of the stay in the guest that has to end first; None outside the guest.
        """
        with self._changed:
            self._stale.append((start, end))
            if len(self._stale) > _MOST_STALE:
                starts, ends = zip(*self._stale, strict=True)
                self._stale = [(min(starts), max(ends))]
            return self._entries if self._in_guest else None

    def send_out(self, stay: int) -> None:
        """Kick the vCPU until it has ended a stay in the guest.

        Preconditions: not the vCPU's own thread; no lock held that a fault needs.
        """
        with self._changed:
            while self._in_guest and self._entries == stay:
                self.engine.kick()
                self._changed.wait(KICK_INTERVAL)

    def hold(self) -> None:
        """Stop the vCPU and keep it out of the guest until ``release``.

        Other vCPUs may have to wait for their turn meanwhile.
        """
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
    """All vCPUs of a VM. Only the VM's thread appends to them; any thread may read them."""

    def __init__(self) -> None:
        self.all: tuple[EngineVcpu, ...] = ()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Return when no vCPU uses a translation of a range that was zapped before the call.

        Preconditions: not a vCPU's own thread; no lock held that a fault needs.
        """
        # All vCPUs get the request before the first is sent out (kvm_make_all_cpus_request). Where
        # they take turns, a vCPU that leaves lets another in. A vCPU that got the request before it
        # entered need not leave.
        for vcpu, stay in [(vcpu, vcpu.request_drop(start, end)) for vcpu in self.all]:
            if stay is not None:
                vcpu.send_out(stay)

    def held(self) -> "_Held":
        """Keep every vCPU out of the guest meanwhile."""
        return _Held(self.all)


@final
class _Held:
    """Some vCPUs that are kept out of the guest inside ``with``.

    It is no generator: that would take as long as all else with which a slot's change begins.
    """

    __slots__ = ("_vcpus",)

    def __init__(self, vcpus: tuple[EngineVcpu, ...]) -> None:
        self._vcpus = vcpus

    def __enter__(self) -> None:
        for vcpu in self._vcpus:
            vcpu.hold()

    def __exit__(self, *_: object) -> None:
        for vcpu in self._vcpus:
            vcpu.release()
