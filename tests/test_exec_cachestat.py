"""cachestat under exec, whose number the call has."""

import subprocess
import sys
from errno import EINVAL, ENOSYS, EOPNOTSUPP

import pytest

from restrictedmem.abi import memory
from under_exec import PRELUDE, said

pytestmark = pytest.mark.requires("fuse", "seccomp")

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
                    # The kernel answers: it knows whether the file has a page cache, and whether it
                    # has the call (Linux 6.5).
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
