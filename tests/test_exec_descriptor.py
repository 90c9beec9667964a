"""Answers that exec gives for the descriptor's file system, because FUSE cannot."""

import mmap
import signal
import subprocess
import sys
from errno import EBADF, EEXIST, EFAULT, EINVAL, ENODEV, ENOMEM, EOVERFLOW, EPERM

import pytest

from under_exec import EXEC, PRELUDE, said
from users import as_user

pytestmark = pytest.mark.requires("fuse", "seccomp")

MAGIC = 0x5245534D
FUSE_MAGIC = 0x65735546


def test_it_cannot_be_mapped_privately_either() -> None:
    code = (
        "fd = call(0); os.posix_fallocate(fd, 0, 4096)\n"
        "def map(fd, flags):\n"
        "    libc.mmap.restype = ctypes.c_void_p\n"
        "    found = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, flags, fd, "
        "ctypes.c_long(0))\n"
        "    return ctypes.get_errno() if found == ctypes.c_void_p(-1).value else 0\n"
        "plain = os.open(sys.executable, os.O_RDONLY)\n"
        "print([map(fd, mmap.MAP_PRIVATE), map(fd, mmap.MAP_SHARED), map(plain, mmap.MAP_PRIVATE), "
        "map(99, mmap.MAP_PRIVATE)])"
    )
    assert said(code) == [ENODEV, ENODEV, 0, EBADF]


def test_a_private_mapping_is_refused_as_a_shared_one_is() -> None:
    """In these cases, the kernel alone can decide.

    Answers that depend on more than the call's numbers are rows of docs/reference/divergences.md.
    """
    code = (
        "fd = call(0); os.posix_fallocate(fd, 0, 4096); "
        "path = os.open(f'/proc/self/fd/{fd}', os.O_PATH)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "def map(fd, kind, address=0, length=4096, flags=0, offset=0, prot=mmap.PROT_READ):\n"
        "    word = ctypes.c_ulong\n"
        "    found = libc.mmap(word(address), word(length), prot, kind | flags, fd, "
        "ctypes.c_long(offset))\n"
        "    return ctypes.get_errno() if found == ctypes.c_void_p(-1).value else 0\n"
        "held = mmap.mmap(-1, 4096); here = ctypes.addressof(ctypes.c_char.from_buffer(held))\n"
        "FIXED, HUGETLB, NOREPLACE = 0x10, 0x40000, 0x100000\n"
        "cases = [(fd, {}), (fd, {'length': 0}), (fd, {'length': (1 << 64) - 1}), "
        "(fd, {'length': (1 << 64) - 4096}),\n"
        "    (fd, {'length': 1 << 47}), (fd, {'length': (1 << 47) - 4095}), (fd, {'length': 1}), "
        "(fd, {'address': 1}),\n"
        "    (fd, {'address': 1 << 56, 'flags': FIXED}), (fd, {'offset': 1}),\n"
        "    (fd, {'address': here, 'flags': NOREPLACE}), "
        "(fd, {'address': here + 1, 'flags': FIXED}),\n"
        "    (fd, {'address': here + 1, 'flags': NOREPLACE}), (fd, {'flags': HUGETLB}), "
        "(fd, {'offset': -4096}),\n"
        "    (fd, {'prot': mmap.PROT_READ | mmap.PROT_EXEC}), (fd, {'prot': mmap.PROT_EXEC}),\n"
        # The kernel unmaps what was at a fixed address before it asks the file.
        "    (path, {}), (fd, {'address': here, 'flags': FIXED})]\n"
        "print([(map(fd, mmap.MAP_PRIVATE, **how), map(fd, mmap.MAP_SHARED, **how)) for fd, "
        "how in cases])"
    )
    rows = [(ENODEV, EEXIST), (ENODEV, EBADF)]
    found = said(code)
    assert [one for one in found if one[0] != one[1]] == rows
    assert {shared for _, shared in found} == {
        ENODEV,
        EINVAL,
        ENOMEM,
        EOVERFLOW,
        EEXIST,
        EBADF,
        EPERM,
    }


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
        "at = libc.mmap(None, ctypes.c_size_t(8192), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, "
        "ctypes.c_long(0))\n"
        "ctypes.memset(at, 0x5A, 8192)\n"
        "def protect(wanted): libc.mprotect(ctypes.c_void_p(at + 4096), ctypes.c_size_t(4096), "
        "wanted)\n"
        f"protect({protection})\n"
        "tried = [(libc.fstatfs(fd, ctypes.c_void_p(at + where)), ctypes.get_errno()) for where in "
        "(4096, 4096 - 56)]\n"
        "protect(3)\n"
        "print((tried, ctypes.string_at(at + 4096, 4096) == b'Z' * 4096, "
        "libc.fstatfs(fd, ctypes.c_void_p(at + 4096))))"
    )
    assert said(code) == ([(-1, EFAULT)] * 2, True, 0)


@pytest.mark.requires("root")
@pytest.mark.parametrize(
    ("dumpable", "expected"), [(1, (MAGIC, ENODEV, 0)), (0, (FUSE_MAGIC, 0, signal.SIGBUS))]
)
def test_where_nobody_may_look_into_the_program_the_file_system_answers(
    dumpable: int, expected: tuple[int, int, int]
) -> None:
    """Here the supervisor cannot look into the program.

    Yama may refuse an ordinary user's supervisor, too. A program that maps the file in this state,
    or by a race, finds no data in it.
    """
    code = (
        "from restrictedmem.abi import process\n"
        f"process.prctl(process.PR_SET_DUMPABLE, {dumpable})\n"
        "fd = call(0); os.posix_fallocate(fd, 0, 4096); found = (ctypes.c_uint64 * 15)(); "
        "libc.fstatfs(fd, found)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_PRIVATE, fd, "
        "ctypes.c_long(0))\n"
        "refused = ctypes.get_errno() if at == ctypes.c_void_p(-1).value else 0\n"
        "if (child := os.fork()) == 0: os._exit(0 if refused else ctypes.string_at(at, 1)[0])\n"
        "print((found[0], refused, os.waitpid(child, 0)[1] & 0x7F))"
    )
    assert as_user(lambda: said(code)) == expected
