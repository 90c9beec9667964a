"""Bad inputs and odd starts, each as a process: the exit status, one line that says what is wrong, and no traceback."""

import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from restrictedmem import guests
from restrictedmem.cli.main import main
from restrictedmem.service.report import REPORT_BYTES, Report

#: Numbers that are for no slice and no offset.
HUGE = (1 << 63, (1 << 64) - 1)
#: Where they are put in a guest: of its header, and of its first program header.
FIELDS = {
    "phoff": (32, "<Q"),
    "offset": (64 + 8, "<Q"),
    "paddr": (64 + 24, "<Q"),
    "filesz": (64 + 32, "<Q"),
    "memsz": (64 + 40, "<Q"),
}
READY = struct.pack("=II", 1 << 16, 0)
ANSWERS = {
    "silent": b"",
    "nested": READY + b"[" * 100_000,
    "number": READY + b"1",
    "object": READY
    + b'{"way": "x", "api": "v10", "design": "v10", "socket": "@x", "key": "no hex"}',
    "errno": struct.pack("=II", (1 << 32) - 1, 0),
}
REPORT = Report(0, bytes(48), bytes(64), bytes(16), "software", "v10", "1", bytes(32))
COMMAND = [sys.executable, "-m", "restrictedmem"]
#: Of a command that could be run for the cases at the same time.
_AT_ONCE = 3


@dataclass(frozen=True)
class Case:
    """A command line, in which IN is a directory of inputs, and what has to come of it."""

    words: str
    status: int
    #: What the line matches, behind ``error: ``; empty when nothing is said.
    line: str
    #: What a hint in a second line contains, if there is to be one.
    hint: str | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])
    #: How a shell starts it.
    start: str = 'exec "$@"'
    #: What stdout begins with.
    out: str = ""

    def __str__(self) -> str:
        return " ".join([*self.start.replace('exec "$@"', "").split(), self.words])


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
            f"{option.split()[0]} is for a service of one's own, .*",
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
        "--api is for a service of one's own, .*",
        environment={"RESTRICTEDMEM_SERVER": "@x"},
    ),
    Case(
        "serve --socket IN/socket --memory-max 1",
        2,
        "argument --memory-max: 1 is not a whole number of pages",
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
    Case(
        "verify IN/empty --memory 1M", 2, "--memory and --vcpus are a guest's, and go with --guest"
    ),
    Case("verify IN/empty --guest", 2, "--guest takes a guest, after it: .*"),
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
    Case("check --random 1 --list", 2, "--list goes without --random"),
    Case("check --list --exhaustive", 2, "--exhaustive is for searches, not for --list"),
]

NOT_ELF = r"exec: Exec format error \(not a static x86-64 ELF\)"
CUT_SHORT = r"exec: Exec format error \(ELF is cut short\)"
HOW_TO_BUILD = "docs/use/guests.md says how to build one"
NO_REPORT = rf"report: Bad message \(it has {REPORT_BYTES} bytes, this has"

INPUTS = [
    Case("measure nonesuch", 1, "no guest named nonesuch", "a file needs a slash"),
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
        r"/dev/zero: read: Invalid argument \(line 1 is no event\)",
    ),
    Case(
        "trace to-perfetto IN/nested IN/new",
        1,
        r"IN/nested: read: Invalid argument \(no trace: .*\)",
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
            "nested": r"READY: Protocol error \(its answer is no object in JSON\)",
            "number": r"READY: Protocol error \(its answer is no object in JSON\)",
            "object": r"READY: Protocol error \(it does not say what a service says of itself\)",
            "errno": r"start: Input/output error \(the service cannot start\)",
        }.items()
    ),
]

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
        # The program finds closed what was.
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
        r"KVM_RUN: .* \(engine is gone: killed by SIG(KILL, after .* of 1 seconds|XCPU, the limit on) .*CPU time, ulimit -H?t\)",
    ),
    # A guest is read without room for the largest there could be.
    odd('ulimit -v 600000; exec "$@"', f"{QUICK} sha256", 0, "", DIGEST),
    odd(
        'ulimit -v 140000; exec "$@"',
        f"{QUICK} sha256",
        1,
        "KVM_CREATE_VCPU: Cannot allocate memory .no memory for an emulator.*",
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
        r"/proc: exec: No such process \(the supervisor cannot start: open: it numbers the processes of another PID namespace\)",
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of files and sockets that nothing can be made of."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "empty").touch()
    (place / "text").write_text("text")
    (place / "odd").write_text("abc")
    (place / "report").write_bytes(REPORT.pack() + bytes(64))
    (place / "nested").write_text("[" * 60_000)
    guest = guests.path("spin").read_bytes()
    for name, (at, layout) in FIELDS.items():
        for value in HUGE:
            changed = bytearray(guest)
            struct.pack_into(layout, changed, at, value)
            (place / f"{name}-{value:#x}").write_bytes(changed)
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(answering(place / f"{name}.socket", answer))
        yield place


@contextmanager
def answering(path: Path, answer: bytes) -> Generator[None]:
    """Listen on a socket, and give whoever connects an answer with a descriptor."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as client:
                        if answer:
                            socket.send_fds(client, [answer], [0, 0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, inputs: Path
) -> Iterator[Callable[[Case], subprocess.CompletedProcess[str]]]:
    """Return what came of a case; those that were chosen run side by side."""
    specs: list[Any] = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [
        spec.params["case"]
        for spec in specs
        if spec is not None and isinstance(spec.params.get("case"), Case)
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures: dict[int, Future[subprocess.CompletedProcess[str]]] = {
            id(case): pool.submit(run, case, inputs) for case in chosen
        }
        yield lambda case: futures[id(case)].result()


def run(case: Case, inputs: Path) -> subprocess.CompletedProcess[str]:
    words = [
        word.replace("IN/", f"{inputs}/").replace("${IFS}", " ") for word in case.words.split()
    ]
    start = case.start.replace("IN/", f"{inputs}/")
    outer = {name: value for name, value in os.environ.items() if name != "RESTRICTEDMEM_SERVER"}
    inner = {name: value.replace("IN/", f"{inputs}/") for name, value in case.environment.items()}
    return subprocess.run(
        ["sh", "-c", start, "sh", *COMMAND, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**outer, **inner},
    )


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


@pytest.mark.parametrize("case", ODD)
def test_an_odd_start(
    case: Case, found: Callable[[Case], subprocess.CompletedProcess[str]], inputs: Path
) -> None:
    check(case, found(case), inputs)


def check(case: Case, done: subprocess.CompletedProcess[str], inputs: Path) -> None:
    line, *more = done.stderr.replace(str(inputs), "IN").splitlines() or [""]
    assert re.fullmatch(f"error: {case.line}" if case.line else "", line), done.stderr
    assert done.returncode == case.status
    assert done.stdout.startswith(case.out)
    assert case.out or not done.stdout
    # A second line is a hint, and there is no third.
    assert [each.startswith("hint: ") for each in more] in ([], [True]), done.stderr
    if case.hint is not None:
        assert more
        assert case.hint in more[0]
