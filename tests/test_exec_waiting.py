"""One program under exec that waits, for a file system or for its own memory, keeps no other program's system call waiting."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENODEV, ENOSYS
from pathlib import Path
from typing import Any, cast

import pytest

from foreign_fuse import Foreign, foreign
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.process import proc
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.fs.filesystem import NAME
from restrictedmem.syscall import scout
from restrictedmem.syscall.supervisor import Supervisor
from under_exec import EXEC, PRELUDE, supervisor_of
from waiting import wait_until

pytestmark = [pytest.mark.requires("fuse", "seccomp", "root")]

MAGIC = 0x5245534D
FUSE_MAGIC = 0x65735546
#: What another program says whose calls all go on.
WELL = (0, MAGIC, True)

CALLS = f"""
import signal, socket, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
libc.mmap.restype = ctypes.c_void_p
NOWHERE = ctypes.c_void_p(-1).value

def private(fd):
    "Map a file privately; returns an errno."
    return ctypes.get_errno() if libc.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0)) == NOWHERE else 0

def kind(fd, at=None):
    "Return the file system's magic number that fstatfs says, or writes to an address."
    found = (ctypes.c_uint64 * 15)() if at is None else (ctypes.c_uint64 * 15).from_address(at)
    return -ctypes.get_errno() if libc.fstatfs(fd, ctypes.byref(found)) else found[0]

plain = os.open(sys.executable, os.O_RDONLY)

class Other:
    "Another program: makes, when it is asked to, each of the calls that stop, and says what they came to."
    def __init__(self):
        self.sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.sock.close()
            while theirs.recv(1):
                theirs.send(repr((private(plain), kind(fd), call(0) > 0)).encode())
            os._exit(0)
        theirs.close()
        self.sock.settimeout(10)

    def goes_on(self):
        self.sock.send(b".")
        return eval(self.sock.recv(99))

def forked(body):
    "Run body in a program of its own."
    pid = os.fork()
    if pid == 0:
        try: body()
        finally: os._exit(0)
    return pid

def let_stop():
    "Have the foreign server stopped."
    print("None", flush=True); sys.stdin.readline()

