"""The comparison of two engines' runs of a program.

It leaves out the differences that docs/reference/engines.md excepts.
"""

from itertools import zip_longest
from typing import Final

from restrictedmem.protocol.exits import MemoryFault, Shutdown

from .known import ALLOWED
from .machines import Event, Run
from .program import Line, Program
from .x86 import RCX, RDI, RSI, STATUS, name

_NOTHING: Final = Event("nothing more")


def difference(program: Program, software: Run, kernel: Run) -> str:
    """Return the first difference in words, or nothing; the first run is the software engine's."""
    lines = {line.address: line for line in program.lines}
    for number, pair in enumerate(
        zip_longest(software.events, kernel.events, fillvalue=_NOTHING), 1
    ):
        one, other = pair
        if any(allowed.tells(one, other) for allowed in ALLOWED):
            return ""
        if one.exit != other.exit:
            return f"event {number}: software {_told(one)}, kernel {_told(other)}"
        if one.state is not None and other.state is not None:
            found = _states(one, other, lines)
            if found:
                return f"event {number}, {one.exit}: {found}"
    # The last fault's instruction may lie in two pages, and which of them comes first is the
    # engine's.
    if software.needed != kernel.needed and not isinstance(software.events[-1].exit, MemoryFault):
        return f"MMIO: software in pages {sorted(software.needed)}, kernel {sorted(kernel.needed)}"
    for page, halves in software.memory.items():
        for ours, theirs in zip(halves, kernel.memory[page], strict=True):
            if ours != theirs:
                return f"memory, page {page}: {_bytes(ours, theirs)}"
    return ""


def _told(event: Event) -> str:
    return str(event.exit) + (f" at {event.state.rip:#x}" if event.state else "")


def _states(one: Event, other: Event, lines: dict[int, Line]) -> str:
    """Compare what a debugger sees; the exits are the same."""
    software, kernel = one.state, other.state
    assert software is not None
    assert kernel is not None
    line = lines.get(kernel.rip)
    # Where the program is lost, nobody knows which flags are defined.
    undefined = STATUS if line is None else line.undefined
    masks = dict.fromkeys(range(16), -1)
    if line is not None and isinstance(one.exit, MemoryFault):
        undefined |= line.piece.partial
        if line.piece.narrow:
            masks |= dict.fromkeys((RCX, RSI, RDI), 0xFFFF_FFFF)
    found = [
        f"{name(number, 64)} {a:#x}, {b:#x}"
        for number, (a, b) in enumerate(zip(software.registers, kernel.registers, strict=True))
        if (a ^ b) & masks[number]
    ]
    behind = software.rip - kernel.rip if isinstance(one.exit, Shutdown) else 0
    if software.rip != kernel.rip and not 0 < behind < 15:
        found.append(f"rip {software.rip:#x}, {kernel.rip:#x}")
    if (software.flags ^ kernel.flags) & ~undefined:
        found.append(f"flags {software.flags & ~undefined:#x}, {kernel.flags & ~undefined:#x}")
    return "; ".join(found)


def _bytes(one: bytes, other: bytes) -> str:
    at = next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return (
        f"from byte {at:#x} on software {one[at : at + 16].hex()}, "
        f"kernel {other[at : at + 16].hex()}"
    )
