"""A consumer that the kernel holds, because it has a file whose server does not answer.

It keeps no other process from going on.
"""

import json
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from errno import EINVAL
from functools import partial
from pathlib import Path

import pytest

from mute_server import MuteServer
from outcomes import Errno, outcome
from processes import family, wait_gone
from restrictedmem.abi import memory
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from waiting import wait_until

PUPPET = Path(__file__).parent / "consumers" / "puppet.py"


@pytest.mark.requires("fuse", "root")
def test_a_consumer_that_cannot_end_keeps_neither_its_file_nor_its_service() -> None:
    # Made first, it holds nothing of the service.
    with closing(MuteServer()) as mute:
        service = Service.start(Options(consumers=(("puppet", str(PUPPET)),), deadline=0.5))
        fd = service.memfd_restricted()
        os.ftruncate(fd, PAGE)
        take = partial(_take_file, service, fd)
        with closing(Channel(service.spawn("puppet", "trusting"), "the puppet")) as puppet:
            _say(puppet, "bind", service.token_for(fd).hex(), 0, 1)
            pid = _say(puppet, "pid", fds=[mute.open()])
            everybody = family(service)
            os.kill(pid, 9)
            wait_until(lambda: _is_held(pid), "the server to hold the consumer")
            # The service hears of that when it is to give pages back.
            memory.fallocate(fd, memory.PUNCH, 0, PAGE)
            assert outcome(take) == Errno(EINVAL)
            wait_until(lambda: outcome(take) is None, "the file to be free", 30)
            assert "does not end" in service.status()["last_error"]
        os.close(fd)
        service.close()
        wait_gone([one for one in everybody if one.pid != pid], 30)
        assert _is_held(pid)
    wait_gone(everybody)


def _take_file(service: Service, fd: int) -> None:
    with Vm(service) as vm:
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=0x1000_0000, memory_size=PAGE, restricted_fd=fd
        )


def _say(puppet: Channel, name: str, *arguments: object, fds: Sequence[int] = ()) -> int:
    reply, _ = puppet.call(wire.Call(name, 1), json.dumps([name, *arguments]).encode(), fds)
    found: int = json.loads(reply)
    return found


def _is_held(pid: int) -> bool:
    """Say whether a thread is in state D; the first one has ended then."""
    states: list[str] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(thread.read_text(encoding="utf-8").rpartition(")")[2].split()[0])
    return "D" in states
