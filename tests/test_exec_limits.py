"""Limits and errors that keep exec from a service, a supervisor or a descriptor, and its texts."""

import marshal
import os
import re
import resource
import socket
import subprocess
import sys
from errno import EAGAIN, ECHILD, EINVAL, EMFILE, ENFILE, ENOENT

import pytest

from outcomes import Errno, outcome
from restrictedmem.fd import readable
from restrictedmem.service.client import Service
from restrictedmem.syscall import exec_program
from under_exec import EXEC, PRELUDE, under
from users import as_user

pytestmark = pytest.mark.requires("fuse", "seccomp")


@pytest.mark.requires("root")
def test_what_keeps_the_service_from_starting_is_the_calls_errno() -> None:
    expected = as_user(lambda: outcome(Service.start), fuse=False)
    assert isinstance(expected, Errno)
    out, err = as_user(
        lambda: under("print([call(0), call(0), call(1)])").communicate(timeout=60), fuse=False
    )
    assert eval(out) == [-expected.number, -expected.number, -EINVAL]
    assert err.startswith("restrictedmem exec: no descriptor can be made: start: ")
    assert err.count("\n") == 1


def test_what_keeps_the_service_from_starting_is_said_once() -> None:
    code = "print([call(0), call(0)])"
    process = under(code, environment={"RESTRICTEDMEM_SERVER": "/nonexistent"})
    out, err = process.communicate(timeout=60)
    assert out == f"{[-ENOENT, -ENOENT]}\n"
    assert (
        err == "restrictedmem exec: no descriptor can be made: /nonexistent: connect: "
        "No such file or directory\n"
    )


def _said_of_a_limit(limit: int, soft: int, hard: int) -> None:
    """Check that a program under a limit has its descriptor, or standard error says why not."""
    code = "found = call(0); print(found)"
    command = [*EXEC, "--", sys.executable, "-c", PRELUDE + code]

    def lower() -> None:
        resource.setrlimit(limit, (soft, hard))

    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, preexec_fn=lower
    )
    line, *more = done.stderr.splitlines() or [""]
    if done.returncode:
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            r"error: (/\S+: )?exec: .* \(the supervisor cannot start(: \w+)?\)", line
        ), done.stderr
        assert ["ulimit" in hint for hint in more] == [True], done.stderr
    elif int(done.stdout) < 0:
        assert re.fullmatch(
            r"restrictedmem exec: no descriptor can be made: (/\S+: )?(start|pthread_create): .*",
            line,
        ), done.stderr
        assert not more, done.stderr
        assert int(done.stdout) in (-EMFILE, -EAGAIN)
    else:
        assert done.stderr == ""


@pytest.mark.parametrize("hard", [6, 7, 8, 9, 10, 11, 12, 14])
def test_a_limit_on_descriptors_is_said(hard: int) -> None:
    _said_of_a_limit(resource.RLIMIT_NOFILE, hard, hard)


def test_a_soft_limit_on_descriptors_is_the_programs_alone() -> None:
    code = "found = call(0); print((found, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))"
    command = [
        "sh",
        "-c",
        'ulimit -Sn 8 && exec "$@"',
        "sh",
        *EXEC,
        "--",
        sys.executable,
        "-c",
        PRELUDE + code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("(3, 8)\n", "")


@pytest.mark.requires("root")
@pytest.mark.parametrize("most", range(2, 8))
def test_a_limit_on_processes_is_said(most: int) -> None:
    # Other processes of the user would count, too.
    uid = 1_000_000 + os.getpid()
    as_user(lambda: _said_of_a_limit(resource.RLIMIT_NPROC, most, most), uid)


@pytest.mark.requires("root")
def test_what_keeps_the_supervisor_from_starting_is_said() -> None:
    start = 'mount -t tmpfs none /dev && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", start, "sh", *EXEC, "--", "echo", "run"],
        check=False,
        capture_output=True,
        text=True,
    )
    line = "error: /dev/null: exec: No such file or directory (the supervisor cannot start: open)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize(
    ("told", "expected"),
    [(None, Errno(ECHILD)), ((EMFILE, "", None), Errno(EMFILE)), (exec_program._READY, None)],
)
def test_what_a_supervisor_said_is_heard_though_it_took_no_listener(
    told: "exec_program._Told | None", expected: object
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            ours.send(b"listener")
            if told is not None:
                theirs.send(marshal.dumps(told))
        assert outcome(lambda: exec_program._hear(ours)) == expected


def test_what_keeps_the_first_descriptor_from_being_made_is_said_once() -> None:
    """The service has started, and has no descriptor left to make a file with."""
    command = [
        "sh",
        "-c",
        'ulimit -n 256 && exec "$@"',
        "sh",
        *EXEC,
        "--",
        sys.executable,
        "-c",
        PRELUDE + "print([call(0), call(0)])",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{[-ENFILE, -ENFILE]}\n"
    assert (
        done.stderr == "restrictedmem exec: no descriptor can be made: memfd_restricted: "
        "Too many open files in system\n"
    )


def test_what_a_full_table_of_the_caller_refuses_is_not_said() -> None:
    code = "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); print(call(0))"
    out, err = under(code).communicate(timeout=60)
    assert (out, err) == (f"{-EMFILE}\n", "")


def test_a_limit_on_file_sizes_is_no_limit_on_descriptors() -> None:
    code = (
        PRELUDE + "fd = call(0); os.ftruncate(fd, 4096); os.posix_fallocate(fd, 0, 4096); "
        "print(fd, call(2))"
    )
    command = [
        "sh",
        "-c",
        'ulimit -f 4000 && exec "$@"',
        "sh",
        *EXEC,
        "--",
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("3 4\n", "")


@pytest.mark.parametrize(
    "first", ["call(0)", "Service.connect(os.environ['RESTRICTEDMEM_SERVER'])"]
)
def test_standard_error_is_kept_no_longer_than_until_descriptors_can_be_made(first: str) -> None:
    with under(
        f"from restrictedmem.service.client import Service; {first}; os.close(2); input()"
    ) as process:
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.poll() is None
        process.communicate("\n", timeout=60)


def test_an_inherited_descriptor_above_the_limit_is_the_programs_alone() -> None:
    """Only the program keeps the pipe open.

    So a process that waits for the end of the pipe waits for the program. The pipe's number and the
    present limit do not matter.
    """
    code = "call(0); os.close(700); input()"
    command = [
        "sh",
        "-c",
        'ulimit -Sn 100 && exec "$@"',
        "sh",
        *EXEC,
        "--",
        sys.executable,
        "-c",
        PRELUDE + code,
    ]
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe:
        os.dup2(writer, 700, inheritable=True)
        os.close(writer)
        with subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False) as process:
            os.close(700)
            assert readable([pipe], 30), "somebody else has the pipe"
            assert pipe.read() == b""
            assert process.poll() is None
            process.communicate(b"\n", timeout=60)


def test_a_service_that_is_full_says_so() -> None:
    # Its descriptors are as many as its hard limit lets it have, less what it keeps for itself.
    code = (
        "found = [call(0) for _ in range(100)]; "
        "print((found.index(-errno.ENFILE), {fd for fd in found if fd < 0}, call(0)))"
    )
    command = [
        "sh",
        "-c",
        'ulimit -n 300 && exec "$@"',
        "sh",
        *EXEC,
        "--",
        sys.executable,
        "-c",
        PRELUDE + code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert eval(done.stdout) == (300 - 256, {-ENFILE}, -ENFILE)
