"""Attacks with files: on the attacker's own FUSE server, and where others look for their own."""

import os
from collections.abc import Iterator
from errno import EINVAL
from functools import partial
from typing import Final

from field import Attack, Field
from outcomes import Errno, outcome
from processes import process, wait_gone
from restrictedmem.protocol import vm_wire as kvm_wire
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm


def fifo_of_a_file_system(field: Field) -> Iterator[None]:
    """A FIFO has the size of a pipe, and the attributes that its file system's server says."""
    mute = field.mute()
    service, party = field.start()
    vm = Vm(service)
    engine = process(vm.statistics()["pid"])
    assert engine is not None
    yield
    vm._channel.sock.settimeout(30)
    fifo, (reader, writer) = mute.fifo(), os.pipe()
    slot = partial(vm.set_user_memory_region, slot=0, guest_phys_addr=0, memory_size=PAGE)
    for file in (fifo, writer):
        assert outcome(partial(slot, shared_fd=file)) == Errno(EINVAL)
    # The files already looked at hold nobody, so the next one is looked at, too.
    for file in (fifo, writer):
        assert outcome(partial(vm._channel.call, kvm_wire.TRACE, fds=[file])) == Errno(EINVAL)
    party.goes_on()
    vm.close()
    # While the FIFO's server lives.
    wait_gone([engine])
    for end in (reader, writer):
        os.close(end)


ATTACKS: Final = {
    "a FIFO of a file system for a VM": Attack(
        "EINVAL for every call, and the engine ends all the same", fifo_of_a_file_system
    ),
}
