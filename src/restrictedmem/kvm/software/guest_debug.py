"""Debugging of one emulator: breakpoints, single steps and registers (KVM_SET_GUEST_DEBUG).

A breakpoint is a hook on an address. So nothing in the guest's memory is changed, and there may be
any number of breakpoints. A hook costs time whenever its address is executed, even when its
breakpoint is not set. But to set the breakpoint again costs nothing, and debuggers do this at each
step away from a breakpoint.
"""

import struct
from collections.abc import Callable
from typing import Final, final

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.physical import PhysicalMemory
from restrictedmem.kvm.software.uc import Hook, Uc

#: The general registers, in the order of ``struct kvm_regs``.
_REGS: Final = (
    unicorn.RAX,
    unicorn.RBX,
    unicorn.RCX,
    unicorn.RDX,
    unicorn.RSI,
    unicorn.RDI,
    unicorn.RSP,
    unicorn.RBP,
    *range(unicorn.R8, unicorn.R8 + 8),
    unicorn.RIP,
    unicorn.RFLAGS,
)
_LAYOUT: Final = struct.Struct(f"={len(_REGS)}Q")
_SEGMENTS: Final = {
    "cs": unicorn.CS,
    "ds": unicorn.DS,
    "es": unicorn.ES,
    "fs": unicorn.FS,
    "gs": unicorn.GS,
    "ss": unicorn.SS,
}


@final
class GuestDebug:
    """Where a vCPU has to stop, and its registers."""

    def __init__(
        self, uc: Uc, memory: PhysicalMemory, on_breakpoint: Callable[[int, int, int], None]
    ) -> None:
        """Debug nothing yet.

        ``on_breakpoint(uc, address, size)`` is called before the instruction at each address that
        ever had a breakpoint, whether or not it is set.
        """
        self._uc = uc
        self._memory = memory
        self._on_breakpoint = on_breakpoint
        self._hooks: dict[int, Hook] = {}
        self._regs = uc.registers(*_REGS)
        self.step = False
        self.breakpoints: frozenset[int] = frozenset()

    def set(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        """Stop after each instruction, or before those at the breakpoints, from now on."""
        self.step = step
        self.breakpoints = breakpoints
        if self._hooks and not step and not breakpoints:
            with self._memory.maintenance():
                for hook in self._hooks.values():
                    self._uc.unhook(hook)
            self._hooks.clear()
            self._uc.flush_code()
        for address in breakpoints - self._hooks.keys():
            self._hooks[address] = self._uc.hook_code(address, self._on_breakpoint)
            self._uc.stop_inside_blocks()
            # Translated code contains the hooks.
            self._uc.flush_code()

    def has_hook(self, address: int) -> bool:
        """Say whether the instruction at an address has a hook."""
        return address in self._hooks

    def get_regs(self) -> kvm_regs:
        """Return the general registers."""
        return kvm_regs.from_buffer_copy(_LAYOUT.pack(*self._regs.read()))

    def set_regs(self, regs: kvm_regs) -> None:
        """Set the general registers."""
        self._regs.write(_LAYOUT.unpack(bytes(regs)))

    def get_sregs(self) -> kvm_sregs:
        """Return selectors, the bases of FS and GS, and control registers.

        The rest is 0, because flat segments have nothing else to say.
        """
        read = self._uc.read
        sregs = kvm_sregs(
            cr0=read(unicorn.CR0),
            cr2=read(unicorn.CR2),
            cr3=read(unicorn.CR3),
            cr4=read(unicorn.CR4),
        )
        for name, number in _SEGMENTS.items():
            getattr(sregs, name).selector = read(number)
        sregs.fs.base, sregs.gs.base = read(unicorn.FS_BASE), read(unicorn.GS_BASE)
        return sregs
