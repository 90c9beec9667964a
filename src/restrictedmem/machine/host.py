"""What everything runs on: kernel, interpreter, user."""

import os
import platform
import sys
from collections.abc import Iterator

from restrictedmem.abi import process
from restrictedmem.machine.finding import Finding, State


def probe() -> Iterator[Finding]:
    """Yield the findings about the host; what works is found by trying and never derived from them."""
    yield kernel()
    yield Finding("Python", State.YES, f"{platform.python_version()}, {sys.executable}")
    yield user()


def kernel() -> Finding:
    """Say which kernel runs, on which machine."""
    name = os.uname()
    detail = f"{name.sysname} {name.release}, {name.machine}"
    if name.machine != "x86_64":
        return Finding(
            "kernel",
            State.PARTLY,
            detail,
            "guests are x86-64 and emulated; nothing was ever tried on this processor",
            "an x86-64 machine",
        )
    return Finding("kernel", State.YES, detail)


def user() -> Finding:
    """Say who asks, and with which of the capabilities that make a difference."""
    held = process.effective_capabilities()
    known = {"CAP_SYS_ADMIN": process.CAP_SYS_ADMIN, "CAP_IPC_LOCK": process.CAP_IPC_LOCK}
    capabilities = (
        " and ".join(name for name, number in known.items() if held >> number & 1)
        or "neither CAP_SYS_ADMIN nor CAP_IPC_LOCK"
    )
    return Finding("user", State.YES, f"uid {os.geteuid()}, {capabilities}")
