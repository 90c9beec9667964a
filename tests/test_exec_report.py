"""``restrictedmem exec --json``, the report of a program's calls; and ``popen``.

The program is a child, and behaves as if it were not.
"""

import json
import os
import pty
import signal
import subprocess
import sys
from errno import EACCES, EINVAL, EMFILE, ENOENT
from pathlib import Path
from typing import Any

import pytest

import processes
from outcomes import Errno, outcome
from restrictedmem.abi.process import prctl
from restrictedmem.fd import readable
from restrictedmem.syscall.exec_program import CallOptions
from restrictedmem.syscall.popen import popen
from under_exec import EXEC, PRELUDE, kill_supervisor_of, under
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse", "seccomp")

NOTHING = {
    "created": 0,
    "sized": 0,
    "sized_bytes": 0,
    "punched": 0,
    "punched_bytes": 0,
    "peak_bytes": 0,
}
PAGE = 4096
PR_CAPBSET_DROP, CAP_KILL = 24, 5


def reported(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert report.pop("seconds") >= 0
    return report


def test_what_was_created_sized_and_punched_and_the_most_memory(tmp_path: Path) -> None:
    code = """
one, two = call(0), call(2)
os.ftruncate(one, 1 << 20); os.ftruncate(two, 1 << 21)
os.posix_fallocate(one, 0, 8 << 12)
libc.fallocate(one, 3, ctypes.c_long(0), ctypes.c_long(4 << 12))
os.posix_fallocate(two, 0, 3 << 12)
os.close(one)
os.posix_fallocate(two, 0, 6 << 12)
if os.fork() == 0: os._exit(call(0) < 0)
os.wait(); sys.exit(3)
"""
    process = under(code, "--json", str(tmp_path / "report"))
    # It is there when the command has ended.
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 3)
    program = [sys.executable, "-c", PRELUDE + code]
    bytes_ = {"sized_bytes": 3 << 20, "punched_bytes": 4 * PAGE, "peak_bytes": 8 * PAGE}
    counts = {"created": 3, "sized": 2, "punched": 1}
    assert reported(tmp_path / "report") == {
        "program": program,
        "status": 3,
        "signal": None,
        **counts,
        **bytes_,
    }


def test_what_was_refused_is_not_counted(tmp_path: Path) -> None:
    code = """
def punch(start, length): return libc.fallocate(fd, 3, ctypes.c_long(start), ctypes.c_long(length))
fd = call(0)
refused = call(1), punch(1, 4096), punch(0, 0), punch(0, 1), punch(-4096, 4096)
for size in (1, 1 << 63, 4096, 8192):
    try: os.ftruncate(fd, size)
    except (OSError, OverflowError): refused += (-1,)
try: os.posix_fallocate(fd, 0, 4 << 12)
except OSError: refused += (-1,)
print(refused, punch(0, 4096))
"""
    process = under(code, "--memory-max", "8K", "--json", str(tmp_path / "report"))
    assert process.communicate(timeout=60) == ("(-22, -1, -1, -1, -1, -1, -1, -1, -1) 0\n", "")
    counts = {
        "created": 1,
        "sized": 1,
        "sized_bytes": PAGE,
        "punched": 1,
        "punched_bytes": PAGE,
        "peak_bytes": 0,
    }
    assert reported(tmp_path / "report").items() >= counts.items()


