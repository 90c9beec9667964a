"""A guest_memfd that its owner has mapped, and a guest on it: what cases of conversion in place do.

Each method makes one step, notes it, and returns its answer.
"""

import mmap
import signal
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final, final

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2,
    kvm_memory_attributes2,
)
from restrictedmem.abi.memory import FallocMode
from restrictedmem.conformance.steps import Steps
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vm import Vcpu, Vm

SHARED: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
PRIVATE: Final = GUEST_MEMFD_FLAG_MMAP
#: Guest addresses of the program and of the guest_memfd.
_PROGRAM: Final = 1 << 30
DATA: Final = 4 << 30
#: In the second number that the guest gets: store its low byte.
_STORE: Final = 0x100
#: The guest gets an offset and a number, and answers with the byte that was there.
_CODE: Final = bytes.fromhex(
    "66ba1000"  # loop: mov dx, 0x10
    "ed89c1"  #         in eax, dx; mov ecx, eax
    "ed89c3"  #         in eax, dx; mov ebx, eax
    "0fb6040f"  #       movzx eax, byte [rdi + rcx]
    "f7c300010000"  #   test ebx, 0x100
    "7403"  #           jz answer
    "881c0f"  #         mov [rdi + rcx], bl
    "66ba1100ee"  #     answer: mov dx, 0x11; out dx, al
    "ebe0"  #           jmp loop
)


def set_memory_attributes(
    fd: int, offset: int, size: int, *, private: bool, flags: int = 0
) -> kvm_memory_attributes2:
    """Convert bytes of a guest_memfd, and return the argument as the call left it."""
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    argument = kvm_memory_attributes2(offset=offset, size=size, attributes=attributes, flags=flags)
    KVM_SET_MEMORY_ATTRIBUTES2(fd, argument)
    return argument


@final
class InPlace:
    """One guest_memfd, the owner's mapping of it, and a VM with one vCPU. Pages are numbers."""

    def __init__(
        self, steps: Steps, fd: int, mapping: mmap.mmap, vm: Vm, vcpu: Vcpu, npages: int
    ) -> None:
        self.steps = steps
        self.fd = fd
        self.mapping = mapping
        self.vm = vm
        self.vcpu = vcpu
        self.npages = npages

    def convert(self, page: int, npages: int = 1, *, private: bool, flags: int = 0) -> None:
        """Make pages private or shared."""
        word = "KVM_MEMORY_ATTRIBUTE_PRIVATE" if private else "0"
        self.steps.call(
            f"ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, {{offset={page}*P, size={npages}*P, "
            f"attributes={word}, flags={flags:#x}}})",
            partial(
                set_memory_attributes,
                self.fd,
                page * PAGE_SIZE,
                npages * PAGE_SIZE,
                private=private,
                flags=flags,
            ),
        )

    def punch(self, page: int, npages: int = 1) -> None:
        """Free pages."""
        self._fallocate(FallocMode.PUNCH_HOLE | FallocMode.KEEP_SIZE, page, npages)

    def allocate(self, page: int, npages: int = 1) -> None:
        """Allocate pages."""
        self._fallocate(FallocMode.KEEP_SIZE, page, npages)

    def _fallocate(self, mode: int, page: int, npages: int) -> None:
        self.steps.call(
            f"fallocate(gmem, {mode:#x}, {page}*P, {npages}*P)",
            partial(memory.fallocate, self.fd, mode, page * PAGE_SIZE, npages * PAGE_SIZE),
        )

    def load(self, page: int) -> int:
        """Load the first byte of a page in the owner's process, which a private page kills."""
        at = page * PAGE_SIZE
        return self.steps.call(f"mem[{page}*P]", lambda: self.mapping[at])

    def store(self, page: int, value: int) -> None:
        """Store the first byte of a page in the owner's process, as ``load``."""
        at = page * PAGE_SIZE
        self.steps.call(f"mem[{page}*P] = {value:#x}", lambda: self.mapping.__setitem__(at, value))

    def touch(self, page: int, value: int | None = None) -> str:
        """Load or store in a child that inherits the mapping; return ``SIGBUS`` if that kills it.

        Else the answer is the byte that was there, as text.
        """
        return self.steps.in_child(partial(self._touch, page, value))

    def _touch(self, page: int, value: int | None) -> int:
        # No handler of the parent's, such as faulthandler's.
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        if value is None:
            return self.load(page)
        self.store(page, value)
        return value

    def guest(self, page: int, value: int | None = None) -> int | exits.Exit:
        """Have the guest load a byte, and store ``value`` there; return the old one.

        The answer is an exit if the access ends in one. The next call has to be ``again``.
        """
        text = f"guest: mem[{page}*P]" + ("" if value is None else f" = {value:#x}")
        return self.steps.call(text, partial(self._access, page, value))

    def _access(self, page: int, value: int | None) -> int | exits.Exit:
        self.vcpu.run(page * PAGE_SIZE)
        return self._answer(self.vcpu.run(0 if value is None else _STORE | value))

    def again(self) -> int | exits.Exit:
        """Run the guest after an access that ended in an exit, which it makes again."""
        return self.steps.call("ioctl(vcpu, KVM_RUN)", lambda: self._answer(self.vcpu.run()))

    def _answer(self, exit_: exits.Exit) -> int | exits.Exit:
        if not isinstance(exit_, exits.PortOut):
            return exit_
        self.vcpu.run()
        return exit_.data


