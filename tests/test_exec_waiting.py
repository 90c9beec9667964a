"""One program under exec that waits keeps no other program's system call waiting.

It waits for its own memory, for a processor or for a service.
"""

import os
import secrets
import signal
import socket
from contextlib import suppress
from errno import ENOSYS
from pathlib import Path
from typing import Any, cast

import pytest

from foreign_fuse import foreign
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.process import proc
from restrictedmem.fd import OwnedFd
from restrictedmem.syscall import scout
from restrictedmem.syscall.supervisor import Supervisor
from under_exec import supervisor_of
from waiting import wait_until
from waiting_programs import FUSE_MAGIC, WELL, go_on, heard, mark, program, said, stop

__all__ = ["mark"]

pytestmark = [pytest.mark.requires("fuse", "seccomp", "root")]


def writes(pid: int) -> bool:
    """Say whether a process is in pwrite64."""
    return Path(f"/proc/{pid}/syscall").read_text().startswith("18 ")


def children(pid: int) -> dict[str, list[int]]:
    """Return the children of a process by their names."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            name, rest = (entry / "stat").read_text().split(" (", 1)[1].rsplit(") ", 1)
            if int(rest.split()[1]) == pid and not rest.startswith("Z"):
                found.setdefault(name, []).append(int(entry.name))
    return found


# A program's own memory.


def test_where_fstatfs_waits_for_userfaultfd_others_go_on(mark: str) -> None:
    code = """
other = Other()
at, watch = watched()
found = []
thread = threading.Thread(target=lambda: found.append(kind(fd, at)))
thread.start()
enters(thread.native_id, 138)
well = [other.goes_on() for _ in range(20)]
before = list(found)
watch.close()
thread.join(10)
print((well, before, found))
"""
    assert said(code, mark) == ([WELL] * 20, [], [FUSE_MAGIC])


def test_where_a_program_keeps_its_descriptors_from_being_looked_at_others_go_on(mark: str) -> None:
    """One thread lists descriptors into memory that is never filled.

    Another would create a file there. A process that looks one up waits for both.
    """
    code = """
other, begin, tids = Other(), threading.Event(), []
def look():
    tids.append(threading.get_native_id())
    begin.wait()
    private(plain)
looked = threading.Thread(target=look)
looked.start()
until("the thread to begin", lambda: tids)
at, watch = watched()
path = f"/proc/{tids[0]}/fd"
listing = os.open(path, os.O_RDONLY)
def create():
    try: os.open(path + "/new", os.O_CREAT | os.O_WRONLY)
    except OSError: pass
def getdents64():
    libc.syscall(217, listing, ctypes.c_void_p(at), ctypes.c_long(4096))
lists = threading.Thread(target=getdents64)
creates = threading.Thread(target=create)
lists.start(); enters(lists.native_id, 217)
creates.start(); enters(creates.native_id, 257)
begin.set(); enters(looked.native_id, 9)
well = [other.goes_on() for _ in range(20)]
before = looked.is_alive()
watch.close()
for thread in (lists, creates, looked): thread.join(10)
print((well, before, looked.is_alive()))
"""
    assert said(code, mark) == ([WELL] * 20, True, False)


#: A program that has its descriptor's file system written to a page of a file whose server does not
#: read it.
INTO = """
other, begin = Other(), threading.Event()
file = os.open("f", os.O_RDWR, dir_fd=root)
at = libc.mmap(None, ctypes.c_size_t(4096), 3, 1, file, ctypes.c_long(0))
os.close(file)
def wait():
    begin.wait()
    kind(fd, at)
"""


def test_more_calls_than_scouts_wait_and_others_go_on(mark: str) -> None:
    code = """
threads = [threading.Thread(target=wait, daemon=True) for _ in range(100)]
for thread in threads: thread.start()
let_stop()
begin.set()
for thread in threads: enters(thread.native_id, 138)
print([other.goes_on() for _ in range(20)], flush=True); sys.stdin.readline()
"""
    with foreign() as server, program(INTO + code, mark, server) as process:
        stop(server, process)
        assert heard(process) == [WELL] * 20
        supervisor = supervisor_of(mark)
        assert supervisor is not None
        # Scouts that it let go of may wait on for the page; the supervisor holds nothing of them.
        assert len(os.listdir(f"/proc/{supervisor}/fd")) <= 64 + 10


def test_a_caller_that_is_killed_leaves_no_scout(mark: str) -> None:
    code = """
