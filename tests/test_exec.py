"""Programs that know nothing of this project, under ``restrictedmem exec``.

The tests try what calls of number 451 come to, whose process a program is, and how long the
supervisor lives.
"""

import json
import os
import signal
import subprocess
import sys
import uuid
from errno import EINVAL, EMFILE, ENOSYS
from pathlib import Path

import pytest

from processes import stop
from restrictedmem.abi import seccomp
from restrictedmem.syscall.filter import TABLES, program
from under_exec import EXEC, PRELUDE, kill_supervisor_of, said, supervisor_of, under
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse", "seccomp")


def test_a_descriptor_is_the_lowest_free_and_stays_open_across_exec() -> None:
    found = said(
        "before = opened(); fd = call(0); print((before, fd, os.get_inheritable(fd), "
        "os.fstat(fd).st_size))"
    )
    # The listing itself has one open.
    assert found == ([0, 1, 2, 3], 3, True, 0)


def test_its_owner_may_size_and_allocate_it_and_not_read_it() -> None:
    code = "fd = call(0); os.ftruncate(fd, 8192); os.posix_fallocate(fd, 0, 4096)\n"
    code += (
        "try: os.read(fd, 1)\nexcept OSError as error: "
        "print((os.fstat(fd).st_size, os.fstat(fd).st_blocks, error.errno))"
    )
    assert said(code) == (8192, 8, EINVAL)


def test_what_stands_in_other_registers_does_not_matter() -> None:
    assert said("print([call(0, 1, 2, 3, 4), call(0, 0xFFFFFFFFFFFF), call(2, 5)])") == [3, 4, 5]


def test_unknown_flags_take_no_descriptor() -> None:
    assert said("print(([call(flags) for flags in (1, 4, 0x80000000, 0xFFFFFFFF)], opened()))") == (
        [-EINVAL] * 4,
        [0, 1, 2, 3],
    )


def test_a_table_that_is_full() -> None:
    code = "resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6)); print([call(0) for _ in range(5)])"
    assert said(code) == [3, 4, 5, -EMFILE, -EMFILE]


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_program_without_standard_descriptors(closed: str) -> None:
    code = PRELUDE + "sys.exit(call(0) < 0)"
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *EXEC, "--", sys.executable, "-c", code]
    assert subprocess.run(shell, check=False, timeout=60).returncode == 0


def test_doctor_says_where_the_call_is_present() -> None:
    doctor = [sys.executable, "-m", "restrictedmem", "doctor", "--json"]
    states: list[str] = []
    for command in (doctor, [*EXEC, "--", *doctor]):
        findings = json.loads(
            subprocess.run(command, check=False, capture_output=True, timeout=60).stdout
        )["findings"]
        states.append(
            {finding["name"]: finding["state"] for finding in findings}["memfd_restricted(2)"]
        )
    assert states == ["no", "yes"]


