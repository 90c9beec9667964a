"""A pattern in memory for the tools of ``run --prove`` to find."""

import os
from types import SimpleNamespace
from typing import cast

import pytest

from restrictedmem.abi import memory
from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.pattern import Pattern, content
from restrictedmem.fd import OwnedFd

SEED = 0x0123_4567_89AB_CDEF
START = 0x4002_6000
MIB = 1 << 20


@pytest.fixture(scope="module")
def pattern() -> Pattern:
    return Pattern(SEED, START, START + 16 * MIB)


def owner_of(pattern: Pattern, **parts: object) -> Attacker:
    """An owner that has no more than a route under test asks for."""
    return cast(Attacker, SimpleNamespace(pattern=pattern, as_root=False, **parts))


def holding(size: int) -> OwnedFd:
    """Make a memfd with the pattern."""
    fd = memory.memfd_create("pattern")
    os.write(fd.fileno(), content(SEED, START, size))
    return fd
