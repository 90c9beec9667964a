"""Mistakes to plant in the software engine: a wrong flag, width, order or half.

They show whether the fuzzer finds such mistakes.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_KVM: Final = "src/restrictedmem/kvm"
#: Runs in a copy of this repository: where that is, the first seed, how many programs.
_RUN: Final = """
import sys
root, first, programs = sys.argv[1:]
sys.path[:0] = [root + "/src", root + "/tests"]
from random_guests.campaign import start, until_found
print(*until_found(start(), int(first), int(programs)))
"""


@dataclass(frozen=True, slots=True)
class Mistake:
    """An edit of one file below ``src/restrictedmem/kvm``; ``right`` stands there once."""

    name: str
    file: str
    right: str
    wrong: str

    def plant(self, root: Path) -> None:
        """Edit the file of a copy of this repository.

        Raises:
            ValueError: when the code is another by now.
        """
        path = root / _KVM / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.right) != 1:
            raise ValueError(
                f"{self.name}: {text.count(self.right)} times in {self.file}: {self.right}"
            )
        path.write_text(text.replace(self.right, self.wrong), encoding="utf-8")


_ALONE, _MMIO, _MMU, _TLB, _VCPU = (
    "software/alone.py",
    "software/mmio.py",
    "mmu.py",
    "software/tlb.py",
    "software/software_vcpu.py",
)
_PHYSICAL: Final = "software/physical.py"

MISTAKES: Final = (
    Mistake(
        "a flag: CF after an instruction alone",
        _ALONE,
        "uc.read(unicorn.RFLAGS) & ~_TRAP_FLAG)",
        "uc.read(unicorn.RFLAGS) & ~_TRAP_FLAG & ~1)",
    ),
    Mistake(
        "a flag: TF stays",
        _ALONE,
        "if not (done and opcode == _POPF):",
        "if not done:",
    ),
    Mistake(
        "a flag: those of a refused SETcc",
        _VCPU,
        "if hooked or computes_first",
        "if computes_first",
    ),
    Mistake(
        "a flag: those of a refused RCR",
        "software/flags.py",
        "_RCL_RCR: Final = (2, 3)",
        "_RCL_RCR: Final = (2,)",
    ),
    Mistake(
        "a width: stores to MMIO",
        _MMIO,
        "value &= (1 << 8 * size) - 1",
        "value &= (1 << 8 * min(size, 2)) - 1",
    ),
    Mistake(
        "a width: the answer of a load",
        _MMIO,
        "range(load.size):\n            self",
        "range(min(load.size, 4)):\n            self",
    ),
    Mistake(
        "a width: loads from MMIO",
        _TLB,
        "exits.MmioRead(address - HOLE, size)",
        "exits.MmioRead(address - HOLE, min(size, 4))",
    ),
    Mistake(
        "a width: the answer of IN",
        _VCPU,
        "value & (1 << 8 * size) - 1",
        "value & 0xFF",
    ),
    Mistake(
        "a width: the data of OUT",
        _VCPU,
        "exits.PortOut(port, size, data)",
        "exits.PortOut(port, size, data & 0xFFFF)",
    ),
    Mistake(
        "a width: the result of a hypercall",
        _VCPU,
        "unicorn.RAX, value & U64_MAX",
        "unicorn.RAX, value & 0xFFFF_FFFF",
    ),
    Mistake(
        "an order: the parts of a store to MMIO",
        _MMIO,
        "last.data | value << 8 * last.size",
        "last.data << 8 * size | value",
    ),
    Mistake(
        "an order: the bytes of an answer",
        _MMIO,
        "value >> 8 * index & 0xFF",
        "value >> 8 * (load.size - 1 - index) & 0xFF",
    ),
    Mistake(
        "an order: the arguments of a hypercall",
        _VCPU,
        "(rdi, rsi, rdx, r10)",
        "(rsi, rdi, rdx, r10)",
    ),
    Mistake(
        "an order: MMIO done before it was answered",
        _VCPU,
        "self._undo.restore()",
        "pass",
    ),
    Mistake(
        "an order: a fault before the end of its page",
        _VCPU,
        "if not alone and self._may_need_no_page():",
        "if False and not alone:",
    ),
    Mistake(
        "an order: a kick inside an instruction",
        "software/unicorn.py",
        "return handle + flags + 2",
        "return handle + flags + 3",
    ),
    Mistake(
        "a half: that of a fault",
        _TLB,
        "KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0",
        "0 if private else KVM_MEMORY_EXIT_FLAG_PRIVATE",
    ),
    Mistake(
        "a half: the old one after a conversion",
        "software/software_vm.py",
        "with begun():\n            self._vcpus.drop(*zapped)",
        "del zapped",
    ),
    Mistake(
        "a half: the last page of a conversion",
        _MMU,
        "end - slot.base_gfn] = attributes",
        "end - 1 - slot.base_gfn] = attributes[1:]",
    ),
    Mistake(
        "a half: the code of the other one",
        _PHYSICAL,
        "self._drop_code(view, clipped[0] + offset, clipped[1] + offset)",
        "pass",
    ),
)


def programs_until_found(root: Path, mistake: Mistake, seed: int, programs: int) -> tuple[int, str]:
    """Plant a mistake in a copy of the repository, and run programs there.

    Returns the same as ``campaign.until_found``.

    Raises:
        ValueError: as ``Mistake.plant``.
        subprocess.CalledProcessError: no program could run there.
    """
    with tempfile.TemporaryDirectory(prefix="restrictedmem-mistake-") as place:
        copy = Path(place)
        for part in ("src", "tests/random_guests"):
            shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        mistake.plant(copy)
        command = [sys.executable, "-c", _RUN, place, str(seed), str(programs)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        count, _, seen = said.strip().partition(" ")
        return int(count), seen