def test_what_a_full_table_had_no_room_for_was_made_and_has_no_bytes(tmp_path: Path) -> None:
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
print(os.ftruncate(call(0), 4096), call(0), call(0))
"""
    process = under(code, "--json", str(tmp_path / "report"))
    assert process.communicate(timeout=60) == (f"None -{EMFILE} -{EMFILE}\n", "")
    counts = {"created": 3, "sized": 1, "sized_bytes": PAGE, "peak_bytes": 0}
    assert reported(tmp_path / "report").items() >= counts.items()


@pytest.mark.parametrize(
    "options",
    [["--api", "v9"], ["--memory-max", "4K"], ["--no-cachestat"], ["--syscall-number", "451"]],
    ids=" ".join,
)
def test_what_an_outer_one_decides_is_not_an_inner_ones(options: list[str]) -> None:
    inner = ["env", "-u", "RESTRICTEDMEM_SERVER", *EXEC, *options, "--", "true"]
    found = subprocess.run(
        [*EXEC, "--", *inner], check=False, capture_output=True, text=True, timeout=60
    )
    hint = f"an outer restrictedmem exec does the work: give it {options[0]}"
    assert (found.returncode, found.stderr) == (
        1,
        f"error: {options[0]}: Device or resource busy\nhint: {hint}\n",
    )


def test_memory_that_a_guest_took(tmp_path: Path) -> None:
    run = [
        sys.executable,
        "-m",
        "restrictedmem",
        "run",
        "--engine",
        "software",
        "--quiet",
        "--json",
        "/dev/stderr",
        "sha256",
    ]
    done = subprocess.run(
        [*EXEC, "--json", str(tmp_path / "report"), "--", *run],
        input=bytes(PAGE),
        capture_output=True,
        check=True,
        timeout=60,
    )
    report = reported(tmp_path / "report")
    assert report["created"] == report["sized"] == 1
    assert report["peak_bytes"] >= json.loads(done.stderr)["pages_taken"] * PAGE > 0


@pytest.mark.parametrize(
    ("arguments", "status", "signal_", "message"),
    [
        (
            ["/no/such/program"],
            127,
            None,
            "restrictedmem exec: /no/such/program: No such file or directory\n",
        ),
        ([""], 127, None, "restrictedmem exec: '': No such file or directory\n"),
        (["/etc/passwd"], 126, None, "restrictedmem exec: /etc/passwd: Permission denied\n"),
        (["sh", "-c", "exit 7"], 7, None, ""),
        (["sh", "-c", "kill -TERM $$"], None, signal.SIGTERM, ""),
        (["sh", "-c", "kill -KILL $$"], None, signal.SIGKILL, ""),
        (["sh", "-c", "kill -SEGV $$"], None, signal.SIGSEGV, ""),
        (["sh", "-c", "kill -PIPE $$"], None, signal.SIGPIPE, ""),
    ],
)
def test_the_status_is_the_programs(
    tmp_path: Path, arguments: list[str], status: int | None, signal_: int | None, message: str
) -> None:
    path = tmp_path / "report"
    found = subprocess.run(
        [*EXEC, "--json", str(path), "--", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.returncode, found.stderr) == (status if signal_ is None else -signal_, message)
    assert reported(path) == {"program": arguments, "status": status, "signal": signal_, **NOTHING}


def test_a_report_that_cannot_be_written_keeps_the_program_from_starting(tmp_path: Path) -> None:
    command = [
        *EXEC,
        "--json",
        str(tmp_path / "none" / "report"),
        "--",
        "touch",
        str(tmp_path / "started"),
    ]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (
        1,
        f"error: {tmp_path}/none/report: open: No such file or directory\n",
    )
    assert not (tmp_path / "started").exists()


def test_a_nested_one_is_not_the_one_that_knows(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("the outer one's")
    inner = [*EXEC, "--json", str(tmp_path / "report"), "--", "touch", str(tmp_path / "started")]
    found = subprocess.run(
        [*EXEC, "--", *inner], check=False, capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stderr.splitlines()[0]) == (
        1,
        "error: --json: Device or resource busy",
    )
    assert (tmp_path / "report").read_text() == "the outer one's"
    assert not (tmp_path / "started").exists()


def test_without_a_supervisor_the_status_is_still_the_programs(tmp_path: Path) -> None:
    mark = f"{tmp_path}-supervisor"
    code = "print(call(0) < 0, flush=True); sys.stdin.readline(); sys.exit(5)"
    with under(code, "--json", str(tmp_path / "report"), environment={"MARK": mark}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        kill_supervisor_of(mark)
        assert (process.communicate("\n", timeout=60), process.returncode) == (("", ""), 5)
    assert reported(tmp_path / "report")["error"].startswith(
        "the program's use of descriptors is not known: "
    )


@pytest.mark.requires("root")
def test_a_servers_service_does_not_count(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    serve = [sys.executable, "-m", "restrictedmem", "serve", "--socket", path]
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert server.stderr.readline() == f"listening on {path}\n"
        code = "print((call(0), os.environ['RESTRICTEDMEM_SERVER'][0]))"
        process = under(
            code, "--json", str(tmp_path / "report"), environment={"RESTRICTEDMEM_SERVER": path}
        )
        assert (process.communicate(timeout=60), process.returncode) == (("(3, '@')\n", ""), 0)
        server.terminate()
        server.stderr.read()
    assert reported(tmp_path / "report")["error"] == (
        "the program's use of descriptors is not known: STATUS: Operation not supported "
        "(a server's services do not count)"
    )


# The program behaves as if it ran in that process's place.


def is_gone(pid: int) -> bool:
    """Say whether a program has ended, whoever is to reap it."""
    return processes.process(pid) is None


def start(tmp_path: Path, script: str, **options: Any) -> subprocess.Popen[str]:
    """Start a shell script that says "ready"."""
    command = [*EXEC, "--json", str(tmp_path / "report"), "--", "sh", "-c", script]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGCHLD],
    ids=lambda s: s.name,
)
def test_what_is_sent_to_the_command_reaches_the_program(
    tmp_path: Path, number: signal.Signals
) -> None:
    with start(
        tmp_path, f"trap 'exit 9' {number.name[3:]}; echo ready; while read line; do :; done"
    ) as process:
        process.send_signal(number)
        assert process.wait(timeout=10) == 9
    assert reported(tmp_path / "report")["status"] == 9


def test_both_stop_and_go_on_together(tmp_path: Path) -> None:
    with start(tmp_path, "echo ready; kill -STOP $$; exit 4") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=10) == 4


def test_who_continues_the_program_alone_continues_the_command(tmp_path: Path) -> None:
    with start(tmp_path, "echo ready; echo $$; kill -STOP $$; exit 4") as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        os.kill(program, signal.SIGCONT)
        assert process.wait(timeout=10) == 4


def test_the_program_is_killed_with_the_command(tmp_path: Path) -> None:
    with start(tmp_path, "echo ready; echo $$; exec cat") as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        process.kill()
        wait_until(lambda: is_gone(program), "the program to be gone")


@pytest.mark.requires("root")
def test_a_program_of_another_user_is_killed_with_the_command(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.setuid(65534); print('ready'); print(os.getpid(), flush=True); "
        "sys.stdin.read()"
    )
    with start(tmp_path, f'exec {sys.executable} -c "{code}"') as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        process.kill()
        wait_until(lambda: is_gone(program), "the program to be gone")


@pytest.mark.requires("root")
def test_nor_does_it_outlive_the_commands_process_group(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.setsid(); os.setuid(65534); print('ready'); "
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    with start(tmp_path, f'exec {sys.executable} -c "{code}"', process_group=0) as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: is_gone(program), "the program to be gone")


@pytest.mark.requires("root")
def test_a_program_that_may_not_be_killed_is_waited_for(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.setuid(65534); print('ready', flush=True); sys.stdin.read(); "
        "sys.exit(7)"
    )
    with start(
        tmp_path,
        f'exec {sys.executable} -c "{code}"',
        preexec_fn=lambda: prctl(PR_CAPBSET_DROP, CAP_KILL),
    ) as process:
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 7
    assert reported(tmp_path / "report")["status"] == 7


def test_a_terminals_interrupt_comes_once(tmp_path: Path) -> None:
    code = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
print("ready", flush=True)
found = [signal.sigwait([signal.SIGINT, signal.SIGUSR1]).name]
while (info := signal.sigtimedwait([signal.SIGINT, signal.SIGUSR1], 1)):
    found.append(signal.Signals(info.si_signo).name)
print(*found)
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [*EXEC, "--json", str(tmp_path / "report"), "--", sys.executable, "-c", code],
        )
    output = b""

    def printed() -> bytes:
        nonlocal output
        if readable([terminal], 0.05):
            output += os.read(terminal, 1000)
        return output

    wait_until(lambda: b"ready\r\n" in printed(), "the program to be ready", 60)
    os.write(terminal, b"\x03")
    wait_until(lambda: printed().endswith(b"SIGINT\r\n"), "what it got", 60)
    assert b"SIGINT SIGINT" not in output
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_a_program_hears_that_its_terminal_is_gone(tmp_path: Path) -> None:
    """The kernel tells only the session's leader.

    Here that is the command, as a terminal's first program.
    """
    code = (
        f"trap 'echo heard > {tmp_path}/heard; exit 3' HUP; echo ready; while :; do sleep 0.1; done"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable, [*EXEC, "--json", str(tmp_path / "report"), "--", "sh", "-c", code]
        )
    output = b""
    while not output.endswith(b"ready\r\n"):
        assert readable([terminal], 60), "waited 60 s for the program to be ready"
        output += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert (tmp_path / "heard").exists()


# popen.


def test_popen_starts_the_program_itself() -> None:
    code = PRELUDE + "print((os.getpid(), call(0), sys.stdin.read()))"
    with popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        out, _ = process.communicate("word", timeout=60)
    # The test's own standard error is descriptor 2 there.
    assert eval(out) == (process.pid, 3, "word")


def test_popen_takes_what_exec_takes() -> None:
    code = (
        PRELUDE + "fd = libc.syscall(ctypes.c_long(1234), ctypes.c_long(0)); "
        "os.posix_fallocate(fd, 0, 8192)"
    )
    call = CallOptions(number=1234, cachestat=False, api="v9", memory_max=4096)
    with popen([sys.executable, "-c", code], call, stderr=subprocess.PIPE, text=True) as process:
        assert "No space left on device" in process.communicate(timeout=60)[1]


def test_popen_judges_flags_strictly_where_they_are_not_cachestats() -> None:
    code = (
        PRELUDE
        + "fd = os.memfd_create('own', 0); n = (ctypes.c_uint64 * 8)(); at = ctypes.addressof(n); "
        "print(call(fd, at, at + 16, 0))"
    )
    for call, told in ((CallOptions(cachestat=False), f"-{EINVAL}\n"), (None, "0\n")):
        with popen(
            [sys.executable, "-c", code], call, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.communicate(timeout=60)[0] == told


@pytest.mark.parametrize(
    ("arguments", "options"),
    [("true", {}), (["true"], {"shell": True}), (["true"], {"executable": "/bin/true"})],
)
def test_popen_takes_a_programs_arguments_alone(arguments: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^popen takes a sequence of arguments"):
        popen(arguments, **options)


def test_popen_looks_where_the_program_is_to_run(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tried"
    program.write_text("#!/bin/sh\nexit 6\n", encoding="ascii")
    program.chmod(0o755)
    for name in "PATH", b"PATH":
        environment: Any = {name: "bin" if isinstance(name, str) else b"bin"}
        with popen(
            ["tried"], cwd=tmp_path, env=environment, shell=False, executable=None
        ) as process:
            assert process.wait(60) == 6
    assert outcome(lambda: popen(["tried"], cwd=tmp_path / "bin", env={"PATH": "bin"})) == Errno(
        ENOENT
    )


def test_popen_of_what_cannot_be_executed(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("true\n")
    assert outcome(lambda: popen(["/no/such/program"])) == Errno(ENOENT)
    assert outcome(lambda: popen(["no-such-program"])) == Errno(ENOENT)
    assert outcome(lambda: popen([tmp_path / "script"])) == Errno(EACCES)
    assert outcome(lambda: popen(["true"], env={"PATH": "/nowhere"})) == Errno(ENOENT)
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "script").write_text("#!/bin/sh\nexit 6\n")
    with popen(["./script"], cwd=tmp_path) as process:
        assert process.wait(timeout=60) == 6
