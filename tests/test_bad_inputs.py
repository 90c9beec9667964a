"""Bad inputs, each as a process.

It ends with its exit status and one line that says what is wrong, without a traceback.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_cases import HUGE, Case, check, found, inputs
from restrictedmem.cli.main import main
from restrictedmem.service.report import REPORT_BYTES

__all__ = ["found", "inputs"]

USAGE = [
    Case("", 2, "the following arguments are required: COMMAND"),
    Case("nonesuch", 2, r"argument COMMAND: invalid choice: 'nonesuch' \(choose from .*\)"),
    Case("run", 2, "name a guest, or --prove"),
    Case("run --memory tiny sha256", 2, r"argument --memory: not a size: 'tiny' \(write .*\)"),
    Case("run --memory 1000 sha256", 2, "argument --memory: 1000 is not a whole number of pages"),
    Case(
        f"run --memory {1 << 63} sha256",
        2,
        rf"argument --memory: {1 << 63}: larger than any file \(9223372036854771712\)",
    ),
    Case(f"run --memory {10**30} sha256", 2, "argument --memory: not a size: '10{30}' .*"),
    Case(
        "run --memory-max 3K sha256", 2, "argument --memory-max: 3K is not a whole number of pages"
    ),
    Case("run --vcpus 0 sha256", 2, "argument --vcpus: 0 is not a number of vCPUs, 1 to 4096"),
    Case("run --gdb 65536 sha256", 2, "argument --gdb: 65536 is not a port"),
    Case(
        "run --prove as-root sha256",
        2,
        "--prove runs a guest of its own: leave out the guest, or --prove",
    ),
    Case("run --prove --gdb 0", 2, "--gdb goes with a guest, not with --prove"),
    Case("run --prove --trace IN/new", 2, "--trace goes with a guest, not with --prove"),
    Case("run --prove --vcpus 2", 2, "--vcpus goes with a guest, not with --prove"),
    Case("run --prove --platform snp", 2, "--platform goes with a guest, not with --prove"),
    Case("run --engine kernel --pin sha256", 2, "--pin is for the software engine: .*"),
    *(
        Case(
            f"run {option} sha256",
            2,
            f"{option.split()[0]} is for a service that this command starts, .*",
            environment={"RESTRICTEDMEM_SERVER": "@x"},
        )
        for option in ("--api v9", "--memory-max 64M", "--design v9", "--backing memfd", "--pin")
    ),
    Case(
        "exec --memory-max 3K true", 2, "argument --memory-max: 3K is not a whole number of pages"
    ),
    Case(
        "exec --syscall-number 0 true",
        2,
        "argument --syscall-number: 0 may be another system call's: take one from 451 on",
    ),
    Case(
        "exec --api v9 true",
        2,
        "--api is for a service that this command starts, .*",
        environment={"RESTRICTEDMEM_SERVER": "@x"},
    ),
    Case(
        "serve --socket IN/socket --memory-max 1",
        2,
        "argument --memory-max: 1 is not a whole number of pages",
    ),
    *(
        Case(
            f"serve --socket IN/socket --mode {mode}",
            2,
            f"argument --mode: {mode} is not a mode: 000 to 777",
        )
        for mode in ("1000", "778", "0o7", "00777")
    ),
    Case(
        "serve --socket IN/socket --max-vms 0",
        2,
        "argument --max-vms: 0 is not a number of VMs, 1 to 1048576",
    ),
    Case("measure --vcpus 0 sha256", 2, "argument --vcpus: 0 is not a number of vCPUs, 1 to 4096"),
    Case(
        "measure --vcpus -1 sha256",
        2,
        "argument --vcpus: (-1 is not a number of vCPUs, 1 to 4096|expected one argument)",
    ),
    Case("verify IN/empty --memory 1M", 2, "--memory and --vcpus go with --guest"),
    Case("verify IN/empty --guest", 2, "--guest needs a guest: .*"),
    Case("check --random 0", 2, "argument --random: 0 is not a number of seconds"),
    Case(
        "check --random -1",
        2,
        "argument --random: (-1 is not a number of seconds|expected one argument)",
    ),
    Case("check --random nan", 2, "argument --random: nan is not a number of seconds"),
    Case("check --limit inf", 2, "argument --limit: inf is not a number of seconds"),
    Case("check --jobs 0", 2, "argument --jobs: 0 is not a number of jobs, 1 to 1048576"),
    Case("check --seed 1", 2, "--seed goes with --random"),
    Case("check --random 1 --jobs 1", 2, "--jobs is for searches, not for --random"),
    Case("check --random 1 --list", 2, "--list does not go with --random"),
    Case("check --list --exhaustive", 2, "--exhaustive is for searches, not for --list"),
]

NOT_ELF = r"exec: Exec format error \(not a static x86-64 ELF\)"
CUT_SHORT = r"exec: Exec format error \(ELF is cut short\)"
HOW_TO_BUILD = "docs/use/guests.md says how to build one"
NO_REPORT = rf"report: Bad message \(a report has {REPORT_BYTES} bytes, this has"

INPUTS = [
    Case("measure nonesuch", 1, "no guest named nonesuch", "a path needs a slash"),
    Case("measure IN/missing", 1, "IN/missing: open: No such file or directory"),
    Case("measure IN/", 1, "IN: open: Is a directory"),
    Case("measure IN/empty", 1, f"IN/empty: {NOT_ELF}", HOW_TO_BUILD),
    Case("measure /dev/zero", 1, f"/dev/zero: {NOT_ELF}", HOW_TO_BUILD),
    Case("measure IN/text", 1, f"IN/text: {NOT_ELF}", HOW_TO_BUILD),
    *(
        Case(f"measure IN/phoff-{at:#x}", 1, f"IN/phoff-{at:#x}: {CUT_SHORT}", HOW_TO_BUILD)
        for at in HUGE
    ),
    *(
        Case(f"measure IN/offset-{at:#x}", 1, f"IN/offset-{at:#x}: {CUT_SHORT}", HOW_TO_BUILD)
        for at in HUGE
    ),
    *(
        Case(f"measure IN/filesz-{at:#x}", 1, f"IN/filesz-{at:#x}: {CUT_SHORT}", HOW_TO_BUILD)
        for at in HUGE
    ),
    *(
        Case(
            f"measure IN/memsz-{at:#x}",
            1,
            rf"IN/memsz-{at:#x}: exec: Exec format error \(it ends at .*\)",
            "--memory",
        )
        for at in HUGE
    ),
    *(
        Case(
            f"measure IN/paddr-{at:#x}",
            1,
            rf"IN/paddr-{at:#x}: exec: Exec format error \(linked at {at:#x}, .*\)",
            "guest.ld",
        )
        for at in HUGE
    ),
    Case(
        "measure --vcpus 4097 sha256",
        2,
        "argument --vcpus: 4097 is not a number of vCPUs, 1 to 4096",
    ),
    Case(
        "measure --vcpus 4096 sha256",
        1,
        r"\S+/sha256.elf: exec: Exec format error \(it ends at .* 4096 vCPUs begin at .*\)",
        "--memory",
    ),
    Case(
        f"run --memory {(1 << 63) - 4096} sha256",
        1,
        "mmap: .* [(]9223372036854771712 bytes that owner and guest share[)]",
    ),
    Case("run --trace IN/ sha256", 1, "IN/: open: Is a directory"),
    Case("run --trace IN/missing/new sha256", 1, "IN/missing/new: open: No such file or directory"),
    Case("verify IN/missing", 1, "IN/missing: open: No such file or directory"),
    Case("verify IN/empty", 1, rf"IN/empty: {NO_REPORT} 0\)"),
    Case("verify -", 1, rf"stdin: {NO_REPORT} 0\)"),
    Case("verify /dev/zero", 1, rf"/dev/zero: {NO_REPORT} 65536\)"),
    Case("verify IN/odd", 1, "the report has an odd number of hexadecimal digits"),
    Case(
        "verify IN/report --key IN/text",
        1,
        r"IN/text: key: Invalid argument \(no public key in PEM\)",
    ),
    Case(
        "verify IN/report --key /dev/zero",
        1,
        r"/dev/zero: key: Invalid argument \(no public key in PEM\)",
    ),
    Case("verify IN/report --guest /dev/zero", 1, f"/dev/zero: {NOT_ELF}", HOW_TO_BUILD),
    Case(
        "trace to-perfetto /dev/zero IN/new",
        1,
        r"/dev/zero: read: Invalid argument \(line 1 is not an event\)",
    ),
    Case(
        "trace to-perfetto IN/nested IN/new",
        1,
        r"IN/nested: read: Invalid argument \(not a trace: .*\)",
    ),
    Case("trace to-perfetto IN/missing IN/new", 1, "IN/missing: read: No such file or directory"),
    Case("exec --json IN/missing/new true", 1, "IN/missing/new: open: No such file or directory"),
    Case("exec --json IN/ true", 1, "IN/: open: Is a directory"),
    Case(
        "serve --socket IN/missing/socket", 1, "IN/missing/socket: open: No such file or directory"
    ),
    Case(f"serve --socket IN/{'x' * 100}", 1, f"IN/{'x' * 100}: bind: File name too long"),
    Case(
        "serve --socket IN/socket --consumer x=/dev/zero",
        1,
        "/dev/zero: consumer x: File too large",
    ),
    Case(
        "serve --socket IN/socket --signing-key /dev/zero",
        1,
        "--signing-key: /dev/zero: open: Invalid argument .*",
        "openssl genpkey",
    ),
    Case(
        "serve --socket IN/socket --user nonesuch",
        1,
        *(
            ("only root can become another user", "as root")
            if os.geteuid()
            else ("no user named nonesuch", "useradd")
        ),
    ),
    Case("check --scenario nonesuch", 1, "no scenario 'nonesuch'", "--list"),
    Case(
        "run sha256",
        1,
        "/nonexistent: connect: No such file or directory",
        environment={"RESTRICTEDMEM_SERVER": "/nonexistent"},
    ),
    Case(
        "run sha256",
        1,
        "x{200}: connect: File name too long",
        environment={"RESTRICTEDMEM_SERVER": "x" * 200},
    ),
    *(
        Case("run sha256", 1, f"{line}", environment={"RESTRICTEDMEM_SERVER": f"IN/{name}.socket"})
        for name, line in {
            "silent": r"start: Connection reset by peer \(.*\)",
            "nested": r"READY: Protocol error \(its answer is not an object in JSON\)",
            "number": r"READY: Protocol error \(its answer is not an object in JSON\)",
            "object": r"READY: Protocol error \(it lacks fields that every service sends\)",
            "errno": r"start: Input/output error \(the service cannot start\)",
        }.items()
    ),
]


@pytest.mark.parametrize("case", USAGE, ids=str)
def test_a_wrong_command_line(
    case: Case, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RESTRICTEDMEM_SERVER", raising=False)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    words = case.words.replace("IN/", f"{inputs}/").split()
    status = main(words)
    said = capfd.readouterr()
    check(case, subprocess.CompletedProcess(words, status, said.out, said.err), inputs)


@pytest.mark.parametrize("case", INPUTS, ids=str)
def test_a_bad_input(
    case: Case, found: Callable[[Case], subprocess.CompletedProcess[str]], inputs: Path
) -> None:
    check(case, found(case), inputs)