let_stop(); begin.set()
waiting = [forked(wait) for _ in range(8)]
for pid in waiting: enters(pid, 138)
print(other.goes_on(), flush=True); sys.stdin.readline()
for pid in waiting: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
print(other.goes_on(), flush=True); sys.stdin.readline()
"""
    with foreign() as server, program(INTO + code, mark, server) as process:
        stop(server, process)
        assert heard(process) == WELL
        supervisor = supervisor_of(mark)
        assert supervisor is not None
        assert len(children(supervisor)["rmem-scout"]) >= 8
        go_on(process)
        assert heard(process) == WELL
        wait_until(lambda: len(children(supervisor)["rmem-scout"]) <= 4, "scouts to end")


def test_a_scout_that_dies_before_its_first_question_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(asked: scout.Scout, _question: object) -> None:
        os.kill(asked.pid, signal.SIGKILL)
        raise BrokenPipeError

    monkeypatch.setattr(scout.Scout, "ask", ask)
    with OwnedFd(os.memfd_create("listener")) as listener, proc() as place:
        supervisor = Supervisor(listener, cast("Any", None), place, (), 451, cachestat=False)
        with pytest.raises(BrokenPipeError):
            supervisor._sent_out(("open_memory", (0, 0, 0)))  # pyright: ignore[reportPrivateUsage]
        assert supervisor._poll.poll(0) == []  # pyright: ignore[reportPrivateUsage]
        (pid,) = supervisor._killed  # pyright: ignore[reportPrivateUsage]
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_scout_that_nobody_can_kill_keeps_nobody_and_nothing(mark: str) -> None:
    """Others go on meanwhile; and when the supervisor is killed, the call is not there, as ever."""
    code = """
begin.set()
waiting = forked(wait)
enters(waiting, 138)
print(other.goes_on(), flush=True); sys.stdin.readline()
print(call(0), flush=True); sys.stdin.readline()
"""

    def hang(opcode: int) -> None:
        if opcode == Opcode.READ:
            signal.pause()

    with foreign(hang) as server, program(INTO + code, mark, server) as process:
        assert heard(process) == WELL
        supervisor = supervisor_of(mark)
        assert supervisor is not None
        (stuck,) = (pid for pid in children(supervisor)["rmem-scout"] if writes(pid))
        held = {
            os.readlink(f"/proc/{stuck}/fd/{fd}").split(":")[0]
            for fd in os.listdir(f"/proc/{stuck}/fd")
        }
        assert {one for one in held if not one.endswith("/mem")} == {"/dev/null", "/proc", "socket"}
        os.kill(supervisor, signal.SIGKILL)
        go_on(process)
        assert heard(process) == -ENOSYS
        wait_until(lambda: writes(stuck), "the scout to be held again, which the signal woke")


# A processor.


@pytest.mark.alone("beside other tests the callers that hardly run might not run at all")
def test_callers_that_do_not_run_keep_nobody_waiting(mark: str) -> None:
    """A caller gets its descriptor when it runs, and one of the lowest priority hardly runs."""
    code = """
made = (ctypes.c_uint64 * 20).from_buffer(mmap.mmap(-1, 4096))
def loop():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    while True: pass
def starve(number):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    while True:
        os.close(call(0))
        made[number] += 1
pids = [forked(loop) for _ in range(2)] + [forked(lambda: starve(number)) for number in range(20)]
until("all of them to call", lambda: all(made))
def overtaken():
    before = sum(made)
    os.close(call(0))
    return 20 - (sum(made) - before)
most = max(overtaken() for _ in range(20))
for pid in pids: os.kill(pid, signal.SIGKILL)
print(most)
"""
    # In turns, nearly all of them would have theirs before the other has its own.
    assert said(code, mark) > 14


# The service.


def test_a_stopped_service_keeps_no_other_call(mark: str) -> None:
    code = """
sys.path.insert(0, TESTS)
from processes import stop
from restrictedmem.service.client import Service
service = Service.connect(os.environ["RESTRICTEDMEM_SERVER"])
try:
    stop(service.info["pid"])
    waiting = threading.Thread(target=call, args=(0,))
    waiting.start()
    enters(waiting.native_id, 451)
    def body():
        found = private(plain), private(fd), kind(fd)
        os._exit(7 if found == (0, 19, 0x5245534D) else 1)
    other = forked(body)
    def ended():
        global status
        pid, status = os.waitpid(other, os.WNOHANG)
        return pid
    until("the other to end", ended)
    before = waiting.is_alive()
finally:
    os.kill(service.info["pid"], signal.SIGCONT)
waiting.join(10)
print((os.waitstatus_to_exitcode(status), before, waiting.is_alive()))
"""
    assert said(code.replace("TESTS", repr(str(Path(__file__).parent))), mark) == (7, True, False)


def test_a_server_that_does_not_answer_keeps_no_other_call(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"restrictedmem-test-{secrets.token_hex(8)}"
    monkeypatch.setenv("RESTRICTEDMEM_SERVER", "@" + name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind("\0" + name)
        silent.listen()
        code = """
waiting = threading.Thread(target=call, args=(0,), daemon=True)
waiting.start()
enters(waiting.native_id, 451)
began = time.monotonic()
print([private(plain), waiting.is_alive(), time.monotonic() - began < 5], flush=True)
"""
        assert said(code, mark, first="") == [0, True, True]


def test_a_flood_at_the_door_keeps_no_call(mark: str) -> None:
    """Three thousand connect and say nothing; one in ten of them stays."""
    code = """
other = Other()
door = "\\0" + os.environ["RESTRICTEDMEM_SERVER"][1:]
def flood():
    stay = []
    for number in range(3000):
        knock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        knock.connect(door)
        if number % 10: knock.close()
        else: stay.append(knock)
    sys.stdin.readline()
flooding = forked(flood)
well = 0
while not os.waitpid(flooding, os.WNOHANG)[0]:
    assert other.goes_on() == (0, 0x5245534D, True)
    well += 1
    if well == 20: os.kill(flooding, signal.SIGTERM)
print(well >= 20)
"""
    assert said(code, mark) is True
