"""Odd starts, each as a process.

It ends with its exit status and one line that says what is wrong, without a traceback.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bad_cases import Case, check, found, inputs

__all__ = ["found", "inputs"]

QUICK = "run --quiet --engine software --memory 4M"
DIGEST = "e3b0c44298fc1c14"
BAD = "Bad file descriptor"
FULL = "No space left on device"
NO_PROC = 'unshare -m sh -c \'mount --make-rprivate / && umount -l /proc && exec "$@"\' sh "$@"'

FOREIGN_PROC = 'unshare -pf "$@"'


def odd(
    start: str,
    words: str,
    status: int,
    line: str,
    out: str = "",
    *,
    features: tuple[str, ...] = ("fuse",),
    **environment: str,
) -> Any:
    """Return a case of an odd start, for a machine that has what it needs."""
    case = Case(words, status, line, start=start, out=out, environment=environment)
    return pytest.param(case, marks=pytest.mark.requires(*features), id=str(case))


def closed(*numbers: int) -> str:
    return 'exec "$@" ' + " ".join(f"{number}>&-" for number in numbers)


ODD = [
    # Standard descriptors that are closed, one and two and all.
    odd(closed(0), f"{QUICK} sha256", 1, f"stdin: read: {BAD}"),
    odd(closed(0), "verify -", 1, f"stdin: read: {BAD}"),
    odd(closed(1), f"{QUICK} sha256", 1, f"stdout: write: {BAD}"),
    odd(closed(1), "check --list", 1, f"stdout: write: {BAD}"),
    odd(closed(1), "--help", 1, f"stdout: write: {BAD}"),
    odd(closed(2), f"{QUICK} sha256", 0, "", DIGEST),
    odd(closed(2), "run --engine software --memory 4M sha256", 0, "", DIGEST),
    odd(closed(2), "run nonesuch", 1, ""),
    odd(closed(0, 1), f"{QUICK} spin exit 5", 5, ""),
    odd(closed(0, 2), f"{QUICK} spin exit 5", 5, ""),
    odd(closed(1, 2), f"{QUICK} spin exit 5", 5, ""),
    odd(closed(0, 1, 2), f"{QUICK} spin exit 5", 5, ""),
    odd(
        closed(0, 1, 2), f"{QUICK} --trace IN/trace-closed --json IN/json-closed spin exit 5", 5, ""
    ),
    odd(
        closed(0, 1),
        "exec --json IN/exec-closed -- sh -c exit${IFS}5",
        5,
        "",
        features=("fuse", "seccomp"),
    ),
    *(
        # The program still finds this descriptor closed.
        odd(
            closed(number),
            f"exec -- sh -c test${{IFS}}!${{IFS}}-e${{IFS}}/proc/$$/fd/{number}",
            0,
            "",
            features=("seccomp",),
        )
        for number in (0, 1, 2)
    ),
    odd(
        closed(0),
        "serve --socket IN/missing/socket",
        1,
        "IN/missing/socket: open: No such file or directory",
    ),
    # Files and disks that are full.
    odd('exec "$@" >/dev/full', "measure sha256", 1, f"stdout: write: {FULL}"),
    odd('exec "$@" >/dev/full', f"{QUICK} sha256", 1, f"stdout: write: {FULL}"),
    odd('exec "$@" 2>/dev/full', "run --engine software --memory 4M sha256", 0, "", DIGEST),
    odd('exec "$@"', f"{QUICK} --json /dev/full spin exit 5", 5, f"/dev/full: write: {FULL}"),
    odd(
        'exec "$@"',
        "exec --json /dev/full -- sh -c exit${IFS}5",
        5,
        f"--json: /dev/full: write: {FULL}",
        features=("seccomp",),
    ),
    odd('exec "$@"', f"{QUICK} --trace /dev/full spin exit 5", 5, f"/dev/full: write: {FULL}"),
    odd(
        'ulimit -f 0; exec "$@"',
        f"{QUICK} spin exit 5",
        1,
        r"ftruncate: File too large \(.* bytes of private memory\)",
    ),
    odd('ulimit -f 0; exec "$@"', "check --list", 0, "", "punch-fault"),
    # Limits, which take effect in the service too.
    odd('ulimit -n 12; exec "$@"', f"{QUICK} sha256", 1, ".*Too many open files.*|start: .*"),
    odd(
        'ulimit -v 120000; exec "$@"',
        f"{QUICK} sha256",
        1,
        ".*(Cannot allocate memory|no memory|ulimit -v|more memory).*",
    ),
    odd(
        'ulimit -t 1; exec "$@"',
        f"{QUICK} spin loop",
        1,
        r"KVM_RUN: .* \(engine is gone: killed by SIG(KILL, after .* of 1 seconds|XCPU, "
        r"the limit on) .*CPU time, ulimit -H?t\)",
    ),
    # A guest is read without room for the largest there could be.
    odd('ulimit -v 600000; exec "$@"', f"{QUICK} sha256", 0, "", DIGEST),
    odd(
        'ulimit -v 140000; exec "$@"',
        f"{QUICK} sha256",
        1,
        # Which of the two allocations comes first is chance.
        r"KVM_CREATE_VCPU: (Cannot allocate memory \(no memory for an emulator"
        r"|Resource temporarily unavailable \(pthread_create: .* ulimit -v).*",
    ),
    # A parent, a locale, a machine and a directory that are not as they should be.
    odd("trap '' CHLD; exec \"$@\"", f"{QUICK} spin exit 5", 5, ""),
    odd(
        "trap '' CHLD; exec \"$@\"",
        "exec --json IN/ignored -- sh -c exit${IFS}5",
        5,
        "",
        features=("fuse", "seccomp"),
    ),
    odd(
        "trap '' CHLD; exec \"$@\"",
        "check --scenario punch-fault --design v10 --jobs 1",
        0,
        "",
        "punch-fault",
    ),
    odd('exec "$@"', "doctor", 0, "", "Host", PYTHONIOENCODING="ascii", LC_ALL="C"),
    odd(
        'exec "$@"',
        f"{QUICK} ./Gäste",
        1,
        r"\S+: open: No such file or directory",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    ),
    odd(
        'exec "$@"',
        "run --prove --memory tiny",
        2,
        "argument --memory: .*",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        LC_ALL="POSIX",
    ),
    odd(
        'mkdir -p IN/gone && cd IN/gone && rmdir IN/gone; exec "$@"',
        f"{QUICK} sha256",
        0,
        "",
        DIGEST,
    ),
    odd(
        NO_PROC,
        f"{QUICK} sha256",
        1,
        r"start: No such file or directory \(the service .*/proc is not mounted.*\)",
        features=("fuse", "root"),
    ),
    odd(NO_PROC, "ps", 1, "/proc/net/unix: open: No such file or directory", features=("root",)),
    odd(
        NO_PROC,
        "doctor",
        1,
        r"/proc/thread-self/status: open: No such file or directory \(/proc is not mounted\)",
        features=("root",),
    ),
    odd(
        NO_PROC,
        "serve --socket IN/noproc",
        1,
        r"IN/noproc: bind: .* \(/proc is not mounted\)",
        features=("root",),
    ),
    odd(
        NO_PROC,
        "exec true",
        1,
        r"/proc: exec: .* \(the supervisor .*/proc is not mounted\)",
        features=("root", "seccomp"),
    ),
    odd(
        FOREIGN_PROC,
        "exec true",
        1,
        r"/proc: exec: No such process \(the supervisor cannot start: open: "
        r"it numbers the processes of another PID namespace\)",
        features=("root", "seccomp"),
    ),
    odd(
        FOREIGN_PROC,
        f"{QUICK} --prove",
        1,
        "/proc: open: No such process .*",
        features=("root", "fuse"),
    ),
    odd(NO_PROC, "check --list", 0, "", "punch-fault", features=("root",)),
]


@pytest.mark.parametrize("case", ODD)
def test_an_odd_start(
    case: Case, found: Callable[[Case], subprocess.CompletedProcess[str]], inputs: Path
) -> None:
    check(case, found(case), inputs)
