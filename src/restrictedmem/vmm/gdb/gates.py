"""A gate before each vCPU of a running ``Vmm``: shut, it keeps the vCPU out of the guest, for a debugger to look at it.

A vCPU that is outside anyway, because the VMM answers its exit, counts as stopped, and meets the
gate when it wants to enter.
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
    """The gate of a vCPU; its state is guarded by the lock of ``Gates``."""

    index: int
    vcpu: Vcpu
    open: bool = False
    #: Whether the vCPU is in the guest, or about to enter.
    inside: bool = False
    #: What the vCPU was last told: whether to step, and the breakpoints.
    told: tuple[bool, frozenset[int]] = (False, frozenset())


@dataclass(frozen=True, slots=True)
class Stop:
    """An exit that shut the vCPU's gate: one that a debugger wants, or that the VMM cannot answer."""

    gate: Gate
    why: exits.Exit

    @property
    def wanted(self) -> bool:
        """Whether it comes again by itself when the vCPU goes on: a breakpoint does, and who steps one vCPU of many steps on."""
        return isinstance(self.why, exits.Debug)


@final
class Gates:
    """The gates of a VMM, shut at first. Methods are the debugger's thread's to call, but for ``enter``."""

    def __init__(self, vmm: Vmm, wake: int) -> None:
        """Come between ``vmm`` and its vCPUs; each stop is counted on the eventfd ``wake``, which stays the caller's."""
        self._vmm = vmm
        self._wake = wake
        self._gates = {vcpu: Gate(index, vcpu) for index, vcpu in enumerate(vmm.vcpus)}
        self.all = (*self._gates.values(),)
        self._stops: list[Stop] = []
        #: Whether nothing is held up any more, and whether nothing is run.
        self._removed = self._over = False
        self._lock = sync.mutex()
        self._changed = sync.condition(self._lock)
        self._run = vmm.enter
        vmm.enter = self.enter

    def enter(self, vcpu: Vcpu, value: int) -> exits.Exit:
        """Run a vCPU when its gate is open (``Vmm.enter``); returns what is for the VMM to answer."""
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
                    # By ``shut``, or too late for it; when the VMM wants it, there is an outcome.
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
        """Shut every gate, and wait until no vCPU is in the guest.

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
        """Open some gates; a vCPU of ``step`` comes back after one instruction, each at any of the breakpoints. All are shut.

        None is opened while a stop waits to be taken.

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
        """Take the stop that a debugger is to be told of, if there is one. All gates are shut.

        Of several, an exception goes first, and waits if it is not the only one, for it does not
        come again.
        """
        self._stops.sort(key=lambda stop: stop.wanted)
        if not self._stops:
            return None
        first, *rest = self._stops
        self._stops = [stop for stop in rest if not stop.wanted]
        return first

    def remove(self) -> None:
        """Let every vCPU go on by itself, without breakpoints."""
        if not self._over:
            with suppress(OSError):
                # The engine may be gone, which the vCPUs find out by themselves.
                self.shut()
                # Nobody is left to be told, and a stop that waits would keep the breakpoints set.
                self._stops.clear()
                self.open(self.all, step=(), breakpoints=frozenset())
        with self._changed:
            self._removed = True
            self._changed.notify_all()

    def end(self) -> None:
        """Take note that the guest has ended or is to end: no vCPU enters it any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
