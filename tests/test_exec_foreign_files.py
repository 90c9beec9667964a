"""Another's file system under exec.

Its server keeps nobody waiting, and its files are not taken for restricted ones.
"""

from errno import EINVAL, ENODEV

import pytest

from foreign_fuse import foreign
from restrictedmem.abi.fuse import Opcode
from restrictedmem.fs.owner_abi import NAME
from restrictedmem.syscall import scout
from waiting_programs import FUSE_MAGIC, MAGIC, WELL, go_on, heard, mark, program, said, stop

__all__ = ["mark"]

pytestmark = [pytest.mark.requires("fuse", "seccomp", "root")]


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
print(os.readlink(f"/proc/self/fd/{file}") == os.readlink(f"/proc/self/fd/{fd}"), flush=True)
sys.stdin.readline()
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


# The descriptor's file.


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
copies = fd, os.dup(fd), fcntl.fcntl(fd, fcntl.F_DUPFD, 1000), received()
found = [(private(one), kind(one)) for one in copies]
command = [sys.executable, "-c", CHILD, str(fd)]
inherited = subprocess.run(command, capture_output=True, text=True, close_fds=False).stdout
print((found, elsewhere(), inherited))
"""
    child = (
        "import ctypes, sys; found = (ctypes.c_uint64 * 15)(); "
        "ctypes.CDLL(None).fstatfs(int(sys.argv[1]), found); print(found[0])"
    )
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
