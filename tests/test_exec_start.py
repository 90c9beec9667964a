"""The program that ``restrictedmem exec`` becomes: its path, and the signals pending in it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outcomes import in_child
from restrictedmem.syscall import exec_program
from under_exec import EXEC

pytestmark = pytest.mark.requires("fuse", "seccomp")


def places(tmp_path: Path, **contents: bytes) -> dict[str, str]:
    """Make a file "tried" in some directories; return an environment with these as PATH."""
    for directory, content in contents.items():
        (tmp_path / directory).mkdir()
        path = tmp_path / directory / "tried"
        path.write_bytes(content)
        path.chmod(0o755)
    return {**os.environ, "PATH": ":".join(str(tmp_path / directory) for directory in contents)}


_SCRIPT = b'echo "$0 $1"; exit 5\n'
_ELF = Path("/bin/true").read_bytes()
#: An ELF of another machine, with a line that a shell would obey.
_FOREIGN = _ELF[:18] + b"\xb7" + _ELF[19:100] + b"\n>made\n"


@pytest.mark.parametrize(
    ("contents", "status", "found"),
    [
        ({"a": _SCRIPT}, 5, "a"),
        # execvp(3) stops at a file that the kernel cannot execute, and goes on after a missing one.
        ({"a": _SCRIPT, "b": b"#!/bin/sh\n" + _SCRIPT}, 5, "a"),
        ({"a": b"#!/no/such/interpreter\n", "b": _SCRIPT}, 5, "b"),
        ({"a": b"#!/etc/passwd\n", "b": _SCRIPT}, 5, "b"),
        ({"a": b"#!/etc/passwd\n"}, 126, ""),
        ({"a": _FOREIGN, "b": _SCRIPT}, 126, ""),
        ({"a": b"\0" + _SCRIPT}, 126, ""),
    ],
)
def test_a_program_is_found_as_execvp_finds_it(
    contents: dict[str, bytes], status: int, found: str, tmp_path: Path
) -> None:
    environment = places(tmp_path, **contents)
    command = [*EXEC, "--", "tried", "x"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (
        status,
        f"{tmp_path}/{found}/tried x\n" if found else "",
    )
    assert (done.stderr == "") == bool(found)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", ["", ":", "/nowhere:"])
def test_an_empty_place_in_the_path_is_where_the_program_is_started(
    path: str, tmp_path: Path
) -> None:
    environment = {**places(tmp_path, a=_SCRIPT), "PATH": path}
    command = [*EXEC, "--", "tried", "x"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path / "a",
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, "./tried x\n", "")


def test_the_signal_of_two_ends_is_one_and_stays_for_the_other() -> None:
    def body() -> object:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        children = [os.fork() or os._exit(0) for _ in range(2)]
        for child in children:
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        pending: list[bool] = []
        for child in children:
            os.waitpid(child, 0)
            exec_program._forget_end()
            pending.append(signal.SIGCHLD in signal.sigpending())
        return pending

    assert in_child(body) == "[True, False]"


def test_a_childs_end_is_not_taken_for_the_supervisors() -> None:
    """Only one signal of a kind can be pending.

    The signal of the program's own child is pending afterwards, too.
    """
    code = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})\n"
        "if os.fork() == 0: os.read(int(sys.argv[1]), 1); os._exit(0)\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    program = (
        "import os, signal; print(signal.sigtimedwait({signal.SIGCHLD}, 20) is not None, "
        "os.wait()[1])"
    )
    reader, writer = os.pipe()
    command = [sys.executable, "-c", code, str(reader), *EXEC, "--", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[reader]) as process:
        # At some moment of its start, which takes a fifth of a second.
        os.close(reader)
        os.close(writer)
        assert process.communicate(timeout=60)[0] == "True 0\n"


@pytest.mark.parametrize("pending", [False, True])
def test_no_end_of_a_child_is_pending_that_was_not(pending: bool) -> None:
    before: set[signal.Signals] = {signal.SIGCHLD} if pending else set()

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        if pending:
            os.kill(os.getpid(), signal.SIGCHLD)

    code = "import signal; print(signal.sigpending())"
    done = subprocess.run(
        [*EXEC, "--", sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=block,
    )
    assert done.stdout == f"{before}\n"
