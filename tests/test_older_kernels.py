"""The main job where the kernel lacks what came after Linux 5.16 (``other_kernel``).

Not ``exec``: what a filter refuses, no listener hears, and memfd_restricted's number is
cachestat's.
"""

import hashlib
import json
import platform
import subprocess
import sys
from contextlib import closing
from errno import ENOSPC, EPERM

import pytest

from other_kernel import OLD
from restrictedmem.abi import memory
from restrictedmem.mm.backing import make_backing
from restrictedmem.units import PAGE_SIZE

pytestmark = [
    pytest.mark.requires("seccomp"),
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the filter knows the numbers of x86-64"
    ),
]

COMMAND = [*OLD, sys.executable, "-m", "restrictedmem"]
DATA = bytes(range(256)) * 1000


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*COMMAND, *arguments], input=DATA, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == status, done.stderr.decode()
    return done


def test_the_filter_makes_the_kernel_older() -> None:
    code = (
        "import errno, os\n"
        "from restrictedmem.abi import memory, pagemap, seccomp\n"
        "def outcome(call):\n"
        "    try:\n"
        "        return call()\n"
        "    except OSError as error:\n"
        "        return errno.errorcode[error.errno]\n"
        "page = memory.Mapping(os.memfd_create('page'), 0, 4096)\n"
        "print([outcome(lambda: os.memfd_create('made', memory.MFD_NOEXEC_SEAL)),\n"
        "    outcome(lambda: memory.resident_pages(0, 0, 0)),\n"
        "    outcome(lambda: page.madvise(memory.MADV_COLLAPSE, 0, 4096)),\n"
        "    outcome(lambda: pagemap.bytes_in(pagemap.Category.PRESENT, page.address, 4096)),\n"
        "    seccomp.flags_known(seccomp.FilterFlag.NEW_LISTENER | "
        "seccomp.FilterFlag.WAIT_KILLABLE_RECV)])\n"
    )
    done = subprocess.run(
        [*OLD, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['EINVAL', 'ENOSYS', 'EINVAL', 'ENOTTY', False]\n"


def test_every_memfd_can_be_sealed() -> None:
    code = (
        "from restrictedmem.abi import memory\n"
        "from restrictedmem.kvm.half import SharedFiles, forbid_shrinking\n"
        "with memory.memfd_create('made') as made:\n"
        "    SharedFiles(forbid_shrinking).of_fd(made.fileno(), 0)\n"
    )
    subprocess.run([*OLD, sys.executable, "-c", code], check=True)


def test_a_limit_holds_where_a_filter_forbids_cachestat(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(fd: int, offset: int, length: int) -> int:
        raise OSError(EPERM, "cachestat")

    monkeypatch.setattr(memory, "resident_pages", forbidden)
    with closing(make_backing("memfd", limit=3 * PAGE_SIZE)) as backing:
        backing.allocate(0, 2 * PAGE_SIZE)
        assert backing.resident() == 2 * PAGE_SIZE
        with pytest.raises(OSError, match="limit") as refused:
            backing.allocate(0, 4 * PAGE_SIZE)
        assert refused.value.errno == ENOSPC


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    "options",
    [[], ["--api", "v9"], ["--memory-max", "8M"], ["--backing", "thp"], ["--design", "lazy"]],
    ids=str,
)
def test_a_guest_digests_its_input(options: list[str]) -> None:
    done = run("run", "--quiet", "--engine", "software", "--memory", "8M", *options, "sha256")
    assert done.stdout == hashlib.sha256(DATA).hexdigest().encode() + b"  -\n"


#: Options that write the closing table as JSON to stderr, alone.
JSON = ("--quiet", "--json", "/dev/stderr")


@pytest.mark.requires("fuse")
def test_pages_are_converted() -> None:
    found = json.loads(
        run("run", "--engine", "software", "--memory", "4M", *JSON, "convert").stderr
    )
    assert found["status"] == 0
    assert found["invalidations"] > 0


@pytest.mark.requires("fuse")
def test_the_descriptor() -> None:
    code = (
        "import os\n"
        "from restrictedmem import memfd_restricted\n"
        "fd = memfd_restricted()\n"
        "os.ftruncate(fd, 1 << 20)\n"
        "os.posix_fallocate(fd, 0, 65536)\n"
        "print(os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512)\n"
    )
    done = subprocess.run(
        [*OLD, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1048576 65536\n"