@contextmanager
def machine(
    service: Service, steps: Steps, npages: int = 1, flags: int = SHARED
) -> Generator[InPlace]:
    """Make a guest_memfd of some pages, map it, and start a guest that has it.

    The service makes guest_memfds (``Options.guest_memfd``).
    """
    size = npages * PAGE_SIZE
    with ExitStack() as made:
        fd = made.enter_context(
            OwnedFd(
                steps.call(
                    f"gmem = KVM_CREATE_GUEST_MEMFD {{size={npages}*P, flags={flags:#x}}}",
                    lambda: service.create_guest_memfd(size, flags),
                )
            )
        ).fileno()
        mapping = made.enter_context(
            steps.call(
                f"mem = mmap(0, {npages}*P, PROT_READ|PROT_WRITE, MAP_SHARED, gmem, 0)",
                lambda: mmap.mmap(fd, size),
            )
        )
        vm = made.enter_context(Vm(service))
        vcpu = made.enter_context(_started(service, vm, partial(_show, steps, vm, fd, size)))
        yield InPlace(steps, fd, mapping, vm, vcpu, npages)


def _show(steps: Steps, vm: Vm, fd: int, size: int) -> None:
    steps.call(
        "ioctl(vm, KVM_SET_USER_MEMORY_REGION2, {slot=1, flags=KVM_MEM_GUEST_MEMFD, "
        f"gpa={DATA:#x}, size={size:#x}, guest_memfd=gmem, offset=0}})",
        lambda: vm.set_user_memory_region2(
            slot=1, guest_phys_addr=DATA, memory_size=size, guest_memfd=fd
        ),
    )


def _started(service: Service, vm: Vm, show: Callable[[], None]) -> Vcpu:
    """Put the program into private memory, show the guest_memfd, and run to the first IN."""
    with OwnedFd(service.memfd_restricted()) as program:
        vm.set_user_memory_region(
            slot=0,
            guest_phys_addr=_PROGRAM,
            memory_size=PAGE_SIZE,
            restricted_fd=program.fileno(),
        )
    vm.convert(_PROGRAM, PAGE_SIZE, private=True)
    vm.launch_update(_PROGRAM, _CODE.ljust(PAGE_SIZE, b"\0"))
    show()
    vcpu = vm.create_vcpu()
    vcpu.set_regs(rip=_PROGRAM, rdi=DATA)
    vcpu.run()
    return vcpu
