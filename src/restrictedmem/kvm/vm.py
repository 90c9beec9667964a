"""The owner's side of a VM, in KVM's words: a VM, its slots, its vCPU, and exits as values."""

import json
import os
import socket
from errno import EACCES, EBADF, EINVAL, ENOTTY
from types import TracebackType
from typing import Any, Final, Self, final

from restrictedmem.abi import kvm
from restrictedmem.kvm import exits, wire
from restrictedmem.service.client import Service, default_service
from restrictedmem.service.wire import MAX_BODY, Channel

_LAUNCH_CHUNK: Final = MAX_BODY - wire.LAUNCH.size
_NOT_RESTRICTED: Final = (EBADF, ENOTTY, EACCES)


@final
class Vm:
    """A VM in an engine process of its own; it lives as long as this or any of its vCPUs is open."""

    def __init__(self, service: Service | None = None, *, engine: str = "auto", debug: bool = False) -> None:
        """Start an engine (KVM_CREATE_VM), by the process's own service or another.

        ``engine`` is ``software``, ``kernel``, or ``auto`` for the kernel's where it works. ``debug`` opens registers and private memory
        to the owner, and is part of the measurement.

        Raises:
            OSError: EINVAL for an unknown engine; what kept the service or the engine from starting.
        """
        self._service = service or default_service()
        creation = wire.Creation(engine, wire.POLICY_DEBUG if debug else 0)
        self._channel = Channel(self._service.spawn("kvm", creation.dump()), "engine")

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
        """Create a slot, or delete it with ``memory_size=0`` (KVM_SET_USER_MEMORY_REGION); addresses and sizes in bytes.

        ``restricted_fd`` gives the private half (``KVM_MEM_PRIVATE``); the slot holds the file until it is deleted. ``shared_fd`` gives
        the shared half: a memfd, which is sealed against shrinking. Both stay the caller's.

        Raises:
            OSError: EINVAL, EEXIST as v9 and v10; EINVAL for a closed descriptor or one that is not restricted.
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
        token = b"" if restricted_fd is None or not memory_size else self._token(restricted_fd)
        self._channel.call(wire.SET_USER_MEMORY_REGION, bytes(region) + token, [] if shared_fd is None else [shared_fd])

    def _token(self, restricted_fd: int) -> bytes:
        try:
            return self._service.token_for(restricted_fd)
        except OSError as error:
            if error.errno in _NOT_RESTRICTED:
                text = f"{wire.SET_USER_MEMORY_REGION.name}: {os.strerror(EINVAL)} ({error.strerror})"
                raise OSError(EINVAL, text) from None
            raise

    def set_memory_attributes(self, address: int, size: int, *, private: bool) -> None:
        """Make a range of guest memory private or shared (v10: KVM_SET_MEMORY_ATTRIBUTES); bytes.

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; EOPNOTSUPP on a service that follows v9.
        """
        attributes = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        self._channel.call(wire.SET_MEMORY_ATTRIBUTES, bytes(kvm.kvm_memory_attributes(address=address, size=size, attributes=attributes)))

    def memory_encrypt_region(self, address: int, size: int, *, private: bool) -> None:
        """Make a range private or shared (v9: KVM_MEMORY_ENCRYPT_REG_REGION and UNREG); bytes.

        Raises:
            OSError: EINVAL for an empty, unaligned or wrapping range; EOPNOTSUPP on a service that follows v10.
        """
        call = wire.ENCRYPT_REG_REGION if private else wire.ENCRYPT_UNREG_REGION
        self._channel.call(call, bytes(kvm.kvm_enc_region(addr=address, size=size)))

    def launch_update(self, gpa: int, data: bytes) -> None:
        """Put initial content into private memory, before the first run.

        Raises:
            OSError: EPERM after it; EFAULT where the range is not private memory of one slot; ENOSPC, ENOMEM.
        """
        for start in range(0, len(data), _LAUNCH_CHUNK):
            chunk = data[start : start + _LAUNCH_CHUNK]
            self._channel.call(wire.LAUNCH_UPDATE, wire.LAUNCH.pack(gpa + start) + chunk)

    def create_vcpu(self) -> "Vcpu":
        """Make a vCPU (KVM_CREATE_VCPU).

        Raises:
            OSError: EINVAL for one more than a VM can have.
        """
        _, fds = self._channel.call(wire.CREATE_VCPU)
        return Vcpu(socket.socket(fileno=fds[0].detach()))

    def statistics(self) -> dict[str, Any]:
        """Return the engine's counts: pages, faults, invalidations, exits, times."""
        body, _ = self._channel.call(wire.STATISTICS)
        found: dict[str, Any] = json.loads(body)
        return found

    def close(self) -> None:
        """Let go of the VM."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@final
class Vcpu:
    """A vCPU; one thread at a time runs it."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock, "engine")

    def set_regs(self, *, rip: int, rsp: int = 0, rdi: int = 0, rsi: int = 0) -> None:
        """Set where the guest starts, its stack and its arguments, before the first run (KVM_SET_REGS).

        Raises:
            OSError: EPERM after it: a private guest's registers are its own.
        """
        self._channel.call(wire.SET_REGS, bytes(kvm.kvm_regs(rip=rip, rsp=rsp, rdi=rdi, rsi=rsi)))

    def run(self, value: int = 0) -> exits.Exit:
        """Run the guest until it needs its owner (KVM_RUN); ``value`` is what the exit before asked for, if it asked.

        Raises:
            OSError: ENOTCONN when the engine is gone.
        """
        body, _ = self._channel.call(wire.RUN, wire.COMPLETION.pack(value & (1 << 64) - 1))
        return exits.unpack(body)

    def close(self) -> None:
        """Let go of the vCPU."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
