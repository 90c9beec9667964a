"""A VM of this project under test, on either engine."""

import mmap
import os
from contextlib import ExitStack
from typing import ClassVar

from restrictedmem.abi import kvm, memory
from restrictedmem.conformance import guest
from restrictedmem.conformance.machines import (
    DATA,
    DATA_SIZE,
    GUEST_SIZE,
    GUEST_SLOT,
    PRIVATE,
    SLOT,
    STACK,
    Machine,
    spell_exit,
)
from restrictedmem.conformance.steps import Steps
from restrictedmem.protocol import vm_wire
from restrictedmem.protocol.guest_abi import HYPERCALL_PAGE, SHARED_BASE
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE, U64_MAX
from restrictedmem.vmm.vm import Vcpu, Vm


class EngineMachine(Machine):
    """A VM in an engine process, whose private files are restricted descriptors.

    The guest runs in long mode at CPL 3. Its code lies in shared memory.
    """

    by_message = True

    def __init__(self, steps: Steps, service: Service, engine: str) -> None:
        self._stack = ExitStack()
        self._service, self._engine = service, engine
        self._shared = self._stack.enter_context(memory.memfd_create("shared half"))
        os.ftruncate(self._shared.fileno(), DATA_SIZE)
        super().__init__(steps, mmap.mmap(self._shared.fileno(), DATA_SIZE))
        self._own = self._stack.enter_context(memory.memfd_create("guest"))
        os.ftruncate(self._own.fileno(), GUEST_SIZE)
        self._space = mmap.mmap(self._own.fileno(), GUEST_SIZE)
        #: The VM itself.
        self.vm = self._stack.enter_context(Vm(service, engine=engine))
        # Cases send numbers that the methods of a VM do not take.
        self._channel = self.vm._channel  # pyright: ignore[reportPrivateUsage]
        self._set_region = self.vm._set_region  # pyright: ignore[reportPrivateUsage]
        self._vcpu: Vcpu | None = None

    def lacks(self, need: str) -> str:
        """Say what the machine lacks of a need of a case."""
        if need in ("mapping", "in-place"):
            return "the owner cannot map a restricted descriptor"
        if need == "pre-fault" and not self.vm.check_extension(kvm.Cap.PRE_FAULT_MEMORY):
            return "KVM_CAP_PRE_FAULT_MEMORY is 0"
        return ""

    def another(self) -> "EngineMachine":
        """Make another VM of the kind."""
        return EngineMachine(self.steps, self._service, self._engine)

    def close(self) -> None:
        """End the VM and close its files."""
        if self._vcpu is not None:
            self._vcpu.close()
        self._close_files()
        self._stack.close()

    def descriptor(self, kind: str) -> int:
        """Return the descriptor of the machine's shared memory, or of the VM's socket."""
        return (self._shared if kind == "device" else self._channel).fileno()

    def _create(self, size: int, flags: int) -> int:
        fd = self._service.memfd_restricted(flags)
        os.ftruncate(fd, size)
        return fd

    def _creation(self, size: int, flags: int) -> str:
        return f"memfd_restricted({flags}), and ftruncate to {size:#x}"

    def held(self, fd: int) -> int:
        """Count the pages of a restricted file by fstat(2)."""
        return self.steps.call(
            f"st_blocks of {self._name(fd)}, in pages",
            lambda: os.fstat(fd).st_blocks * 512 // PAGE_SIZE,
        )

    def end(self) -> None:
        """End the VM by DESTROY_VM."""
        self.steps.call("DESTROY_VM", self.vm.destroy)

    def at(self, address: int) -> int:
        """Return an address as the place in ``memory`` that it would be."""
        return address

    def set_region(
        self,
        slot: int = SLOT,
        gpa: int = DATA,
        size: int = 0,
        *,
        shared: int | None = None,
        private: int | None = None,
        offset: int = 0,
        flags: int | None = None,
        old: bool = False,
    ) -> None:
        """Call KVM_SET_USER_MEMORY_REGION with the struct of v9 and v10."""
        bits = (kvm.KVM_MEM_PRIVATE if private is not None else 0) if flags is None else flags
        region = kvm.kvm_userspace_memory_region_ext(
            slot=slot,
            flags=bits,
            guest_phys_addr=gpa & U64_MAX,
            memory_size=size,
            userspace_addr=(shared or 0) & U64_MAX,
            restricted_offset=offset & U64_MAX,
        )
        half = "NULL" if shared is None else f"memory + {shared:#x}"
        file = "" if private is None else f", {self._name(private)}, offset={offset:#x}"
        self.steps.call(
            f"ioctl(vm, {self._region_call}, {{slot={slot}, flags={bits:#x}, gpa={gpa:#x},"
            f" size={size:#x}, userspace_addr={half}{file}}})",
            lambda: self._put_region(
                region,
                private if bits & kvm.KVM_MEM_PRIVATE else None,
                None if shared is None else self._shared.fileno(),
            ),
        )

    #: The name of the call that makes a slot.
    _region_call: ClassVar[str] = "KVM_SET_USER_MEMORY_REGION"

    def _put_region(
        self,
        region: kvm.kvm_userspace_memory_region_ext,
        private: int | None,
        shared: int | None,
    ) -> None:
        self._set_region(region, private, shared, None, None)

    def set_attributes(
        self, gpa: int, size: int, attributes: int = PRIVATE, flags: int = 0
    ) -> None:
        """Make the call of the posting for attributes."""
        if self._service.info["api"] == "v10":
            super().set_attributes(gpa, size, attributes, flags)
            return
        name = vm_wire.ENCRYPT_REG_REGION if attributes else vm_wire.ENCRYPT_UNREG_REGION
        self.steps.call(
            f"ioctl(vm, {name.name}, {{{gpa:#x}, {size:#x}}})",
            lambda: self.vm.memory_encrypt_region(gpa, size, private=bool(attributes)),
        )

    def _set_attributes(self, request: kvm.kvm_memory_attributes) -> None:
        self._channel.call(vm_wire.SET_MEMORY_ATTRIBUTES, bytes(request))

    def _check_extension(self, capability: int) -> int:
        return self.vm.check_extension(capability)

    def _pre_fault(self, request: kvm.kvm_pre_fault_memory) -> int:
        channel = self._running._channel  # pyright: ignore[reportPrivateUsage]
        body, _ = channel.call(vm_wire.PRE_FAULT_MEMORY, bytes(request))
        return kvm.kvm_pre_fault_memory.from_buffer_copy(body).size

    # The guest.

    @property
    def _running(self) -> Vcpu:
        if self._vcpu is None:
            self._vcpu = self.vm.create_vcpu()
        return self._vcpu

    @property
    def _code(self) -> memoryview:
        return memoryview(self._space)

    @property
    def _base(self) -> int:
        return SHARED_BASE

    @property
    def _call(self) -> bytes:
        return guest.call_page(HYPERCALL_PAGE, SHARED_BASE + STACK)

    def _boot(self) -> None:
        self.vm.set_user_memory_region(
            slot=GUEST_SLOT,
            guest_phys_addr=SHARED_BASE,
            memory_size=GUEST_SIZE,
            shared_fd=self._own.fileno(),
        )
        self._running.set_regs(rip=SHARED_BASE + guest.START, rsp=SHARED_BASE + STACK)

    def _run_bare(self) -> str:
        return self._enter(0)

    def _accept_kicks(self) -> None:
        """Do nothing, because no guest of an engine needs a kick to exit."""

    def _kick(self) -> None:
        """Do nothing."""

    def _enter(self, value: int) -> str:
        return spell_exit(self._running.run(value))
