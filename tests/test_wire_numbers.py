"""The numbers of calls that docs/reference/wire-protocol.md promises to other programs."""

import re
from pathlib import Path

from restrictedmem.protocol import vm_wire
from restrictedmem.service import wire
from restrictedmem.service.wire import Call

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "wire-protocol.md"


def documented() -> dict[str, int]:
    """Return the calls of all tables; the number is in the column of that name."""
    found: dict[str, int] = {}
    column = 0
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "call" and "number" in cells:
            column = cells.index("number")
        elif column and (call := re.match(r"[A-Z][A-Z0-9_]+\b", cells[0])):
            found[call[0]] = int(cells[column], 0)
        elif not line.startswith("|"):
            column = 0
    return found


def test_numbers_are_the_documented() -> None:
    calls = [
        each
        for module in (wire, vm_wire)
        for each in vars(module).values()
        if isinstance(each, Call)
    ]
    assert {call.name: call.number for call in calls} == documented()
    assert len(documented()) > 30
