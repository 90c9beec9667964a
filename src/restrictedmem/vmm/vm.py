"""The owner's side of a VM in KVM's words: the VM, its slots, its vCPUs and their exits."""

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
from restrictedmem.fs.owner_abi import TOKEN_BYTES
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.client import Service, default_service
from restrictedmem.service.wire import MAX_BODY, Channel
from restrictedmem.units import PAGE_MASK, U64_MAX

_LAUNCH_CHUNK: Final = (MAX_BODY - vm_wire.LAUNCH.size) & ~PAGE_MASK
_DBG_CHUNK: Final = MAX_BODY - vm_wire.DBG.size
_NOT_RESTRICTED: Final = (EBADF, ENOTTY, EACCES)
#: How many files of slots a VM remembers; most VMs have two files for all slots.
_SHOWN: Final = 8


@final
class Vm:
    """A VM in an engine process of its own.

    The VM lives until this object and all its vCPUs are closed.
    """

    def __init__(
        self,
        service: Service | None = None,
        *,
        engine: str = "software",
        debug: bool = False,
        explicit: bool = False,
        platform: str = "",
    ) -> None:
        """Start an engine (KVM_CREATE_VM), by the given service or the process's own.

        ``engine`` is ``software``, ``kernel`` or ``auto``; ``auto`` takes the kernel engine where
        it works. ``debug`` opens registers and private memory to the owner. With ``explicit``,
        pages are converted only when the guest has asked for it (MAP_GPA_RANGE), and private memory
        stays where it was at the launch. Both are part of the measurement. ``platform`` names the
        model of the host state that is kept in step with private memory
        (``platform.platform.NAMES``); with it, ``auto`` means ``software``.

        Raises:
            OSError: EINVAL for an unknown engine or platform; EOPNOTSUPP for a platform with
                ``kernel``; the error that kept the service or the engine from starting.
        """
        self._service = service or default_service()
        policy = (vm_wire.POLICY_DEBUG if debug else 0) | (
            vm_wire.POLICY_EXPLICIT if explicit else 0
        )
        creation = vm_wire.Creation(engine, policy, platform)
        number, sock = self._service.spawn_numbered("kvm", creation.dump())
        #: Returns how the engine ended, once it is gone.
        self._why = partial(self._service.ending, number)
        self._channel = Channel(sock, "engine", takes_fds=True, why=self._why)
        try:
            name, _ = self._channel.call(vm_wire.CREATE_VM)
        except BaseException:
            self._channel.close()
            raise
        #: The files of the last slots. Only the engine knows whether a slot still shows a file: the
        #: slot may be gone, and other processes may have this VM too.
        self._shown = deque[Identity](maxlen=_SHOWN)
        #: The engine that runs the VM: ``software`` or ``kernel``.
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
        """Create, move or delete a slot (KVM_SET_USER_MEMORY_REGION).

        Addresses and sizes are in bytes. ``memory_size=0`` deletes the slot. ``restricted_fd``
        gives the private half (``KVM_MEM_PRIVATE``); the slot holds the file until it is deleted.
        ``shared_fd`` gives the shared half: a memfd, which gets sealed against shrinking. The
        caller keeps both descriptors. While a slot shows a file, further slots send the file's name
        instead of a descriptor. A slot without a private half moves to another guest address when
        all other arguments are unchanged. Nothing else of a slot can be changed. vCPUs may be
        running.

        Raises:
            OSError: EINVAL, EEXIST as v9 and v10; EINVAL for a descriptor that is closed or not
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
            named = [each if each in shown else None for each in (private, shared)]
            self._set_region(region, restricted_fd, shared_fd, *named)
        except OSError as error:
            # The engine has no slot that shows the file any more.
            if error.errno != ESTALE:
                raise
            self._set_region(region, restricted_fd, shared_fd, None, None)
        for each in (private, shared):
            if each is not None and each not in shown:
                shown.append(each)

    def set_user_memory_region2(
        self,
        *,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        guest_memfd: int,
        guest_memfd_offset: int = 0,
    ) -> None:
        """Create or delete a slot of a guest_memfd (KVM_SET_USER_MEMORY_REGION2).

        Its attributes say which half a guest page shows (KVM_SET_MEMORY_ATTRIBUTES2). The slot
        holds the file until it is deleted.

        Raises:
            OSError: EINVAL, EEXIST as ``set_user_memory_region``; EINVAL for a file that another VM
                has, and for a range beyond its end; EOPNOTSUPP on the kernel engine.
        """
        self.set_user_memory_region(
            slot=slot,
            guest_phys_addr=guest_phys_addr,
            memory_size=memory_size,
            restricted_fd=guest_memfd,
            restricted_offset=guest_memfd_offset,
            shared_fd=guest_memfd,
            shared_offset=guest_memfd_offset,
        )

    def _set_region(
        self,
        region: kvm.kvm_userspace_memory_region_ext,
        restricted_fd: int | None,
        shared_fd: int | None,
        private: Identity | None,
        shared: Identity | None,
    ) -> None:
        """Make the call.

        ``private`` and ``shared`` name files that a slot shows already, in place of a token and a
        descriptor.
        """
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
        """Make a range of bytes private or shared (v10: KVM_SET_MEMORY_ATTRIBUTES).

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; EOPNOTSUPP on a service that
                follows v9; the engine's error, after which a part at the start may be done.
        """
        attributes = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        left = kvm.kvm_memory_attributes(address=address, size=size, attributes=attributes)
        while True:
            body, _ = self._channel.call(vm_wire.SET_MEMORY_ATTRIBUTES, bytes(left))
            left = kvm.kvm_memory_attributes.from_buffer_copy(body)
            if not left.size:
                return

    def get_supported_memory_attributes(self) -> int:
        """Return ``KVM_MEMORY_ATTRIBUTE_PRIVATE`` (v10: KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES).

        Raises:
            OSError: EOPNOTSUPP on a service that follows v9.
        """
        (found,) = vm_wire.ATTRIBUTES.unpack(
            self._channel.call(vm_wire.GET_SUPPORTED_MEMORY_ATTRIBUTES)[0]
        )
        return int(found)

    def check_extension(self, cap: int) -> int:
        """Return the VM's answer for a ``KVM_CAP_*``, 0 for no (KVM_CHECK_EXTENSION)."""
        (found,) = vm_wire.CAP.unpack(
            self._channel.call(vm_wire.CHECK_EXTENSION, vm_wire.CAP.pack(cap))[0]
        )
        return int(found)

    def inject_failure(self, gpa: int) -> None:
        """Act as if the machine had lost a page of private memory; for tests.

        The guest gets EHWPOISON for the page until the page is punched.

        Raises:
            OSError: EINVAL unless aligned; EFAULT where no slot has a private half; EOPNOTSUPP on
                an engine that cannot.
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
        """Make a range private or shared by the call of the service's posting; bytes.

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
        """Put whole pages of content into private memory before the launch is finished.

        The pages extend the measurement. Content too large for one message is sent in several
        messages, each of which may fail by itself.

        Raises:
            OSError: EPERM when the launch is finished; EINVAL for part of a page; EFAULT where the
                range is not private memory of one slot; ENOSPC, ENOMEM.
        """
        for start in range(0, len(data), _LAUNCH_CHUNK):
            chunk = data[start : start + _LAUNCH_CHUNK]
            self._channel.call(vm_wire.LAUNCH_UPDATE, vm_wire.LAUNCH.pack(gpa + start) + chunk)

    def launch_finish(self) -> bytes:
        """Close the launch and return its measurement, 48 bytes.

        The first run of a vCPU closes the launch too.

        Raises:
            OSError: ENOTCONN when the engine or its service is gone.
        """
        measurement, _ = self._channel.call(vm_wire.LAUNCH_FINISH)
        return measurement

    def create_vcpu(self) -> "Vcpu":
        """Make a vCPU (KVM_CREATE_VCPU).

        Raises:
            OSError: EPERM when the launch is finished; EINVAL for one vCPU more than a VM can have.
        """
        body, fds = self._channel.call(vm_wire.CREATE_VCPU)
        (number,) = vm_wire.VCPU.unpack(body)
        return Vcpu(socket.socket(fileno=fds[0].detach()), self._channel, number, self._why)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Return memory as the guest sees it, private pages too, of a VM made with ``debug``.

        A missing page reads as zero.

        Raises:
            OSError: EPERM without ``debug``; EFAULT where no memory is.
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
        """Change memory as the guest sees it, private pages too, of a VM made with ``debug``.

        Raises:
            OSError: as ``read_memory``; ENOSPC, ENOMEM.
        """
        for start in range(0, len(data), _DBG_CHUNK):
            chunk = data[start : start + _DBG_CHUNK]
            self._channel.call(vm_wire.DBG_WRITE, vm_wire.DBG.pack(gpa + start, len(chunk)) + chunk)

    def start_trace(self) -> socket.socket:
        """Have the engine send its events, and return the socket to read them from.

        docs/use/trace.md describes the events. The caller owns the socket. The stream ends when the
        trace ends. A second trace ends the first.

        Raises:
            OSError: EMFILE, here or in the engine; ETOOMANYREFS as unix(7). An earlier trace then
                goes on.
        """
        _, (reader,) = self._channel.call(vm_wire.TRACE, vm_wire.TRACE_REQUEST.pack(1))
        return socket.socket(fileno=reader.detach())

    def end_trace(self) -> None:
        """Have the engine stop sending events; its last event marks the end."""
        self._channel.call(vm_wire.TRACE, vm_wire.TRACE_REQUEST.pack(0))

    def statistics(self) -> dict[str, Any]:
        """Return the engine's counts: pages, faults, invalidations, exits, times."""
        body, _ = self._channel.call(vm_wire.STATISTICS)
        found: dict[str, Any] = json.loads(body)
        return found

    def destroy(self) -> dict[str, Any]:
        """End the VM now, and return its platform's report, {} without a platform.

        vCPUs leave the guest, slots are deleted, and files are unbound. A run that is under way
        returns ``exits.Interrupted``. Every later call of the VM and its vCPUs is EBADF. Closing
        the VM and its vCPUs ends the VM too, but returns no report, and does not say when the VM
        has ended.
        """
        body, _ = self._channel.call(vm_wire.DESTROY_VM)
        found: dict[str, Any] = json.loads(body)
        return found

    def close(self) -> None:
        """Close the VM's socket."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(fd: int) -> Identity | None:
    """Return the device and inode number that may stand for a descriptor in a request.

    None for a descriptor that is closed or cannot be written to: the file's name would allow more
    than the descriptor does.
    """
    try:
        found = stat.identity(fd)
        return found if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR else None
    except OSError:
        return None


@final
class Vcpu:
    """A vCPU; one thread at a time may run it, any other thread may interrupt it."""

    def __init__(
        self, sock: socket.socket, vm: Channel, number: int, why: Callable[[], str] | None = None
    ) -> None:
        self._channel = Channel(sock, "engine", why=why)
        self._vm = vm
        #: vCPUs are numbered from 0 in the order in which they were made.
        self.number: Final = number

    def set_regs(self, *, rip: int, rsp: int = 0, rdi: int = 0, rsi: int = 0) -> None:
        """Set a guest's entry point, stack and arguments before its first run (KVM_SET_REGS).

        Raises:
            OSError: EPERM after the first run or when the launch is finished, because a private
                guest's registers are its own.
        """
        self._channel.call(
            vm_wire.SET_REGS, bytes(kvm.kvm_regs(rip=rip, rsp=rsp, rdi=rdi, rsi=rsi))
        )

    def get_regs(self) -> kvm.kvm_regs:
        """Return the general registers (KVM_GET_REGS) of a vCPU that is not running.

        Raises:
            OSError: EPERM for a VM made without ``debug``; EOPNOTSUPP on an engine that cannot. The
                next three methods raise the same.
        """
        body, _ = self._channel.call(vm_wire.GET_REGS)
        return kvm.kvm_regs.from_buffer_copy(body)

    def change_regs(self, regs: kvm.kvm_regs) -> None:
        """Set the general registers of a guest that has run (KVM_SET_REGS).

        Before the first run, use ``set_regs``.
        """
        self._channel.call(vm_wire.SET_REGS, bytes(regs))

    def get_sregs(self) -> kvm_x86.kvm_sregs:
        """Return the system registers (KVM_GET_SREGS).

        Selectors, the bases of FS and GS, and control registers are filled in. The rest is 0.
        """
        body, _ = self._channel.call(vm_wire.GET_SREGS)
        return kvm_x86.kvm_sregs.from_buffer_copy(body)

    def set_guest_debug(self, *, step: bool = False, breakpoints: Collection[int] = ()) -> None:
        """Exit with ``exits.Debug`` at steps and breakpoints (KVM_SET_GUEST_DEBUG).

        With ``step``, the vCPU exits after each instruction. It exits before the instruction at
        each address in ``breakpoints``.
        """
        control = kvm_x86.KVM_GUESTDBG_SINGLESTEP if step else 0
        control |= kvm_x86.KVM_GUESTDBG_USE_SW_BP if breakpoints else 0
        control |= kvm_x86.KVM_GUESTDBG_ENABLE if control else 0
        addresses = struct.pack(f"={len(breakpoints)}Q", *breakpoints)
        self._channel.call(
            vm_wire.SET_GUEST_DEBUG, bytes(kvm_x86.kvm_guest_debug(control=control)) + addresses
        )

    def run(self, value: int = 0) -> exits.Exit:
        """Run the guest until it needs its owner (KVM_RUN).

        ``value`` answers the previous exit, if that exit asked for a value.

        Raises:
            OSError: ENOTCONN when the engine is gone.
        """
        body, _ = self._channel.call(vm_wire.RUN, vm_wire.COMPLETION.pack(value & U64_MAX))
        return exits.unpack(body)

    def interrupt(self) -> None:
        """Make ``run`` return ``exits.Interrupted``; any thread may call this.

        If no run is under way, the next run returns so.

        Raises:
            OSError: ENOTCONN when the VM is closed or the engine is gone.
        """
        self._vm.call(vm_wire.INTERRUPT, vm_wire.VCPU.pack(self.number))

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """Map guest memory before the guest needs it, as a read would (KVM_PRE_FAULT_MEMORY).

        Return the number of bytes done, which may be fewer than ``size``. The caller then asks for
        the rest; if the rest cannot be mapped, that call's errno says why.

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; ENOENT where no slot is;
                EFAULT where the slot lacks the half that the attribute selects; EHWPOISON for a
                page that the machine has lost; ENOSPC, ENOMEM; EINTR when interrupted; EOPNOTSUPP
                on an engine that cannot. Each is raised only when nothing was done.
        """
        body, _ = self._channel.call(
            vm_wire.PRE_FAULT_MEMORY, bytes(kvm.kvm_pre_fault_memory(gpa=gpa, size=size))
        )
        return size - int(kvm.kvm_pre_fault_memory.from_buffer_copy(body).size)

    def close(self) -> None:
        """Close the vCPU's socket."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
