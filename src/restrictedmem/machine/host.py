"""Probes of the host: kernel, interpreter, user."""

import os
import platform
import sys
from collections.abc import Iterator

from restrictedmem.abi import process
from restrictedmem.machine.finding import Finding, State


def probe() -> Iterator[Finding]:
    """Yield the findings about the host; no other finding is derived from them."""
    yield kernel()
    yield Finding("Python", State.YES, f"{platform.python_version()}, {sys.executable}")
    yield user()


def kernel() -> Finding:
    """Report the kernel and the machine type."""
    name = os.uname()
    detail = f"{name.sysname} {name.release}, {name.machine}"
    if name.machine != "x86_64":
        return Finding(
            "kernel",
            State.PARTLY,
            detail,
            "guests are x86-64 and emulated; restrictedmem was never tested on this processor",
            "an x86-64 machine",
        )
    return Finding("kernel", State.YES, detail)


def user() -> Finding:
    """Report the user, with the capabilities that make a difference."""
    held = process.effective_capabilities()
    known = {"CAP_SYS_ADMIN": process.CAP_SYS_ADMIN, "CAP_IPC_LOCK": process.CAP_IPC_LOCK}
    capabilities = (
        " and ".join(name for name, number in known.items() if held >> number & 1)
        or "neither CAP_SYS_ADMIN nor CAP_IPC_LOCK"
    )
    return Finding("user", State.YES, f"uid {os.geteuid()}, {capabilities}")
