"""Instructions that the engines are known to execute differently: no program has them.

Each has a row in docs/reference/engines.md, and an example that differs as long as the row is true
(``tests/test_fuzz_engines.py``).
"""

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Avoided:
    """Instructions, by their form.

    ``example`` is machine code, shared with its owner if ``shared``.
    """

    row: str
    text: str
    example: str
    shared: bool = False


#: Where an example finds data: a page with both halves, one that is missing at first, and none.
#: 0x40014000, 0x40018000, 0x4001d000; and memory that is only to be read: 0x4001c000
AVOIDED: Final = (
    Avoided("rotate-read-only", r"^rc[lr] .*@0x4001(bff|c)", "f9d11c2500c00140"),
    Avoided(
        "cmpxchg-upper-half",
        r"^cmpxchg (e|r\d+d,)|^(lock )?cmpxchg dword",
        "48c7c0ffffffff48c7c3ffffffff0fb1cb",
    ),
    Avoided("invalid-lock", r"^lock (test|push|nop|ret|jmp|cmp|bt|xchg eax, ebx)", "f050"),
    Avoided("undefined-opcodes", r"^8f /1|movbe of a register|^test /1", "f6c8ff"),
    Avoided("loope", r"loopn?e ", "b901000000b8ffffff7f01c0e1fe"),
    Avoided("blsi", r"^blsi", "31c9c4e278f3d983d200"),
    Avoided("bzhi", r"^(bzhi|bextr)", "48c7c0ffffffffb950000000c4e270f5d8"),
    Avoided(
        "pdep", r"^pdep (e|r\d+d,)", "48b901000000000000ff48c7c0ffffffff48c7c3ffffffffc4e263f5c1"
    ),
    Avoided("rip-before-immediate", r"^(rorx .*rip|sh[lr]d .*rip.*\d$)", "c4e37bf00d0000000007"),
    Avoided(
        "division-overflow", r"^idiv (e|r\d+d|dword)|^idiv that", "ba0000008031c0bbfffffffff7fb"
    ),
    Avoided("lock-neg", r"^lock neg", "c60425004001409cf0f61c25004001409f"),
    Avoided("clflush", r"^clflush", "0fae3c2500800140"),
    Avoided("processor", r"^(adcx|adox|rdpid|clflushopt|clwb)\b", "f30fc7f8"),
    Avoided("not-emulated", r"^(vmmcall|vmcall|mwait|monitor|sysret|syscall)\b", "0f01c1"),
    Avoided("report-page", r"^jump to the report", "b800101000ffe0"),
    Avoided("last-ports", r"^a port that there is in part", "bafeff0000ed", shared=True),
    Avoided("alignment", r"with AC$", "9c814c2400000004009d8b442401"),
    Avoided("descriptor-tables", r"^(str|sldt|smsw|lar|lsl|verr|verw)", "0f00c8"),
    Avoided("selectors", r"^mov eax, [cdsf]s", "8cc8"),
)

_ANY: Final = re.compile("|".join(avoided.text for avoided in AVOIDED))


def is_avoided(text: str) -> bool:
    """Say whether an instruction that looks like this is one of them."""
    return _ANY.search(text) is not None
