"""The owner's side of a VM, in KVM's words: a VM, its slots, its vCPU, and exits as values."""

import fcntl
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection
from errno import EACCES, EBADF, EINVAL, ENOTTY, ESTALE
from functools import partial
from typing import Any, Final, Self, final

from restrictedmem.abi import kvm, kvm_x86, stat
from restrictedmem.abi.stat import Identity
from restrictedmem.failure import failed
from restrictedmem.fs.filesystem import TOKEN_BYTES
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.client import Service, default_service
from restrictedmem.service.wire import MAX_BODY, Channel
from restrictedmem.units import PAGE_MASK, U64_MAX

_LAUNCH_CHUNK: Final = (MAX_BODY - vm_wire.LAUNCH.size) & ~PAGE_MASK
_DBG_CHUNK: Final = MAX_BODY - vm_wire.DBG.size
_NOT_RESTRICTED: Final = (EBADF, ENOTTY, EACCES)
#: Files that a VM may name; most have two for all their slots.
_SHOWN: Final = 8


@final
class Vm:
    """A VM in an engine process of its own; it lives as long as this or any of its vCPUs is open."""

    def __init__(
        self,
        service: Service | None = None,
        *,
        engine: str = "software",
        debug: bool = False,
        explicit: bool = False,
        platform: str = "",
    ) -> None:
        """Start an engine (KVM_CREATE_VM), by the process's own service or another.

        ``engine`` is ``software``, ``kernel``, or ``auto`` for the kernel's where it works.
        ``debug`` opens registers and private memory to the owner; with ``explicit`` pages are
        converted only when the guest has asked for it (MAP_GPA_RANGE), and private memory lies
        where it was at the launch. Both are part of the measurement. ``platform`` names what the
        host keeps in step with private memory (``platform.platform.NAMES``); ``auto`` is then
        ``software``.

        Raises:
            OSError: EINVAL for an unknown engine or platform; EOPNOTSUPP for a platform under
                ``kernel``; what kept the service or the engine from starting.
        """
        self._service = service or default_service()
        policy = (vm_wire.POLICY_DEBUG if debug else 0) | (
            vm_wire.POLICY_EXPLICIT if explicit else 0
        )
        creation = vm_wire.Creation(engine, policy, platform)
        number, sock = self._service.spawn_numbered("kvm", creation.dump())
        #: Says how the engine ended, once it is gone.
        self._why = partial(self._service.ending, number)
        self._channel = Channel(sock, "engine", takes_fds=True, why=self._why)
        try:
            name, _ = self._channel.call(vm_wire.CREATE_VM)
        except BaseException:
            self._channel.close()
            raise
        #: Files of slots, the last ones. The engine says whether one still is: a slot may be gone,
        #: and others may have this VM too.
        self._shown = deque[Identity](maxlen=_SHOWN)
        #: The engine it runs on: ``software`` or ``kernel``.
        self.engine = name.decode()

    def set_user_memory_region(
        self,
        *,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        restricted_fd: int | None = None,
        restricted_offset: int = 0,
        shared_fd: int | None = None,
        shared_offset: int = 0,
        readonly: bool = False,
    ) -> None:
        """Create a slot, move one, or delete it with ``memory_size=0`` (KVM_SET_USER_MEMORY_REGION); addresses and sizes in bytes.

        ``restricted_fd`` gives the private half (``KVM_MEM_PRIVATE``); the slot holds the file
        until it is deleted. ``shared_fd`` gives the shared half: a memfd, which is sealed against
        shrinking. Both stay the caller's; while a slot shows the file, further ones only name it. A
        slot without private half moves to another guest address when all else is given as it was;
        nothing else of a slot can be changed. vCPUs may be running.

        Raises:
            OSError: EINVAL, EEXIST as v9 and v10; EINVAL for a closed descriptor or one that is not
                restricted; ENOMEM for slots of more than 256 GiB together.
        """
        flags = kvm.KVM_MEM_PRIVATE if restricted_fd is not None else 0
        flags |= kvm.KVM_MEM_READONLY if readonly else 0
        region = kvm.kvm_userspace_memory_region_ext(
            slot=slot,
            flags=flags,
            guest_phys_addr=guest_phys_addr,
            memory_size=memory_size,
            userspace_addr=shared_offset,
            restricted_offset=restricted_offset,
        )
        private = None if restricted_fd is None or not memory_size else _identity(restricted_fd)
        shared = None if shared_fd is None or not memory_size else _identity(shared_fd)
        shown = self._shown
        try:
            named = private if private in shown else None, shared if shared in shown else None
            self._set_region(region, restricted_fd, shared_fd, *named)
        except OSError as error:
            if error.errno != ESTALE:
                raise
            self._set_region(region, restricted_fd, shared_fd, None, None)
        if private is not None and private not in shown:
            shown.append(private)
        if shared is not None and shared not in shown:
            shown.append(shared)

    def _set_region(
        self,
        region: kvm.kvm_userspace_memory_region_ext,
        restricted_fd: int | None,
        shared_fd: int | None,
        private: Identity | None,
        shared: Identity | None,
    ) -> None:
        """Make the call; ``private`` and ``shared`` name what a slot shows already, in place of token and descriptor."""
        token = (
            b""
            if restricted_fd is None or private or not region.memory_size
            else self._token(restricted_fd)
        )
        if private or shared:
            token = (
                token.ljust(TOKEN_BYTES, b"\0")
                + vm_wire.SlotFiles(private[1] if private else 0, *(shared or (0, 0))).pack()
            )
        self._channel.call(
            vm_wire.SET_USER_MEMORY_REGION,
            bytes(region) + token,
            [] if shared_fd is None or shared else [shared_fd],
        )

    def _token(self, restricted_fd: int) -> bytes:
        try:
            return self._service.token_for(restricted_fd)
        except OSError as error:
            if error.errno in _NOT_RESTRICTED:
                raise failed(
                    vm_wire.SET_USER_MEMORY_REGION.name, EINVAL, error.strerror or ""
                ) from None
            raise

    def set_memory_attributes(self, address: int, size: int, *, private: bool) -> None:
        """Make a range of guest memory private or shared (v10: KVM_SET_MEMORY_ATTRIBUTES); bytes.

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; EOPNOTSUPP on a service that
                follows v9; what the engine failed with, and then a part at the start may be done.
        """
        attributes = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        left = kvm.kvm_memory_attributes(address=address, size=size, attributes=attributes)
        while True:
            body, _ = self._channel.call(vm_wire.SET_MEMORY_ATTRIBUTES, bytes(left))
            left = kvm.kvm_memory_attributes.from_buffer_copy(body)
            if not left.size:
                return

    def get_supported_memory_attributes(self) -> int:
        """Return what can be set: ``KVM_MEMORY_ATTRIBUTE_PRIVATE`` (v10: KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES).

        Raises:
            OSError: EOPNOTSUPP on a service that follows v9.
        """
        (found,) = vm_wire.ATTRIBUTES.unpack(
            self._channel.call(vm_wire.GET_SUPPORTED_MEMORY_ATTRIBUTES)[0]
        )
        return int(found)

    def check_extension(self, cap: int) -> int:
        """Return what this VM says to a ``KVM_CAP_*``, 0 for no (KVM_CHECK_EXTENSION)."""
        (found,) = vm_wire.CAP.unpack(
            self._channel.call(vm_wire.CHECK_EXTENSION, vm_wire.CAP.pack(cap))[0]
        )
        return int(found)

    def inject_failure(self, gpa: int) -> None:
        """Act as if the machine had lost a page of private memory: EHWPOISON for the guest, until it is punched. For tests.

        Raises:
            OSError: EINVAL unless aligned; EFAULT where no private half is; EOPNOTSUPP on an engine
                that cannot.
        """
        self._channel.call(vm_wire.INJECT_FAILURE, vm_wire.FAILURE.pack(gpa))

    def memory_encrypt_region(self, address: int, size: int, *, private: bool) -> None:
        """Make a range private or shared (v9: KVM_MEMORY_ENCRYPT_REG_REGION and UNREG); bytes.

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; EOPNOTSUPP on a service that
                follows v10.
        """
        call = vm_wire.ENCRYPT_REG_REGION if private else vm_wire.ENCRYPT_UNREG_REGION
        self._channel.call(call, bytes(kvm.kvm_enc_region(addr=address, size=size)))

    def convert(self, address: int, size: int, *, private: bool) -> None:
        """Make a range private or shared by the call of the posting that the service follows; bytes.

        Raises:
            OSError: as ``set_memory_attributes`` (v10) or ``memory_encrypt_region`` (v9).
        """
        change = (
            self.set_memory_attributes
            if self._service.info["api"] == "v10"
            else self.memory_encrypt_region
        )
        change(address, size, private=private)

    def launch_update(self, gpa: int, data: bytes) -> None:
        """Put whole pages of initial content into private memory, before the launch is finished, and extend the measurement by them.

        What does not fit one message goes in several, which fail by themselves.

        Raises:
            OSError: EPERM when it is finished; EINVAL for part of a page; EFAULT where the range is
                not private memory of one slot; ENOSPC, ENOMEM.
        """
        for start in range(0, len(data), _LAUNCH_CHUNK):
            chunk = data[start : start + _LAUNCH_CHUNK]
            self._channel.call(vm_wire.LAUNCH_UPDATE, vm_wire.LAUNCH.pack(gpa + start) + chunk)

    def launch_finish(self) -> bytes:
        """Close the launch and return its measurement, 48 bytes; the first run of a vCPU does it too.

        Raises:
            OSError: ENOTCONN when the engine or its service is gone.
        """
        measurement, _ = self._channel.call(vm_wire.LAUNCH_FINISH)
        return measurement

    def create_vcpu(self) -> "Vcpu":
        """Make a vCPU (KVM_CREATE_VCPU).

        Raises:
            OSError: EPERM when the launch is finished.
            OSError: EINVAL for one more than a VM can have.
        """
        body, fds = self._channel.call(vm_wire.CREATE_VCPU)
        (number,) = vm_wire.VCPU.unpack(body)
        return Vcpu(socket.socket(fileno=fds[0].detach()), self._channel, number, self._why)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Return memory as the guest has it, private pages too, of a VM made with ``debug``; a missing page reads as zero.

        Raises:
            OSError: EPERM without ``debug``; EFAULT where nothing is.
        """
        found = bytearray()
        while len(found) < size:
            piece, _ = self._channel.call(
                vm_wire.DBG_READ,
                vm_wire.DBG.pack(gpa + len(found), min(size - len(found), MAX_BODY)),
            )
            found += piece
        return bytes(found)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Change memory as the guest has it, private pages too, of a VM made with ``debug``.

        Raises:
            OSError: as ``read_memory``; ENOSPC, ENOMEM.
        """
        for start in range(0, len(data), _DBG_CHUNK):
            chunk = data[start : start + _DBG_CHUNK]
            self._channel.call(vm_wire.DBG_WRITE, vm_wire.DBG.pack(gpa + start, len(chunk)) + chunk)

    def start_trace(self) -> socket.socket:
        """Have the engine send its events (docs/use/trace.md), and return the socket to read them from, which is the caller's.

        It ends where the trace ends: a further one ends the one before.

        Raises:
            OSError: EMFILE, here or in the engine; ETOOMANYREFS as unix(7). The one before goes on
                then.
        """
        _, (reader,) = self._channel.call(vm_wire.TRACE, vm_wire.TRACE_REQUEST.pack(1))
        return socket.socket(fileno=reader.detach())

    def end_trace(self) -> None:
        """Have the engine send no more events; the last says that it is the last."""
        self._channel.call(vm_wire.TRACE, vm_wire.TRACE_REQUEST.pack(0))

    def statistics(self) -> dict[str, Any]:
        """Return the engine's counts: pages, faults, invalidations, exits, times."""
        body, _ = self._channel.call(vm_wire.STATISTICS)
        found: dict[str, Any] = json.loads(body)
        return found

    def destroy(self) -> dict[str, Any]:
        """End the VM now: vCPUs leave the guest, slots go, files are unbound; returns what its platform reports, {} without one.

        What a run under way gets is ``exits.Interrupted``; every later call of the VM and its vCPUs
        is EBADF. Closing them ends a VM too, but says nothing, and not when.
        """
        body, _ = self._channel.call(vm_wire.DESTROY_VM)
        found: dict[str, Any] = json.loads(body)
        return found

    def close(self) -> None:
        """Let go of the VM."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(fd: int) -> Identity | None:
    """Return which file a descriptor is of; None where it may not be written to, or is closed: then its name would do what it cannot."""
    try:
        found = stat.identity(fd)
        return found if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR else None
    except OSError:
        return None


@final
class Vcpu:
    """A vCPU; one thread at a time runs it, any other may interrupt it."""

    def __init__(
        self, sock: socket.socket, vm: Channel, number: int, why: Callable[[], str] | None = None
    ) -> None:
        self._channel = Channel(sock, "engine", why=why)
        self._vm = vm
        #: From 0 on, in the order they were made.
        self.number: Final = number

    def set_regs(self, *, rip: int, rsp: int = 0, rdi: int = 0, rsi: int = 0) -> None:
        """Set where the guest starts, its stack and its arguments, before the first run (KVM_SET_REGS).

        Raises:
            OSError: EPERM after it, or when the launch is finished: a private guest's registers are
                its own.
        """
        self._channel.call(
            vm_wire.SET_REGS, bytes(kvm.kvm_regs(rip=rip, rsp=rsp, rdi=rdi, rsi=rsi))
        )

    def get_regs(self) -> kvm.kvm_regs:
        """Return the general registers (KVM_GET_REGS), of a VM made with ``debug``, when the vCPU is not being run.

        Raises:
            OSError: EPERM without ``debug``; EOPNOTSUPP on an engine that cannot; so the next
                three.
        """
        body, _ = self._channel.call(vm_wire.GET_REGS)
        return kvm.kvm_regs.from_buffer_copy(body)

    def change_regs(self, regs: kvm.kvm_regs) -> None:
        """Set the general registers of a guest that has run (KVM_SET_REGS); before its first run, ``set_regs`` is what there is."""
        self._channel.call(vm_wire.SET_REGS, bytes(regs))

    def get_sregs(self) -> kvm_x86.kvm_sregs:
        """Return selectors, the bases of FS and GS, and control registers (KVM_GET_SREGS); the rest is 0."""
        body, _ = self._channel.call(vm_wire.GET_SREGS)
        return kvm_x86.kvm_sregs.from_buffer_copy(body)

    def set_guest_debug(self, *, step: bool = False, breakpoints: Collection[int] = ()) -> None:
        """Exit with ``exits.Debug`` after each instruction, or before those at the addresses (KVM_SET_GUEST_DEBUG)."""
        control = kvm_x86.KVM_GUESTDBG_SINGLESTEP if step else 0
        control |= kvm_x86.KVM_GUESTDBG_USE_SW_BP if breakpoints else 0
        control |= kvm_x86.KVM_GUESTDBG_ENABLE if control else 0
        addresses = struct.pack(f"={len(breakpoints)}Q", *breakpoints)
        self._channel.call(
            vm_wire.SET_GUEST_DEBUG, bytes(kvm_x86.kvm_guest_debug(control=control)) + addresses
        )

    def run(self, value: int = 0) -> exits.Exit:
        """Run the guest until it needs its owner (KVM_RUN); ``value`` is what the exit before asked for, if it asked.

        Raises:
            OSError: ENOTCONN when the engine is gone.
        """
        body, _ = self._channel.call(vm_wire.RUN, vm_wire.COMPLETION.pack(value & U64_MAX))
        return exits.unpack(body)

    def interrupt(self) -> None:
        """Make ``run`` return ``exits.Interrupted``: the one under way, or else the next; from any thread.

        Raises:
            OSError: ENOTCONN when the VM is closed or the engine gone.
        """
        self._vm.call(vm_wire.INTERRUPT, vm_wire.VCPU.pack(self.number))

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """Map guest memory as a read by the guest would, before it needs it (KVM_PRE_FAULT_MEMORY); returns how many bytes were done.

        That may be fewer than asked for: ask for the rest, and if that cannot be had, the errno
        says why.

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; ENOENT where no slot is;
                EFAULT where the slot lacks the half that is shown; EHWPOISON for a page that the
                machine has lost; ENOSPC, ENOMEM; EINTR when interrupted; EOPNOTSUPP on an engine
                that cannot. Each only when nothing was done.
        """
        body, _ = self._channel.call(
            vm_wire.PRE_FAULT_MEMORY, bytes(kvm.kvm_pre_fault_memory(gpa=gpa, size=size))
        )
        return size - int(kvm.kvm_pre_fault_memory.from_buffer_copy(body).size)

    def close(self) -> None:
        """Let go of the vCPU."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
