"""Programs that know nothing of this project, under ``restrictedmem exec``: what their calls of number 451 come to."""

import json
import marshal
import mmap
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import uuid
from errno import (
    EAGAIN,
    EBADF,
    ECHILD,
    EEXIST,
    EFAULT,
    EINVAL,
    EMFILE,
    ENFILE,
    ENODEV,
    ENOENT,
    ENOMEM,
    ENOSYS,
    EOPNOTSUPP,
    EOVERFLOW,
)
from pathlib import Path

import pytest

from outcomes import Errno, outcome
from processes import stop
from restrictedmem.abi import memory, seccomp
from restrictedmem.fd import readable
from restrictedmem.service.client import Service
from restrictedmem.syscall import exec_program
from restrictedmem.syscall.filter import TABLES, program
from under_exec import EXEC, PRELUDE, kill_supervisor_of, said, supervisor_of, under
from users import as_user
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse", "seccomp")

MAGIC = 0x5245534D
FUSE_MAGIC = 0x65735546


def test_a_descriptor_is_the_lowest_free_and_stays_open_across_exec() -> None:
    found = said(
        "before = opened(); fd = call(0); print((before, fd, os.get_inheritable(fd), os.fstat(fd).st_size))"
    )
    # The listing itself has one open.
    assert found == ([0, 1, 2, 3], 3, True, 0)


def test_its_owner_may_size_and_allocate_it_and_not_read_it() -> None:
    code = "fd = call(0); os.ftruncate(fd, 8192); os.posix_fallocate(fd, 0, 4096)\n"
    code += "try: os.read(fd, 1)\nexcept OSError as error: print((os.fstat(fd).st_size, os.fstat(fd).st_blocks, error.errno))"
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


# cachestat, whose number it is.

CACHESTAT = """
fd = os.memfd_create("one's own", 0)
os.write(fd, bytes(1 << 20))
span, result = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 6)(*[7] * 6)
at, to = ctypes.addressof(span), ctypes.addressof(result)
"""


def _has_cachestat() -> bool:
    try:
        with memory.memfd_create("test") as fd:
            memory.resident_pages(fd.fileno(), 0, 4096)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_cachestat(), reason="Linux before 6.5 has no cachestat")
def test_cachestat_is_what_it_is_outside() -> None:
    code = CACHESTAT + "os.pread(fd, 1 << 20, 0); print((call(fd, at, to, 0), list(result)))"
    outside = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, check=True
    ).stdout
    status, result = eval(outside)
    assert (status, result[-1]) == (0, 7)
    assert said(code) == (status, result)


@pytest.mark.parametrize(
    "arguments",
    [
        "fd, at, to, 1",
        "fd, at + 1, to, 0",
        "fd, at, to + 4, 0",
        "fd, 0, to, 0",
        "fd, at, 0, 0",
        "fd, at, 8, 0",
        "fd, -8, to, 0",
        "1000, at, to, 0",
        "-1, at, to, 0",
    ],
)
def test_a_call_that_may_be_none_of_cachestats_writes_nothing(arguments: str) -> None:
    code = CACHESTAT + f"print((call({arguments}), list(result)))"
    assert said(code) == (-EINVAL, [7] * 6)


def test_every_pattern_of_arguments_is_answered_by_the_rule() -> None:
    kernels = (0, -EOPNOTSUPP) if _has_cachestat() else (-ENOSYS,)
    code = (
        CACHESTAT
        + f"KERNELS = {kernels}"
        + """
firsts = [0, 2, 1, 3, fd, 99, 1 << 31, 1 << 32, (1 << 32) + 2, (1 << 32) + fd, (1 << 63) - 1, -1]
pointers = [0, 8, at, at + 1, to, to + 4, 1 << 40, (1 << 47) - 8, -8]
mapped, bad = {at, to}, []
for first in firsts:
    for one in pointers:
        for other in pointers:
            for fourth in (0, 1, 1 << 32, -1):
                found, low = call(first, one, other, fourth), first & 0xFFFFFFFF
                if low in (0, 2):
                    right = found > 2 and os.close(found) is None
                elif fourth & 0xFFFFFFFF == 0 and low in (1, 3) and {one, other} <= mapped:
                    # To the kernel, which knows whether the file has a page cache, and the call (Linux 6.5).
                    right = found in KERNELS
                else:
                    right = found == -errno.EINVAL
                if not right: bad.append((first, one, other, fourth, found))
print(bad)
"""
    )
    # Some 4,000 calls: half a minute under emulation.
    assert said(code, patience=110) == []


def test_flags_can_be_judged_strictly() -> None:
    code = CACHESTAT + "print((call(fd, at, to, 0), list(result), call(0) > 0))"
    assert said(code, "--no-cachestat") == (-EINVAL, [7] * 6, True)


# What FUSE cannot say.


