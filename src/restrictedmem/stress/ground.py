"""A descriptor and the owner's memory that goes with it, for the guest ``churn``."""

import mmap
import os
from contextlib import ExitStack
from typing import Final, final

from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.service.client import Service
from restrictedmem.stress.board import Board, place
from restrictedmem.stress.plan import Plan
from restrictedmem.vmm import elf
from restrictedmem.vmm.boot import SHARED_SIZE

CHURN: Final = elf.parse(guests.path("churn").read_bytes())


@final
class Ground:
    """A descriptor and the owner's memfds that go with it, for a VM and perhaps for later VMs.

    It owns their file descriptors.
    """

    def __init__(self, service: Service, plan: Plan) -> None:
        """Make the descriptor and the memfds; ``close`` closes them together.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM.
        """
        self.pages, self.vcpus = plan.pages, plan.vcpus
        self.private_size, self.offset = place(plan.pages, image_end=CHURN.end, vcpus=plan.vcpus)
        with ExitStack() as stack:
            self.fd = service.memfd_restricted()
            stack.callback(os.close, self.fd)
            os.ftruncate(self.fd, self.private_size)
            self.window_fd = sized_memfd(stack, "window", SHARED_SIZE)
            self.half_fd = sized_memfd(stack, "half", self.private_size)
            self.window = stack.enter_context(mmap.mmap(self.window_fd, SHARED_SIZE))
            self.board = Board(self.window)
            stack.callback(self.board.close)
            self._resources = stack.pop_all()

    def renew(self) -> None:
        """Announce that the content of all pages is gone, as another VM must find it."""
        self.board.begin_anew(self.pages)
        with self.board.lane(0).taking(range(self.pages)):
            memory.fallocate(self.half_fd, memory.PUNCH, 0, self.private_size)

    def close(self) -> None:
        """Close the descriptor, the memfds and the mapping."""
        self._resources.close()


def sized_memfd(stack: ExitStack, name: str, size: int) -> int:
    """Make a memfd of a size in bytes; ``stack`` closes it."""
    fd = stack.enter_context(memory.memfd_create(name)).fileno()
    os.ftruncate(fd, size)
    return fd
