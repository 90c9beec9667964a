"""A vCPU's registers as gdb sees them (GDB manual, appendix G)."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs


@dataclass(frozen=True, slots=True)
class Register:
    """One of gdb's registers: its size in bytes, gdb's type for it, and its place.

    ``general`` is a path in ``kvm_regs``, ``special`` one in ``kvm_sregs``. A register with neither
    is unavailable.
    """

    name: str
    size: int
    type: str
    general: str = ""
    special: str = ""

    def read(self, regs: kvm_regs, sregs: kvm_sregs) -> bytes:
        """Return the value in hexadecimal for gdb, or an ``x`` for each missing digit."""
        if not self.general and not self.special:
            return b"xx" * self.size
        value: int = (
            attrgetter(self.general)(regs) if self.general else attrgetter(self.special)(sregs)
        )
        return (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little").hex().encode()


def _core() -> tuple[Register, ...]:
    types = {"rsp": "data_ptr", "rbp": "data_ptr", "rip": "code_ptr"}
    general = (
        "rax",
        "rbx",
        "rcx",
        "rdx",
        "rsi",
        "rdi",
        "rbp",
        "rsp",
        *(f"r{number}" for number in range(8, 16)),
        "rip",
    )
    # gdb requires the x87 registers in this feature, even where they are unavailable.
    return (
        *(Register(name, 8, types.get(name, "int64"), general=name) for name in general),
        Register("eflags", 4, "i386_eflags", general="rflags"),
        *(
            Register(name, 4, "int32", special=f"{name}.selector")
            for name in ("cs", "ss", "ds", "es", "fs", "gs")
        ),
        *(Register(f"st{number}", 10, "i387_ext") for number in range(8)),
        *(
            Register(name, 4, "int")
            for name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
        ),
    )


_FEATURES: Final = {
    "org.gnu.gdb.i386.core": _core(),
    "org.gnu.gdb.i386.segments": tuple(
        Register(f"{name}_base", 8, "int", special=f"{name}.base") for name in ("fs", "gs")
    ),
}
#: In gdb's order.
REGISTERS: Final = tuple(register for feature in _FEATURES.values() for register in feature)

_EFLAGS: Final = (
    '<flags id="i386_eflags" size="4">'
    + "".join(
        f'<field name="{name}" start="{bit}" end="{bit}"/>'
        for bit, name in (
            (0, "CF"),
            (2, "PF"),
            (4, "AF"),
            (6, "ZF"),
            (7, "SF"),
            (8, "TF"),
            (9, "IF"),
            (10, "DF"),
            (11, "OF"),
        )
    )
    + "</flags>"
)


def description() -> bytes:
    """Return the target description."""
    features = "".join(
        f'<feature name="{name}">'
        + (_EFLAGS if name.endswith("core") else "")
        + "".join(
            f'<reg name="{reg.name}" bitsize="{reg.size * 8}" type="{reg.type}"/>'
            for reg in registers
        )
        + "</feature>"
        for name, registers in _FEATURES.items()
    )
    head = '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">'
    return f"{head}<target><architecture>i386:x86-64</architecture>{features}</target>".encode()


def read_all(regs: kvm_regs, sregs: kvm_sregs) -> bytes:
    """Return every register, for packet ``g``."""
    return b"".join(register.read(regs, sregs) for register in REGISTERS)


def write_all(regs: kvm_regs, text: bytes) -> None:
    """Set every register that can be set from packet ``G``; the others keep their values.

    Raises:
        ValueError: for another length, or text that is not hexadecimal.
    """
    if len(text) != 2 * sum(register.size for register in REGISTERS):
        raise ValueError("G has another length")
    start = 0
    for register in REGISTERS:
        end = start + 2 * register.size
        if register.general:
            write(regs, register, text[start:end])
        start = end


def write(regs: kvm_regs, register: Register, text: bytes) -> None:
    """Set one register, for packet ``P``.

    Raises:
        ValueError: for a register that cannot be set, or text that is not a hexadecimal number of
            its size.
    """
    if not register.general or len(text) != 2 * register.size:
        raise ValueError(f"{register.name} cannot be set")
    setattr(regs, register.general, int.from_bytes(bytes.fromhex(text.decode()), "little"))


def register(number: bytes) -> Register:
    """Return the register with one of gdb's numbers, in hexadecimal.

    Raises:
        ValueError: for text that is not a number.
        IndexError: for a number that no register has.
    """
    index = int(number, 16)
    if index < 0:
        raise ValueError("no such register")
    return REGISTERS[index]
