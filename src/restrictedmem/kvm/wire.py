"""What an owner says to an engine: KVM's ioctls as messages (docs/wire-protocol.md).

A call's number is the ioctl's request number where KVM, v9 or v10 has one, and its body is the ioctl's struct. Where an ioctl takes an
address of the caller or a restricted descriptor, which mean nothing in another process, a descriptor or a token travels instead.
"""

import ctypes
import json
import struct
from dataclasses import asdict, dataclass
from errno import EINVAL
from typing import Final, Self

from restrictedmem.abi import kvm
from restrictedmem.service.wire import Call

SET_USER_MEMORY_REGION: Final = Call("KVM_SET_USER_MEMORY_REGION", kvm.KVM_SET_USER_MEMORY_REGION_REQUEST)
"""Body: ``kvm_userspace_memory_region_ext``, then 16 bytes: the token of the restricted descriptor, if ``KVM_MEM_PRIVATE``. Descriptor
0, when there is one, is a memfd with the shared half from byte ``userspace_addr`` on."""
CREATE_VCPU: Final = Call("KVM_CREATE_VCPU", kvm.KVM_CREATE_VCPU.request)
"""Reply: descriptor 0 is the vCPU's socket."""
SET_MEMORY_ATTRIBUTES: Final = Call("KVM_SET_MEMORY_ATTRIBUTES", kvm.KVM_SET_MEMORY_ATTRIBUTES.request)
"""v10. Body and reply: ``kvm_memory_attributes``, in the reply advanced to what was not done."""
ENCRYPT_REG_REGION: Final = Call("KVM_MEMORY_ENCRYPT_REG_REGION", kvm.KVM_MEMORY_ENCRYPT_REG_REGION.request)
"""v9: make a range private. Body: ``kvm_enc_region`` with a guest physical address."""
ENCRYPT_UNREG_REGION: Final = Call("KVM_MEMORY_ENCRYPT_UNREG_REGION", kvm.KVM_MEMORY_ENCRYPT_UNREG_REGION.request)
"""v9: make a range shared."""
SET_REGS: Final = Call("KVM_SET_REGS", kvm.KVM_SET_REGS.request)
"""On a vCPU's socket, before the first run: ``kvm_regs``, of which rip, rsp and rdi may be other than 0."""
RUN: Final = Call("KVM_RUN", kvm.KVM_RUN.request)
"""On a vCPU's socket. Body: ``COMPLETION``. Reply: ``exits.LAYOUT``."""

# What KVM has no single ioctl for.
LAUNCH_UPDATE: Final = Call("LAUNCH_UPDATE", 1 << 16 | 1)
"""Before the first run: ``LAUNCH``, then the bytes to put into private memory."""
STATISTICS: Final = Call("STATISTICS", 1 << 16 | 2)
"""Reply: JSON."""

#: The value that the exit before asked for; ignored when it asked for none.
COMPLETION: Final = struct.Struct("=Q")
#: Guest physical address of the bytes that follow.
LAUNCH: Final = struct.Struct("=Q")
TOKEN_OFFSET: Final = ctypes.sizeof(kvm.kvm_userspace_memory_region_ext)

#: Policy bit: registers and private memory are open to the owner. In the measurement, so that it cannot be hidden.
POLICY_DEBUG: Final = 1 << 0
ENGINES: Final = ("auto", "kernel", "software")


@dataclass(frozen=True, slots=True)
class Creation:
    """What an owner decides when it makes a VM (KVM_CREATE_VM): the arguments of SPAWN, as JSON."""

    engine: str = "auto"
    policy: int = 0

    def dump(self) -> str:
        """Return the body of SPAWN after the consumer's name."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        """Read what ``dump`` wrote.

        Raises:
            OSError: EINVAL for an unknown engine or policy, or another shape.
        """
        try:
            found = cls(**json.loads(text or "{}"))
        except (TypeError, ValueError) as error:
            raise OSError(EINVAL, f"KVM_CREATE_VM: {error}") from None
        if found.engine not in ENGINES or type(found.policy) is not int or found.policy & ~POLICY_DEBUG:
            raise OSError(EINVAL, f"KVM_CREATE_VM: engine {found.engine!r}, policy {found.policy!r}")
        return found
