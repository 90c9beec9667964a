"""The endings of programs: exceptions, privileged or invalid instructions, and undefined codes."""

from typing import Final

from .operands import Dice
from .pieces import Pieces
from .program import Piece

#: With a ``[rbx]`` where there is an operand; whatever it does, nothing else of the program
#: follows. Selectors are those that no host's table has (docs/reference/engines.md, `selectors`).
_CODES: Final = (
    ("ud2", "0f0b"), ("ud1", "0fb9c3"), ("ud0", "0fffc3"), ("int3", "cc"), ("int1", "f1"),
    ("int 0x80", "cd80"), ("int 3", "cd03"), ("int 13", "cd0d"), ("hlt", "f4"), ("cli", "fa"),
    ("sti", "fb"),
    ("clts", "0f06"), ("invd", "0f08"), ("wbinvd", "0f09"), ("syscall", "0f05"),
    ("sysenter", "0f34"),
    ("sysexit", "0f35"), ("sysret", "0f07"), ("mov rax, cr0", "0f20c0"), ("mov cr3, rax", "0f22d8"),
    ("mov rax, dr7", "0f21f8"), ("lgdt [rbx]", "0f0113"), ("lidt [rbx]", "0f011b"),
    ("lmsw ax", "0f01f0"),
    ("invlpg [rbx]", "0f013b"), ("swapgs", "0f01f8"), ("rdmsr", "0f32"), ("wrmsr", "0f30"),
    ("rdpmc", "0f33"),
    ("xsetbv", "0f01d1"), ("monitor", "0f01c8"), ("mwait", "0f01c9"), ("vmcall", "0f01c1"),
    ("vmmcall", "0f01d9"), ("lldt ax", "0f00d0"), ("ltr ax", "0f00d8"),
    ("mov ds, 0x1b", "b81b0000008ed8"),
    ("mov ss, 0x23", "b8230000008ed0"), ("mov cs, ax", "8ec8"), ("mov fs, 0x2c", "b82c0000008ee0"),
    ("pop fs, 8", "6a080fa1"),
    ("pop gs, 0x1000", "68001000000fa9"), ("retf", "cb"), ("retf 8", "ca0800"),
    ("jmp far [rbx]", "ff2b"),
    ("call far [rbx]", "ff1b"), ("push es", "06"), ("pop ds", "1f"), ("daa", "27"), ("aaa", "37"),
    ("pusha", "60"), ("popa", "61"), ("bound", "62c3"), ("into", "ce"), ("aam", "d40a"),
    ("aad", "d50a"),
    ("salc", "d6"), ("call far", "9a0000000000"), ("jmp far", "ea0000000000"), ("les", "c41b"),
    ("group 1 again", "8200ff"), ("fe /2", "fed3"), ("fe /7", "fefb"), ("ff /7", "fffb"),
    ("c6 /1", "c6cb00"),
    ("c7 /2", "c7d300000000"), ("8f /1", "8fcb"), ("8d of a register", "8dc3"),
    ("0fba /0", "0fbac301"),
    ("0fba /3", "0fbadb01"), ("0fc7 /1 of a register", "0fc7cb"), ("0fc7 /2", "0fc713"),
    ("movbe of a register", "0f38f0c3"), ("movnti of a register", "0fc3c3"), ("0f04", "0f04"),
    ("0f0a", "0f0a"), ("0f24", "0f24c0"), ("0f36", "0f36"), ("0fa6", "0fa6c0"),
    ("lock inc eax", "f0ffc0"),
    ("lock cmp [rbx], eax", "f03903"), ("lock nop", "f090"), ("lock bt [rbx], eax", "f00fa303"),
    ("lock xchg eax, ebx", "f087c3"), ("lock add eax, [rbx]", "f00303"), ("lock not eax", "f0f7d0"),
    ("lock test [rbx], eax", "f08503"), ("lock jmp", "f0eb00"), ("lock push", "f050"),
    ("lock ret", "f0c3"),
    ("sixteen bytes", "66" * 15 + "90"), ("div by zero", "31c9f7f1"),
    ("idiv that overflows", "31c0ba0000008031dbffcbf7fb"),
    ("load beyond the end", "48b80000000000100000488b00"),
    ("jump beyond the end", "48b80000000000100000ffe0"), ("jump to nowhere", "b8000000d0ffe0"),
    ("jump to zero", "31c0ffe0"), ("load from no canonical address", "48b80000000000008000488b00"),
    ("push to no canonical address", "48bc000000000000800050"),
    ("access that is not aligned, with AC", "9c814c2400000004009d8b442401"), ("str eax", "0f00c8"),
    ("sldt eax", "0f00c0"), ("smsw eax", "0f01e0"), ("mov eax, ds", "8cd8"),
    ("mov eax, ss", "8cd0"),
    ("mov eax, cs", "8cc8"), ("mov eax, fs", "8ce0"), ("verr ax", "31c00f00e0"),
    ("verw ax", "31c00f00e8"),
    ("lar eax, eax", "31c00f02c0"), ("lsl eax, eax", "31c00f03c0"), ("rdfsbase rax", "f3480faec0"),
    ("adcx eax, ebx", "660f38f6c3"), ("adox eax, ebx", "f30f38f6c3"), ("rdpid rax", "f30fc7f8"),
    ("clflushopt [rbx]", "660fae3b"), ("clwb [rbx]", "660fae33"), ("iretq", "48cf"),
    ("store to the hypercall page", "b800001000c70001000000"),
    ("jump to the report page", "b800101000ffe0"),
)  # fmt: skip


def ending(dice: Dice) -> Pieces:
    """Return what hardly anything comes after."""
    text, code = dice.random.choice(_CODES)
    # RBX to where there is memory, most of it.
    lead = Piece("mov ebx, data", b"\xbb" + (dice.address(16) & 0xFFFF_FFFF).to_bytes(4, "little"))
    return [lead, Piece(text, bytes.fromhex(code))]
