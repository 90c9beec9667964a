"""The state of a vCPU before its first instruction.

The vCPU is in long mode at CPL3, with an I/O breakpoint that only needs a port. By this breakpoint
IN and OUT become precise exits. Unicorn's own stop takes effect at the end of a block, some
instructions later. A #DB that the instruction itself raises (DR7.RW0 = I/O, CR4.DE; Intel SDM
18.2.4) takes effect at once. It costs nothing where no IN or OUT is.
"""

import ctypes
import mmap
from typing import Final

from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.flags import MARK_FLAGS, RFLAGS, find_source
from restrictedmem.kvm.software.uc import Context, Uc
from restrictedmem.kvm.software.wide import ASK_PROCESSOR, ASKED, WideExchange
from restrictedmem.units import PAGE_SIZE

#: Address of the page with the boot code while it runs; it only has to be free.
_BOOT: Final = 1 << 45
_GDT_POINTER: Final = 0x100
_GDT: Final = 0x180
_USER_CODE: Final = 0x1C0

# Null, kernel code, kernel data, user data, user code; flat, 64 bits.
_DESCRIPTORS: Final = (
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
)

_CODE: Final = bytes.fromhex(
    "0f019300010000"  # lgdt   [rbx + 0x100]
    "0f20e0"  # mov    rax, cr4
    "4883c808"  # or     rax, 8          (DE)
    "0f22e0"  # mov    cr4, rax
    "0f20c0"  # mov    rax, cr0
    "4883c820"  # or     rax, 0x20       (NE)
    "0f22c0"  # mov    cr0, rax
    "dbe3"  # fninit
    "68801f0000"  # push   0x1f80
    "0fae1424"  # ldmxcsr [rsp]
    "58"  # pop    rax
    "48c7c002040200"  # mov    rax, 0x20402    (G0, RW0 = I/O, one byte)
    "0f23f8"  # mov    dr7, rax
    "6a1b"  # push   0x1b            (ss: user data)
    "6a00"  # push   0               (rsp)
    "6802020000"  # push   0x202           (rflags: IF)
    "6a23"  # push   0x23            (cs: user code)
    "488d83c0010000"  # lea    rax, [rbx + 0x1c0]
    "50"  # push   rax             (rip)
    "48cf"  # iretq
)
_BREAKPOINT: Final = bytes.fromhex("cc")  # int3: nobody handles it, so it ends the run
_USER: Final = 3


def enter_user_mode(uc: Uc) -> tuple[Context, int, WideExchange]:
    """Bring a new emulator, without hooks yet, to the state.

    Return a copy of the state, to start again from; the offset of flags in a copy
    (``flags.find_source``); and the instructions that the emulator had to lose.

    Raises:
        RuntimeError: when this version of Unicorn does not get there.
    """
    with mmap.mmap(-1, PAGE_SIZE) as page:
        _write_boot_page(page)
        uc.map(_BOOT, PAGE_SIZE, ctypes.addressof(ctypes.c_char.from_buffer(page)))
        uc.write(unicorn.RIP, _BOOT)
        uc.write(unicorn.RBX, _BOOT)
        uc.write(unicorn.RSP, _BOOT + PAGE_SIZE)
        uc.start()
        uc.unmap(_BOOT, PAGE_SIZE)
    if uc.read(unicorn.CS) & _USER != _USER:
        raise RuntimeError("could not enter CPL3")
    state = Context(uc)
    state.save()
    source = find_source(state)
    wide = WideExchange(uc, tuple(uc.read(register) for register in ASKED))
    # From here on each selector that the guest loads gives #GP, because the table is gone.
    uc.forget_gdt()
    for register in (unicorn.RAX, unicorn.RBX, unicorn.RDX, unicorn.RSP, *ASKED):
        uc.write(register, 0)
    uc.write(unicorn.RFLAGS, RFLAGS)
    uc.flush_code()
    uc.flush_tlb()
    state.save()
    return state, source, wide


def _write_boot_page(page: mmap.mmap) -> None:
    page[: len(_CODE)] = _CODE
    code = ASK_PROCESSOR + MARK_FLAGS + _BREAKPOINT
    page[_USER_CODE : _USER_CODE + len(code)] = code
    table = b"".join(descriptor.to_bytes(8, "little") for descriptor in _DESCRIPTORS)
    page[_GDT : _GDT + len(table)] = table
    pointer = (len(table) - 1).to_bytes(2, "little") + (_BOOT + _GDT).to_bytes(8, "little")
    page[_GDT_POINTER : _GDT_POINTER + len(pointer)] = pointer