def test_it_cannot_be_mapped_privately_either() -> None:
    code = (
        "fd = call(0); os.posix_fallocate(fd, 0, 4096)\n"
        "def map(fd, flags):\n"
        "    libc.mmap.restype = ctypes.c_void_p\n"
        "    found = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, flags, fd, ctypes.c_long(0))\n"
        "    return ctypes.get_errno() if found == ctypes.c_void_p(-1).value else 0\n"
        "plain = os.open(sys.executable, os.O_RDONLY)\n"
        "print([map(fd, mmap.MAP_PRIVATE), map(fd, mmap.MAP_SHARED), map(plain, mmap.MAP_PRIVATE), map(99, mmap.MAP_PRIVATE)])"
    )
    assert said(code) == [ENODEV, ENODEV, 0, EBADF]


def test_a_private_mapping_is_refused_as_a_shared_one_is() -> None:
    """Of which the kernel alone decides. What depends on more than the numbers of the call is a row of docs/reference/divergences.md."""
    code = (
        "fd = call(0); os.posix_fallocate(fd, 0, 4096); path = os.open(f'/proc/self/fd/{fd}', os.O_PATH)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "def map(fd, kind, address=0, length=4096, flags=0, offset=0):\n"
        "    word = ctypes.c_ulong\n"
        "    found = libc.mmap(word(address), word(length), mmap.PROT_READ, kind | flags, fd, ctypes.c_long(offset))\n"
        "    return ctypes.get_errno() if found == ctypes.c_void_p(-1).value else 0\n"
        "held = mmap.mmap(-1, 4096); here = ctypes.addressof(ctypes.c_char.from_buffer(held))\n"
        "FIXED, HUGETLB, NOREPLACE = 0x10, 0x40000, 0x100000\n"
        "cases = [(fd, {}), (fd, {'length': 0}), (fd, {'length': (1 << 64) - 1}), (fd, {'length': (1 << 64) - 4096}),\n"
        "    (fd, {'length': 1 << 47}), (fd, {'length': (1 << 47) - 4095}), (fd, {'length': 1}), (fd, {'address': 1}),\n"
        "    (fd, {'address': 1 << 56, 'flags': FIXED}), (fd, {'offset': 1}),\n"
        "    (fd, {'address': here, 'flags': NOREPLACE}), (fd, {'address': here + 1, 'flags': FIXED}),\n"
        "    (fd, {'address': here + 1, 'flags': NOREPLACE}), (fd, {'flags': HUGETLB}), (fd, {'offset': -4096}),\n"
        # The kernel unmaps what was at a fixed address before it asks the file.
        "    (path, {}), (fd, {'address': here, 'flags': FIXED})]\n"
        "print([(map(fd, mmap.MAP_PRIVATE, **how), map(fd, mmap.MAP_SHARED, **how)) for fd, how in cases])"
    )
    rows = [(ENODEV, EEXIST), (ENODEV, EBADF)]
    found = said(code)
    assert [one for one in found if one[0] != one[1]] == rows
    assert {shared for _, shared in found} == {ENODEV, EINVAL, ENOMEM, EOVERFLOW, EEXIST, EBADF}


def test_its_file_system_is_the_proposals() -> None:
    code = (
        "fd = call(0); found = (ctypes.c_uint64 * 15)()\n"
        "status = libc.fstatfs(fd, found)\n"
        "bad = libc.fstatfs(fd, ctypes.c_void_p(8)), ctypes.get_errno()\n"
        "plain = (ctypes.c_uint64 * 15)(); libc.fstatfs(os.open('/proc', os.O_RDONLY), plain)\n"
        "print((status, found[0], found[1], found[8], bad, plain[0]))"
    )
    assert said(code) == (0, MAGIC, 4096, 255, (-1, 14), 0x9FA0)


