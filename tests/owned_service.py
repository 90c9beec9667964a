"""A service of the test's, and checks that it works."""

import json
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from processes import end_after
from restrictedmem.abi import memory
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SIZE as PAGE

DEADLINE = 0.5


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.start(Options(deadline=DEADLINE)) as service:
        yield service


def in_fork(body: Callable[[], object]) -> Callable[[], object]:
    """Run a function in a child, which ends without the parent's clean-up.

    Returns a function that waits for the child's answer, as JSON.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            end_after(60)
            try:
                answer: object = body()
            except BaseException as error:
                answer = repr(error)
            theirs.send(json.dumps(answer).encode())
        finally:
            os._exit(0)
    theirs.close()

    def join() -> object:
        with ours:
            answer = ours.recv(1 << 16)
        os.waitpid(child, 0)
        return json.loads(answer) if answer else "the child died"

    return join


def works(fd: int) -> bool:
    """Use a descriptor for everything that needs the service."""
    os.posix_fallocate(fd, 0, PAGE)
    memory.fallocate(fd, memory.PUNCH, 0, PAGE)
    return os.fstat(fd).st_blocks == 0
