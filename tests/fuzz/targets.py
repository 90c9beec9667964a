"""The targets by name.

Each feeds bytes to a parser in this process, and fails when the parser breaks its contract.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from fuzz.calls import calls
from fuzz.engine import vcpu, vm
from fuzz.files import creation, elf, report, rsp, trace
from fuzz.guest_memfd import guest_memfd
from fuzz.service import consumer, control, fuse_bodies

CORPUS: Final = Path(__file__).parent / "corpus"

Target = Callable[[bytes], None]

TARGETS: Final[dict[str, Target]] = {
    "control": control,
    "consumer": consumer,
    "creation": creation,
    "vm": vm,
    "vcpu": vcpu,
    "fuse": fuse_bodies,
    "guest_memfd": guest_memfd,
    "elf": elf,
    "rsp": rsp,
    "report": report,
    "trace": trace,
    "supervisor": calls,
}


def inputs(name: str) -> list[Path]:
    """Return the files of a target's corpus."""
    return sorted((CORPUS / name).iterdir())