@pytest.mark.requires("root")
def test_what_is_mounted_over_proc_later_is_not_looked_at() -> None:
    code = (
        "fd = call(0); subprocess.run(['mount', '-t', 'tmpfs', 'none', '/proc'], check=True)\n"
        "found = (ctypes.c_uint64 * 15)(); print((libc.fstatfs(fd, found), found[0]))"
    )
    command = ["unshare", "-m", *EXEC, "--", sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == (f"{(0, MAGIC)}\n", "")


@pytest.mark.parametrize(
    "protection", [0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_EXEC], ids=["none", "read", "text"]
)
def test_it_writes_nothing_that_the_program_may_not_write(protection: int) -> None:
    """The second of two pages is protected; the struct begins there, and before it."""
    code = (
        "fd = call(0); libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(8192), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))\n"
        "ctypes.memset(at, 0x5A, 8192)\n"
        "def protect(wanted): libc.mprotect(ctypes.c_void_p(at + 4096), ctypes.c_size_t(4096), wanted)\n"
        f"protect({protection})\n"
        "tried = [(libc.fstatfs(fd, ctypes.c_void_p(at + where)), ctypes.get_errno()) for where in (4096, 4096 - 56)]\n"
        "protect(3)\n"
        "print((tried, ctypes.string_at(at + 4096, 4096) == b'Z' * 4096, libc.fstatfs(fd, ctypes.c_void_p(at + 4096))))"
    )
    assert said(code) == ([(-1, EFAULT)] * 2, True, 0)


@pytest.mark.requires("root")
@pytest.mark.parametrize(
    ("dumpable", "expected"), [(1, (MAGIC, ENODEV, 0)), (0, (FUSE_MAGIC, 0, signal.SIGBUS))]
)
def test_where_nobody_may_look_into_the_program_the_file_system_answers(
    dumpable: int, expected: tuple[int, int, int]
) -> None:
    """An ordinary user's supervisor is refused what Yama would refuse it, too; who maps the file so, or by a race, finds no data in it."""
    code = (
        "from restrictedmem.abi import process\n"
        f"process.prctl(process.PR_SET_DUMPABLE, {dumpable})\n"
        "fd = call(0); os.posix_fallocate(fd, 0, 4096); found = (ctypes.c_uint64 * 15)(); libc.fstatfs(fd, found)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_PRIVATE, fd, ctypes.c_long(0))\n"
        "refused = ctypes.get_errno() if at == ctypes.c_void_p(-1).value else 0\n"
        "if (child := os.fork()) == 0: os._exit(0 if refused else ctypes.string_at(at, 1)[0])\n"
        "print((found[0], refused, os.waitpid(child, 0)[1] & 0x7F))"
    )
    assert as_user(lambda: said(code)) == expected


# Whose process it is.


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
        "print((os.getpid(), os.getpgid(0), os.getsid(0)))\ntry: os.wait()\nexcept ChildProcessError: print('none')"
    )
    out, _ = process.communicate(timeout=60)
    assert out == f"({process.pid}, {os.getpgid(0)}, {os.getsid(0)})\nnone\n"


def test_a_subreaper_stays_one_and_inherits_what_the_program_leaves_alone() -> None:
    """It waits for its children until there are none: one of its own, and the orphan that this one leaves."""
    code = (
        "from restrictedmem.abi.process import is_subreaper\n"
        "call(0)\n"
        "if os.fork() == 0: os._exit(os.fork() and 7)\n"
        "statuses = []\n"
        "try:\n"
        "    while True: statuses.append(os.wait()[1] >> 8)\n"
        "except ChildProcessError: print((is_subreaper(), sorted(statuses)))"
    )
    start = "import os, sys; from restrictedmem.abi import process; process.prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", start, *EXEC, "--", sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("(True, [0, 7])\n", "")


def test_a_nested_exec_uses_the_outer_supervisor() -> None:
    code = (
        "fd = call(0)\n"
        "inner = 'import ctypes, os; print(os.fstat(ctypes.CDLL(None).syscall(451, 0)).st_dev)'\n"
        "command = [sys.executable, '-m', 'restrictedmem', 'exec', '--', sys.executable, '-c', inner]\n"
        "print(os.fstat(fd).st_dev == int(subprocess.run(command, capture_output=True, check=True).stdout))"
    )
    assert said(code) is True


def test_another_listener_and_new_privileges_are_refused() -> None:
    code = (
        "from restrictedmem.abi import process, seccomp\n"
        "program = [seccomp.answer(seccomp.SECCOMP_RET_ALLOW)]\n"
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
        f"command = ['sh', '-c', 'exec env exec=1 nice \"$0\" -c \"$1\"', sys.executable, {inner!r}]\n"
        # Without pass_fds and the like, subprocess and posix_spawn use vfork.
        "pid = os.posix_spawnp('sh', command, os.environ); status = os.waitpid(pid, 0)[1]\n"
        "print((status, subprocess.run(command, capture_output=True, text=True, close_fds=False).stdout))"
    )
    process = under(code)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("3 0\n(0, '3 0\\n')\n", "")


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
        err
        == "restrictedmem exec: no descriptor can be made: /nonexistent: connect: No such file or directory\n"
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
    # What other processes of the user are there would count, too.
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
        done.stderr
        == "restrictedmem exec: no descriptor can be made: memfd_restricted: Too many open files in system\n"
    )


def test_what_a_full_table_of_the_caller_refuses_is_not_said() -> None:
    code = "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); print(call(0))"
    out, err = under(code).communicate(timeout=60)
    assert (out, err) == (f"{-EMFILE}\n", "")


def test_a_limit_on_file_sizes_is_no_limit_on_descriptors() -> None:
    code = (
        PRELUDE
        + "fd = call(0); os.ftruncate(fd, 4096); os.posix_fallocate(fd, 0, 4096); print(fd, call(2))"
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
    """Who waits for the end of a pipe waits for the program, whatever number the pipe has there, and whatever the limit is by now."""
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
    code = "found = [call(0) for _ in range(100)]; print((found.index(-errno.ENFILE), {fd for fd in found if fd < 0}, call(0)))"
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
    allow = seccomp.answer(seccomp.SECCOMP_RET_ALLOW)
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
    allow, jump = seccomp.answer(seccomp.SECCOMP_RET_ALLOW), seccomp.jump_unless(7, "there")
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