def test_another_number() -> None:
    code = "print((libc.syscall(ctypes.c_long(1234), ctypes.c_long(0)), call(0, 0, 0, 0)))"
    number, other = said(code, "--syscall-number", "1234")
    assert number == 3
    assert other < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--syscall-number", "-1"], "argument --syscall-number: -1 is not a system call's number"),
        (
            ["--syscall-number", "0x1c3"],
            "argument --syscall-number: 0x1c3 is not a system call's number",
        ),
        (
            ["--syscall-number", str(1 << 30)],
            f"argument --syscall-number: {1 << 30} is not a system call's number",
        ),
        (
            ["--syscall-number", "9"],
            "argument --syscall-number: 9 may be another system call's: take one from 451 on",
        ),
        (
            ["--memory-max", "1Q"],
            "argument --memory-max: not a size: '1Q' (write 4096, 64K, 64M or 1G)",
        ),
        ([], "the following arguments are required: PROG, ARG"),
    ],
)
def test_a_wrong_command_line(options: list[str], message: str) -> None:
    program = ["--", "true"] if options else []
    done = subprocess.run([*EXEC, *options, *program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {message}\nhint: restrictedmem exec --help\n",
    )


# The program as a process.


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["/no/such/program"],
            127,
            "restrictedmem exec: /no/such/program: No such file or directory\n",
        ),
        ([""], 127, "restrictedmem exec: '': No such file or directory\n"),
        (
            ["/no\x1b[31m\nx"],
            127,
            "restrictedmem exec: /no\\x1b[31m\\nx: No such file or directory\n",
        ),
        (["/etc/passwd"], 126, "restrictedmem exec: /etc/passwd: Permission denied\n"),
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM, ""),
        (["sh", "-c", "kill -PIPE $$"], -signal.SIGPIPE, ""),
    ],
)
def test_the_status_is_the_programs(arguments: list[str], status: int, message: str) -> None:
    found = subprocess.run(
        [*EXEC, "--", *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stderr) == (status, message)


def test_the_process_and_its_children_are_the_programs() -> None:
    process = under(
        "print((os.getpid(), os.getpgid(0), os.getsid(0)))\ntry: os.wait()\n"
        "except ChildProcessError: print('none')"
    )
    out, _ = process.communicate(timeout=60)
    assert out == f"({process.pid}, {os.getpgid(0)}, {os.getsid(0)})\nnone\n"


def test_a_subreaper_stays_one_and_inherits_what_the_program_leaves_alone() -> None:
    """The subreaper waits for all its children: its own child, and an orphan of that child."""
    code = (
        "from restrictedmem.abi.process import is_subreaper\n"
        "call(0)\n"
        "if os.fork() == 0: os._exit(os.fork() and 7)\n"
        "statuses = []\n"
        "try:\n"
        "    while True: statuses.append(os.wait()[1] >> 8)\n"
        "except ChildProcessError: print((is_subreaper(), sorted(statuses)))"
    )
    start = (
        "import os, sys; from restrictedmem.abi import process; process.prctl(36, 1); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", start, *EXEC, "--", sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("(True, [0, 7])\n", "")


def test_a_nested_exec_uses_the_outer_supervisor() -> None:
    code = (
        "fd = call(0)\n"
        "inner = 'import ctypes, os; print(os.fstat(ctypes.CDLL(None).syscall(451, 0)).st_dev)'\n"
        "command = [sys.executable, '-m', 'restrictedmem', 'exec', '--', sys.executable, '-c', "
        "inner]\n"
        "print(os.fstat(fd).st_dev == int(subprocess.run(command, capture_output=True, "
        "check=True).stdout))"
    )
    assert said(code) is True


def test_another_listener_and_new_privileges_are_refused() -> None:
    code = (
        "from restrictedmem.abi import process, seccomp\n"
        "program = [seccomp.ret(seccomp.SECCOMP_RET_ALLOW)]\n"
        "try: seccomp.install(program, seccomp.FilterFlag.NEW_LISTENER)\n"
        "except OSError as error: print((error.errno, process.prctl(process.PR_GET_NO_NEW_PRIVS)))"
    )
    assert said(code) == (16, 1)


def test_threads_and_children_call_at_once() -> None:
    code = (
        "found = []\n"
        "def many():\n"
        "    for _ in range(25): found.append(call(0))\n"
        "threads = [threading.Thread(target=many) for _ in range(16)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "if (child := os.fork()) == 0: os._exit(call(0) != 403)\n"
        "print((sorted(found) == list(range(3, 403)), os.waitpid(child, 0)[1]))"
    )
    assert said(code) == (True, 0)


def test_signals_lose_no_descriptor_and_double_none() -> None:
    # With SA_RESTART: until the supervisor has heard of it, a call can be interrupted like any that
    # waits.
    code = """
import signal
ticks = []
signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
signal.siginterrupt(signal.SIGALRM, False)
before = opened()
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
found = [(fd := call(0)) > 2 and os.close(fd) is None for _ in range(3000)]
signal.setitimer(signal.ITIMER_REAL, 0)
print((all(found), opened() == before, len(ticks) > 100))
"""
    assert said(code) == (True, True, True)


# How long it lives.


def test_the_supervisor_ends_with_the_last_process() -> None:
    mark = str(uuid.uuid4())
    code = (
        "call(0)\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); os.close(1); os.close(2); sys.stdin.readline(); os._exit(call(0) < 0)\n"
        "print('left behind')"
    )
    with under(code, environment={"MARK": mark}) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.read() == "left behind\n"
        assert process.wait() == 0
        assert supervisor_of(mark) is not None
        process.stdin.write("end\n")
    wait_until(lambda: supervisor_of(mark) is None, "the supervisor to end")


def test_without_a_supervisor_the_call_is_not_there_and_programs_start() -> None:
    mark = str(uuid.uuid4())
    code = (
        "fd = call(0); print('ready', flush=True); sys.stdin.readline()\n"
        "print((call(0), subprocess.run(['true']).returncode, os.fstat(fd).st_size))"
    )
    with under(code, environment={"MARK": mark}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        kill_supervisor_of(mark)
        out, err = process.communicate("go\n", timeout=60)
    assert (out, err) == (f"{(-ENOSYS, 0, 0)}\n", "")


def test_a_call_that_waits_when_the_supervisor_is_killed_is_not_there_either() -> None:
    mark = str(uuid.uuid4())
    code = "print(os.getpid(), flush=True); sys.stdin.readline(); print(call(0))"
    with under(code, environment={"MARK": mark}) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid = int(process.stdout.readline())
        supervisor = supervisor_of(mark)
        assert supervisor is not None
        try:
            stop(supervisor)
            process.stdin.write("go\n")
            process.stdin.flush()
            wait_until(
                lambda: Path(f"/proc/{pid}/syscall").read_text().startswith("451 "),
                "the call to wait",
            )
        finally:
            os.kill(supervisor, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert (out, err) == (f"{-ENOSYS}\n", "")


def test_vfork_and_a_chain_of_execs() -> None:
    inner = (
        "import ctypes, os; fd = ctypes.CDLL(None).syscall(451, 0); print(fd, os.fstat(fd).st_size)"
    )
    code = (
        f"command = ['sh', '-c', 'exec env exec=1 nice \"$0\" -c \"$1\"', sys.executable, "
        f"{inner!r}]\n"
        # Without pass_fds and the like, subprocess and posix_spawn use vfork.
        "pid = os.posix_spawnp('sh', command, os.environ); status = os.waitpid(pid, 0)[1]\n"
        "print((status, subprocess.run(command, capture_output=True, text=True, "
        "close_fds=False).stdout))"
    )
    process = under(code)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("3 0\n(0, '3 0\\n')\n", "")


# The filter.


#: The filters for number 451 as the kernel gets them, four instructions a line.
_FILTERS = {
    "x86_64": (
        "20000000040000001500000f3e0000c0200000000000000015000001c3010000"
        "060000000000c07f150000018a000000060000000000c07f1500000609000000"
        "20000000280000004500030020080000540000000f0000001500000102000000"
        "060000000000c07f060000000000ff7f15000001c30100400600000026000500"
        "060000000000ff7f1500001103000040200000000000000015000001c3010000"
        "060000000000c07f1500000164000000060000000000c07f150000010d010000"
        "060000000000c07f150000015a000000060000000000c07f15000006c0000000"
        "20000000280000004500030020080000540000000f0000001500000102000000"
        "060000000000c07f060000000000ff7f060000000000ff7f060000000000ff7f"
    ),
    "aarch64": (
        "20000000040000001500000db70000c0200000000000000015000001c3010000"
        "060000000000c07f150000012c000000060000000000c07f15000006de000000"
        "20000000280000004500030020080000540000000f0000001500000102000000"
        "060000000000c07f060000000000ff7f060000000000ff7f060000000000ff7f"
    ),
}


@pytest.mark.parametrize("machine", _FILTERS)
def test_the_filter_is_these_bytes(machine: str) -> None:
    assert b"".join(map(bytes, program(machine, 451))).hex() == _FILTERS[machine]


def test_a_jump_goes_to_the_instruction_after_its_label() -> None:
    allow = seccomp.ret(seccomp.SECCOMP_RET_ALLOW)
    made = seccomp.assemble(
        seccomp.jump_unless(7, "far"),
        seccomp.jump_if_any(8, "near"),
        "near",
        *[allow] * 254,
        "far",
        allow,
    )
    assert [(one.jt, one.jf, one.k) for one in made[:2]] == [(0, 255, 7), (0, 0, 8)]


def test_a_jump_that_classic_bpf_does_not_have_is_refused() -> None:
    allow, jump = seccomp.ret(seccomp.SECCOMP_RET_ALLOW), seccomp.jump_unless(7, "there")
    with pytest.raises(ValueError, match="256 instructions away"):
        seccomp.assemble(jump, *[allow] * 256, "there", allow)
    with pytest.raises(ValueError, match="-1 instructions away"):
        seccomp.assemble("there", jump)
    with pytest.raises(KeyError, match="there"):
        seccomp.assemble(jump, allow)


def test_the_filter_stops_what_it_must() -> None:
    """Interpret it, call by call: classic BPF has four kinds of instructions here."""

    def judged(machine: str, arch: int, nr: int, flags: int = 0) -> int:
        found, at, instructions = 0, 0, program(machine, 451)
        data = seccomp.seccomp_data(nr=nr, arch=arch, arg3=flags)
        raw = bytes(data)
        while True:
            one = instructions[at]
            at += 1
            match one.code:
                case 0x20:
                    found = int.from_bytes(raw[one.k : one.k + 4], "little")
                case 0x54:
                    found &= one.k
                case 0x15:
                    at += one.jt if found == one.k else one.jf
                case 0x45:
                    at += one.jt if found & one.k else one.jf
                case 0x06:
                    return int(one.k)
                case _:
                    pytest.fail(f"instruction {one.code:#x}")

    stop, allow = seccomp.SECCOMP_RET_USER_NOTIF, seccomp.SECCOMP_RET_ALLOW
    for machine, tables in TABLES.items():
        for table in tables:
            assert judged(machine, table.arch, 451) == stop
            assert judged(machine, table.arch, table.fstatfs) == stop
            assert [
                judged(machine, table.arch, table.mmap, flags) for flags in (0x02, 0x12, 0x4002)
            ] == [stop] * 3
            assert [
                judged(machine, table.arch, table.mmap, flags)
                for flags in (0x01, 0x03, 0x22, 0x802)
            ] == [allow] * 4
            assert judged(machine, table.arch, 0) == allow
            assert (
                table.old_mmap is None or judged(machine, table.arch, table.old_mmap, 0x22) == stop
            )
        assert judged(machine, 0xDEAD, 451) == allow
    x86 = seccomp.AUDIT_ARCH["x86_64"]
    assert judged("x86_64", x86, 451 | seccomp.X32_BIT) == seccomp.SECCOMP_RET_ERRNO | ENOSYS
    assert judged("x86_64", x86, 9 | seccomp.X32_BIT, 0x02) == allow
    assert judged("x86_64", seccomp.AUDIT_ARCH["i386"], 269) == stop
