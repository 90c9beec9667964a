"""Programs under ``restrictedmem exec``, and what they say they found."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from waiting import wait_until

#: The beginning of every program under test: the bare call, as libc makes it. It returns the call's
#: value or minus the errno.
PRELUDE = """
import ctypes, errno, fcntl, mmap, os, resource, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(ctypes.c_long(451), *map(ctypes.c_long, arguments))
    return result if result >= 0 else -ctypes.get_errno()
def opened():
    return sorted(map(int, os.listdir("/proc/self/fd")))
"""
EXEC = [sys.executable, "-m", "restrictedmem", "exec"]


def under(
    code: str, *options: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start Python code under exec; it says on stdout what it found."""
    command = [*EXEC, *options, "--", sys.executable, "-c", PRELUDE + code]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def said(
    code: str, *options: str, environment: dict[str, str] | None = None, patience: float = 60
) -> Any:
    """Return the value that Python code prints under exec."""
    out, err = (process := under(code, *options, environment=environment)).communicate(
        timeout=patience
    )
    assert (process.returncode, err) == (0, ""), err
    return eval(out)


def kill_supervisor_of(mark: str) -> None:
    """Kill the supervisor whose environment has a variable of this value, and wait for its end."""
    supervisor = supervisor_of(mark)
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: supervisor_of(mark) is None, "the supervisor to be gone")


def supervisor_of(mark: str) -> int | None:
    """Find a supervisor by a variable that it was started with."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text() == "rmem-supervisor\n" and mark.encode() in (
                    entry / "environ"
                ).read_bytes():
                    return int(entry.name)
            except OSError:
                continue
    return None
