"""The requests that need a debug policy: memory, registers, breakpoints and single steps.

SEV guests have the same bit: without SEV_POLICY_NODBG the host may have memory decrypted
(KVM_SEV_DBG_DECRYPT).
"""

import struct
from collections.abc import Iterator
from ctypes import sizeof
from errno import EFAULT, EOPNOTSUPP, EPERM, EPROTO
from typing import Final

from restrictedmem.abi.kvm_x86 import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
    kvm_guest_debug,
)
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.protocol.guest_abi import HYPERCALL_PAGE
from restrictedmem.protocol.vm_wire import POLICY_DEBUG
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

_WORD: Final = struct.Struct("=Q")
# DR7 (Intel SDM 17.2.4): two enable bits for each register from bit 0 on; four bits of condition
# and length for each register from bit 16 on.
_DR7_CONDITIONS: Final = 16
_REGISTERS: Final = 4


def check_policy(policy: int) -> None:
    """Refuse a request that needs a debug policy, if the VM has none.

    Raises:
        OSError: EPERM without a debug policy.
    """
    if not policy & POLICY_DEBUG:
        raise OSError(
            EPERM,
            "the VM was not made for debugging: registers and private memory are the guest's own",
        )


def parse(body: bytes) -> tuple[bool, frozenset[int]]:
    """Return whether to step, and the breakpoints, from the body of KVM_SET_GUEST_DEBUG.

    Raises:
        OSError: EPROTO for a body of another length; EOPNOTSUPP for a debug register that waits for
            a load or store.
    """
    rest = len(body) - sizeof(kvm_guest_debug)
    if rest < 0 or rest % _WORD.size:
        raise OSError(EPROTO, f"body of {len(body)} bytes")
    debug = kvm_guest_debug.from_buffer_copy(body)
    breakpoints: set[int] = set()
    if not debug.control & KVM_GUESTDBG_ENABLE:
        return False, frozenset()
    if debug.control & KVM_GUESTDBG_USE_SW_BP:
        breakpoints.update(word for (word,) in _WORD.iter_unpack(body[sizeof(kvm_guest_debug) :]))
    if debug.control & KVM_GUESTDBG_USE_HW_BP:
        breakpoints.update(_debug_registers(debug))
    return bool(debug.control & KVM_GUESTDBG_SINGLESTEP), frozenset(breakpoints)


def _debug_registers(debug: kvm_guest_debug) -> Iterator[int]:
    dr7 = debug.debugreg[7]
    for number in range(_REGISTERS):
        if dr7 >> 2 * number & 3:
            if dr7 >> _DR7_CONDITIONS + 4 * number & 3:
                raise OSError(EOPNOTSUPP, f"DR{number} waits for a load or store")
            yield debug.debugreg[number]


def read_memory(memory: VmMemory, engine: Engine, gpa: int, size: int) -> bytes:
    """Return bytes of memory as the guest sees it, from private and shared pages alike.

    Raises:
        OSError: EFAULT where there is no slot, or where the slot lacks the page's half; EOPNOTSUPP
            when the engine cannot read private memory.
    """
    found = bytearray()
    if gpa & ~PAGE_MASK == HYPERCALL_PAGE and (gpa & PAGE_MASK) + size <= PAGE_SIZE:
        return engine.hypercall_code.ljust(PAGE_SIZE, b"\0")[gpa & PAGE_MASK :][:size]
    for slot, start, end, private in _pieces(memory, gpa, size):
        if private:
            found += engine.read_private(slot, start, end - start)
        else:
            assert slot.shared is not None
            base = slot.base_gfn << PAGE_SHIFT
            found += slot.shared.mapping.memory[start - base : end - base]
    return bytes(found)


def write_memory(memory: VmMemory, engine: Engine, gpa: int, data: bytes) -> None:
    """Change memory as the guest sees it, in private and shared pages alike.

    Preconditions: no vCPU is in the guest.

    Raises:
        OSError: as ``read_memory``; ENOSPC, ENOMEM.
    """
    for slot, start, end, private in [*_pieces(memory, gpa, len(data))]:
        piece = data[start - gpa : end - gpa]
        if private:
            engine.write_private(slot, start, piece)
        else:
            assert slot.shared is not None
            slot.shared.write(start - (slot.base_gfn << PAGE_SHIFT), piece)


def _pieces(memory: VmMemory, gpa: int, size: int) -> Iterator[tuple[Memslot, int, int, bool]]:
    """Cut a range of bytes into pieces, each of pages of one half of one slot."""
    end = gpa + size
    while gpa < end:
        slot = memory.slot_of(gpa >> PAGE_SHIFT)
        if slot is None:
            raise OSError(EFAULT, f"no slot at {gpa:#x}")
        index, last = (gpa >> PAGE_SHIFT) - slot.base_gfn, slot.end_gfn - slot.base_gfn
        private = slot.attributes[index]
        if (slot.private if private else slot.shared) is None:
            raise OSError(
                EFAULT, f"the slot at {gpa:#x} has no {'private' if private else 'shared'} half"
            )
        change = slot.attributes.find(1 - private, index, last)
        stop = min(end, slot.base_gfn + (last if change < 0 else change) << PAGE_SHIFT)
        yield slot, gpa, stop, bool(private)
        gpa = stop