def until(what, holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, what
        os.sched_yield()

def enters(pid, number):
    "Wait until a program is in a system call, and the supervisor's or the kernel's to answer."
    until("a call to begin", lambda: open(f"/proc/{{pid}}/syscall").read().split()[0] == str(number))

def watched():
    "Map a page whose first touch waits until the descriptor that is returned is closed."
    from restrictedmem.abi import userfaultfd as uffd
    at = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
    watch = uffd.userfaultfd(0)
    uffd.UFFDIO_API(watch, uffd.uffdio_api(api=uffd.UFFD_API, features=0))
    uffd.UFFDIO_REGISTER(watch, uffd.uffdio_register(start=at, len=4096, mode=uffd.UFFDIO_REGISTER_MODE_MISSING))
    return at, watch
"""


def writes(pid: int) -> bool:
    """Say whether a process is in pwrite64."""
    return Path(f"/proc/{pid}/syscall").read_text().startswith("18 ")


#: What programs begin with.
FIRST = "fd = call(0)\n"


def children(pid: int) -> dict[str, list[int]]:
    """Return the children of a process by their names."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            name, rest = (entry / "stat").read_text().split(" (", 1)[1].rsplit(") ", 1)
            if int(rest.split()[1]) == pid and not rest.startswith("Z"):
                found.setdefault(name, []).append(int(entry.name))
    return found


@contextmanager
def program(
    code: str, mark: str, server: Foreign | None = None, first: str = FIRST
) -> Generator[subprocess.Popen[str]]:
    """Run Python code under exec in a session of its own; ``root`` is that of ``server``'s mount.

    All of it is killed at the end, the server first, without which a call that waits for it would
    never end.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [
            *EXEC,
            "--",
            sys.executable,
            "-c",
            f"{PRELUDE}{CALLS}{first}root = {server and server.root}\n{code}",
        ],
        stdin=pipe,
        stdout=pipe,
        text=True,
        env={**os.environ, "MARK": mark},
        pass_fds=[] if server is None else [server.root],
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if server is not None:
            server.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        for end in (process.stdin, process.stdout):
            assert end is not None
            end.close()
        wait_until(lambda: supervisor_of(mark) is None, "the supervisor to end")


def said(code: str, mark: str, server: Foreign | None = None, first: str = FIRST) -> Any:
    """Return the value that Python code prints first."""
    with program(code, mark, server, first) as process:
        return heard(process)


def heard(process: subprocess.Popen[str]) -> Any:
    """Return the value of the next line that a program prints; what it does not say within its patience, it never says."""
    assert process.stdout is not None
    ready = readable([process.stdout], 30)
    assert ready, "the program says nothing for 30 s"
    return eval(process.stdout.readline())


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a program go on that reads a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def stop(server: Foreign, process: subprocess.Popen[str]) -> None:
    """Stop the server of a file that a program has opened."""
    assert heard(process) is None
    server.stop()
    go_on(process)


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return f"{tmp_path}-{os.getpid()}"


# Another's file system.


def test_a_server_under_exec_may_map_files_while_its_file_is_mapped(mark: str) -> None:
    """The supervisor asks it nothing, so that neither waits for the other."""
    code = """
from foreign_fuse import Foreign, foreign
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.process import proc
with foreign(lambda opcode: opcode == 3 and private(plain)) as server:
    file = os.open("f", os.O_RDONLY, dir_fd=server.root)
    print([private(file), kind(file), private(fd)])
"""
    assert said(code, mark) == [0, FUSE_MAGIC, ENODEV]


def test_a_stopped_servers_file_is_mapped_at_once(mark: str) -> None:
    # fstatfs asks the server, so who calls it waits.
    code = """
other, file = Other(), os.open("f", os.O_RDWR, dir_fd=root)
let_stop()
waiting = forked(lambda: kind(file))
enters(waiting, 138)
print([private(file), other.goes_on()], flush=True); sys.stdin.readline()
"""
    with foreign() as server, program(code, mark, server) as process:
        stop(server, process)
        assert heard(process) == [0, WELL]


def test_a_foreign_file_of_that_name_is_not_taken_for_a_restricted_one(mark: str) -> None:
    code = """
file = os.open("restrictedmem", os.O_RDWR, dir_fd=root)
os.unlink("restrictedmem", dir_fd=root)
print(os.readlink(f"/proc/self/fd/{file}") == os.readlink(f"/proc/self/fd/{fd}"), flush=True); sys.stdin.readline()
print([private(file), kind(file)], flush=True); sys.stdin.readline()
"""
    with foreign() as server, program(code, mark, server) as process:
        assert heard(process) is True
        server.asked()
        go_on(process)
        assert heard(process) == [0, FUSE_MAGIC]
        assert Opcode.GETATTR not in server.asked()


def test_the_scouts_name_is_the_file_systems() -> None:
    assert "/" + NAME.decode() == scout._NAME  # pyright: ignore[reportPrivateUsage]


# Whose descriptor it is.


def test_a_restricted_descriptor_is_known_wherever_it_comes_from(mark: str) -> None:
    code = """
from restrictedmem.abi.process import CLONE_NEWNS, unshare
def received():
    a, b = socket.socketpair()
    socket.send_fds(a, [b"."], [fd])
    return socket.recv_fds(b, 1, 1)[1][0]
def elsewhere():
    reader, writer = os.pipe()
    def body():
        unshare(CLONE_NEWNS)
        os.write(writer, repr((private(fd), kind(fd))).encode())
    os.waitpid(forked(body), 0)
    return eval(os.read(reader, 99))
found = [(private(one), kind(one)) for one in (fd, os.dup(fd), fcntl.fcntl(fd, fcntl.F_DUPFD, 1000), received())]
print((found, elsewhere(), subprocess.run([sys.executable, "-c", CHILD, str(fd)], capture_output=True, text=True, close_fds=False).stdout))
"""
    child = "import ctypes, sys; found = (ctypes.c_uint64 * 15)(); ctypes.CDLL(None).fstatfs(int(sys.argv[1]), found); print(found[0])"
    found, elsewhere, inherited = said(code.replace("CHILD", repr(child)), mark)
    assert (found, elsewhere, inherited) == ([(ENODEV, MAGIC)] * 4, (ENODEV, MAGIC), f"{MAGIC}\n")


def test_a_restricted_descriptor_made_by_way_of_a_clone_of_the_mount_is_known(mark: str) -> None:
    """The mount is another, the file system is the service's."""
    code = """
from restrictedmem.service.client import Service
service = Service.connect(os.environ["RESTRICTEDMEM_SERVER"])
# open_tree, with OPEN_TREE_CLONE and AT_EMPTY_PATH
clone = libc.syscall(428, service._mount.fileno(), b"", 0x1001)
if clone < 0: print(-ctypes.get_errno())
else:
    made = os.open("restrictedmem", os.O_RDWR | os.O_CREAT | os.O_EXCL, dir_fd=clone)
    print((private(made), kind(made)))
"""
    found = said(code, mark)
    if found == -EINVAL:
        pytest.skip("Linux before 6.15 clones no mount that is attached nowhere")
    assert found == (ENODEV, MAGIC)


def test_another_services_descriptor_is_answered_by_its_file_system(mark: str) -> None:
    code = """
from restrictedmem.service.client import Service
print([kind(Service.start().memfd_restricted()), kind(fd)])
"""
    assert said(code, mark) == [FUSE_MAGIC, MAGIC]


def test_the_first_descriptor_made_by_way_of_the_door_is_known(mark: str) -> None:
    """No call of the number comes before it."""
    code = """
from restrictedmem.service.client import Service
print(kind(Service.connect(os.environ["RESTRICTEDMEM_SERVER"]).memfd_restricted()))
"""
    assert said(code, mark, first="") == MAGIC


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
    """One thread lists them into memory that does not come, another would create one there: who looks one up waits for both."""
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
# getdents64
lists = threading.Thread(target=lambda: libc.syscall(217, listing, ctypes.c_void_p(at), ctypes.c_long(4096)))
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
    """A descriptor is put into a caller when that runs, and one of the lowest priority hardly does."""
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
    other = forked(lambda: os._exit(7 if (private(plain), private(fd), kind(fd)) == (0, 19, 0x5245534D) else 1))
    until("the other to end", lambda: (found := os.waitpid(other, os.WNOHANG))[0] and [globals().update(status=found[1])])
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
