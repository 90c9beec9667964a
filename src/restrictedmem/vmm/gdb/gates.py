"""Gates that keep the vCPUs of a ``Vmm`` out of the guest while a debugger looks at it.

A closed gate stops its vCPU from entering the guest. A vCPU that is outside because the VMM answers
its exit counts as stopped. It waits at the gate when it enters again.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import final

from restrictedmem import sync
from restrictedmem.protocol import exits
from restrictedmem.vmm.vm import Vcpu
from restrictedmem.vmm.vmm import Vmm


@dataclass(slots=True, eq=False)
class Gate:
    """The gate of a vCPU; the lock of ``Gates`` guards its state."""

    index: int
    vcpu: Vcpu
    open: bool = False
    #: Whether the vCPU is in the guest or about to enter it.
    inside: bool = False
    #: The vCPU's last debug settings: whether to step, and the breakpoints.
    told: tuple[bool, frozenset[int]] = (False, frozenset())


@dataclass(frozen=True, slots=True)
class Stop:
    """An exit that closed its vCPU's gate: a debug exit, or one that the VMM cannot answer."""

    gate: Gate
    why: exits.Exit

    @property
    def wanted(self) -> bool:
        """Say whether the exit occurs again by itself when the vCPU goes on.

        A breakpoint does. A debugger that single-steps one vCPU among several will step it again.
        """
        return isinstance(self.why, exits.Debug)


@final
class Gates:
    """The gates of a VMM, closed at first.

    Only the debugger's thread calls its methods, except ``enter``.
    """

    def __init__(self, vmm: Vmm, wake: int) -> None:
        """Put a gate between ``vmm`` and each of its vCPUs.

        Each stop is counted on the eventfd ``wake``, which stays the caller's.
        """
        self._vmm = vmm
        self._wake = wake
        self._gates = {vcpu: Gate(index, vcpu) for index, vcpu in enumerate(vmm.vcpus)}
        self.all = (*self._gates.values(),)
        self._stops: list[Stop] = []
        #: ``_removed``: gates hold nothing up any more. ``_over``: no vCPU may enter any more.
        self._removed = self._over = False
        self._lock = sync.mutex()
        self._changed = sync.condition(self._lock)
        self._run = vmm.enter
        vmm.enter = self.enter

    def enter(self, vcpu: Vcpu, value: int) -> exits.Exit:
        """Run a vCPU once its gate is open, and return an exit for the VMM (``Vmm.enter``)."""
        gate = self._gates[vcpu]
        while self._wait(gate, entering=True):
            stop = None
            try:
                exit_ = self._run(vcpu, value)
                if not isinstance(exit_, exits.Hypercall | exits.Interrupted):
                    stop = Stop(gate, exit_)
            finally:
                self._leave(gate, stop)
            match exit_:
                case exits.Debug():
                    pass
                case exits.Interrupted():
                    # ``shut`` interrupted it, perhaps too late. If the VMM interrupted it, there is
                    # an outcome.
                    if self._vmm.outcome is not None:
                        return exit_
                case exits.Hypercall():
                    return exit_
                case _:
                    self._wait(gate, entering=False)
                    return exit_
        return exits.Interrupted()

    def _wait(self, gate: Gate, *, entering: bool) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: gate.open or self._removed or self._over)
            gate.inside = entering and not self._over
            return gate.inside

    def _leave(self, gate: Gate, stop: Stop | None) -> None:
        with self._changed:
            gate.inside = False
            if stop is not None and not self._removed:
                gate.open = False
                self._stops.append(stop)
                os.eventfd_write(self._wake, 1)
            self._changed.notify_all()

    def shut(self) -> None:
        """Close every gate, and wait until no vCPU is in the guest.

        Raises:
            OSError: ENOTCONN when the engine is gone.
        """
        with self._changed:
            for gate in self.all:
                gate.open = False
            inside = [gate for gate in self.all if gate.inside]
        for gate in inside:
            gate.vcpu.interrupt()
        with self._changed:
            self._changed.wait_for(lambda: not any(gate.inside for gate in self.all))

    def open(
        self, gates: Sequence[Gate], *, step: Sequence[Gate], breakpoints: frozenset[int]
    ) -> None:
        """Open some gates, after telling each vCPU the breakpoints and whether to step.

        Each vCPU of ``step`` returns after one instruction. Each vCPU returns at any of the
        breakpoints. No gate is opened while a stop waits to be taken.

        Preconditions: all gates are closed.

        Raises:
            OSError: as ``Vcpu.set_guest_debug``.
        """
        if self._stops:
            os.eventfd_write(self._wake, 1)
            return
        for gate in gates:
            told = gate in step, breakpoints
            if gate.told != told:
                gate.vcpu.set_guest_debug(step=told[0], breakpoints=breakpoints)
                gate.told = told
        with self._changed:
            for gate in gates:
                gate.open = True
            self._changed.notify_all()

    def take_stop(self) -> Stop | None:
        """Take the stop to tell the debugger of, or None.

        An exception goes first, because it does not occur again. Further exceptions wait. Debug
        exits are dropped then, because they occur again.

        Preconditions: all gates are closed.
        """
        self._stops.sort(key=lambda stop: stop.wanted)
        if not self._stops:
            return None
        first, *rest = self._stops
        self._stops = [stop for stop in rest if not stop.wanted]
        return first

    def remove(self) -> None:
        """Let every vCPU go on without a debugger and without breakpoints."""
        if not self._over:
            with suppress(OSError):
                # The engine may be gone; the vCPUs find that out by themselves.
                self.shut()
                # No debugger is left to report stops to, and a waiting stop would keep ``open``
                # from clearing the breakpoints.
                self._stops.clear()
                self.open(self.all, step=(), breakpoints=frozenset())
        with self._changed:
            self._removed = True
            self._changed.notify_all()

    def end(self) -> None:
        """Note that the guest has ended or has to end, so no vCPU enters it any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
