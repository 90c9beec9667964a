"""The requests of an owner to its engine: KVM's ioctls as messages (wire-protocol.md).

A call's number is the ioctl's request number where KVM, v9 or v10 has one, and its body is the
ioctl's struct. Some ioctls take an address of the caller or a restricted descriptor, which mean
nothing in another process. Instead of them, a descriptor or a token is sent. The whole protocol is
described in docs/reference/wire-protocol.md.
"""

import ctypes
import json
import struct
from dataclasses import asdict, dataclass
from errno import EINVAL, EOPNOTSUPP
from typing import Final, NamedTuple, Self, final

from restrictedmem.abi import kvm, kvm_x86
from restrictedmem.abi.stat import Identity
from restrictedmem.fs.owner_abi import TOKEN_BYTES
from restrictedmem.platform import platform
from restrictedmem.service.wire import Call

SET_USER_MEMORY_REGION: Final = Call(
    "KVM_SET_USER_MEMORY_REGION", kvm.KVM_SET_USER_MEMORY_REGION.request
)
"""Body: ``kvm_userspace_memory_region_ext``, then the 16 bytes of the restricted descriptor's token
if ``KVM_MEM_PRIVATE``. Descriptor 0, if there is one, is a memfd with the shared half from byte
``userspace_addr`` on. ``SlotFiles`` may follow the token's place. As in v9 and v10, the number is
that of the ioctl with the shorter ``kvm_userspace_memory_region``."""
CREATE_VM: Final = Call("KVM_CREATE_VM", kvm.KVM_CREATE_VM.request)
"""The first call, or never made. SPAWN has made the VM already; this call reports a failure early.
Reply: the engine's name."""
CREATE_VCPU: Final = Call("KVM_CREATE_VCPU", kvm.KVM_CREATE_VCPU.request)
"""Reply: ``VCPU``; descriptor 0 is the vCPU's socket. vCPUs are numbered from 0 in the order in
which they are made."""
CHECK_EXTENSION: Final = Call("KVM_CHECK_EXTENSION", kvm.KVM_CHECK_EXTENSION.request)
"""Body: ``CAP``, a ``KVM_CAP_*``. Reply: ``CAP``, 0 for no."""
GET_SUPPORTED_MEMORY_ATTRIBUTES: Final = Call(
    "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES", kvm.KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES_REQUEST
)
"""v10. Reply: ``ATTRIBUTES``."""
SET_MEMORY_ATTRIBUTES: Final = Call(
    "KVM_SET_MEMORY_ATTRIBUTES", kvm.KVM_SET_MEMORY_ATTRIBUTES.request
)
"""v10. Body and reply: ``kvm_memory_attributes``; the reply has the part that was not done."""
ENCRYPT_REG_REGION: Final = Call(
    "KVM_MEMORY_ENCRYPT_REG_REGION", kvm.KVM_MEMORY_ENCRYPT_REG_REGION.request
)
"""v9: make a range private. Body: ``kvm_enc_region`` with a guest physical address."""
ENCRYPT_UNREG_REGION: Final = Call(
    "KVM_MEMORY_ENCRYPT_UNREG_REGION", kvm.KVM_MEMORY_ENCRYPT_UNREG_REGION.request
)
"""v9: make a range shared."""
SET_REGS: Final = Call("KVM_SET_REGS", kvm_x86.KVM_SET_REGS.request)
"""On a vCPU's socket, before the first run: ``kvm_regs``, of which only rip, rsp, rdi and rsi may
differ from 0."""
RUN: Final = Call("KVM_RUN", kvm.KVM_RUN.request)
"""On a vCPU's socket. Body: ``COMPLETION``. Reply: ``exits.LAYOUT``."""
PRE_FAULT_MEMORY: Final = Call("KVM_PRE_FAULT_MEMORY", kvm.KVM_PRE_FAULT_MEMORY.request)
"""On a vCPU's socket. Body and reply: ``kvm_pre_fault_memory``; the reply has the part that was not
done."""

# Requests for which KVM has no single ioctl.
LAUNCH_UPDATE: Final = Call("LAUNCH_UPDATE", 1 << 16 | 1)
"""Before the first run. Body: ``LAUNCH``, then whole pages to put into private memory. They extend
the measurement."""
LAUNCH_FINISH: Final = Call("LAUNCH_FINISH", 1 << 16 | 3)
"""Reply: the measurement, 48 bytes. After this call or the first run, LAUNCH_UPDATE, KVM_SET_REGS
and KVM_CREATE_VCPU are EPERM."""
STATISTICS: Final = Call("STATISTICS", 1 << 16 | 2)
"""Reply: JSON."""
INTERRUPT: Final = Call("INTERRUPT", 1 << 16 | 4)
"""Body: ``VCPU``. The KVM_RUN under way, or else the next one, ends with KVM_EXIT_INTR. The reply
comes when the vCPU has left the guest."""
DESTROY_VM: Final = Call("DESTROY_VM", 1 << 16 | 6)
"""Reply: the platform's report (``Platform.report``), JSON. It comes when the vCPUs have left the
guest for good, slots are deleted and files unbound. Every later call, on a vCPU's socket too, is
EBADF."""
TRACE: Final = Call("TRACE", 1 << 16 | 34)
"""Body: ``TRACE_REQUEST``, which says whether events are wanted from now on. If they are,
descriptor 0 of the reply is the socket to read them from."""
INJECT_FAILURE: Final = Call("INJECT_FAILURE", 1 << 16 | 5)
"""For tests. Body: ``FAILURE``. Act as if the machine had lost the private page there: each access
is EHWPOISON until the page is punched."""

# Requests to a VM with ``POLICY_DEBUG``; they are EPERM for any other.
GET_REGS: Final = Call("KVM_GET_REGS", kvm_x86.KVM_GET_REGS.request)
"""On a vCPU's socket. Reply: ``kvm_regs``. SET_REGS then sets all registers, at any time."""
GET_SREGS: Final = Call("KVM_GET_SREGS", kvm_x86.KVM_GET_SREGS.request)
"""On a vCPU's socket. Reply: ``kvm_sregs``, with only selectors, the bases of FS and GS, CR0, CR2,
CR3 and CR4 filled in."""
SET_GUEST_DEBUG: Final = Call("KVM_SET_GUEST_DEBUG", kvm_x86.KVM_SET_GUEST_DEBUG.request)
"""On a vCPU's socket. Body: ``kvm_guest_debug``; with KVM_GUESTDBG_USE_SW_BP, u64 addresses follow,
at which the guest stops as if int3 were there."""
DBG_READ: Final = Call("DBG_READ", 1 << 16 | 32)
"""Body: ``DBG``. Reply: the bytes there, private or shared (SEV: KVM_SEV_DBG_DECRYPT)."""
DBG_WRITE: Final = Call("DBG_WRITE", 1 << 16 | 33)
"""Body: ``DBG``, then the bytes to put there (SEV: KVM_SEV_DBG_ENCRYPT)."""

#: The value that the previous exit asked for; ignored if it asked for none.
COMPLETION: Final = struct.Struct("=Q")
#: The guest physical address of the bytes that follow.
LAUNCH: Final = struct.Struct("=Q")
#: A vCPU's number.
VCPU: Final = struct.Struct("=Q")
CAP: Final = struct.Struct("=Q")
#: ``KVM_MEMORY_ATTRIBUTE_*`` that can be set.
ATTRIBUTES: Final = struct.Struct("=Q")
#: Guest physical address of a page.
FAILURE: Final = struct.Struct("=Q")
#: Guest physical address, and bytes.
DBG: Final = struct.Struct("=QQ")
TRACE_REQUEST: Final = struct.Struct("=Q")
TOKEN_OFFSET: Final = ctypes.sizeof(kvm.kvm_userspace_memory_region_ext)
NAMES_OFFSET: Final = TOKEN_OFFSET + TOKEN_BYTES

_NAMES: Final = struct.Struct("=QQQ")

#: Policy bit: registers and private memory are open to the owner. The measurement includes the
#: policy, so this bit cannot be hidden.
POLICY_DEBUG: Final = 1 << 0
#: Policy bit: pages are converted only when the guest has asked for it, and private memory stays
#: where it was at the launch.
POLICY_EXPLICIT: Final = 1 << 1
ENGINES: Final = ("auto", "kernel", "software")


@final
class SlotFiles(NamedTuple):
    """Names of files that slots show already: device and inode numbers, 0 for none.

    A request that names a file needs no token or descriptor of it.
    """

    restricted: int = 0
    device: int = 0
    memfd: int = 0

    @property
    def shared(self) -> Identity | None:
        """Return the device and inode number of the memfd; None if it is not named."""
        return (self.device, self.memfd) if self.memfd else None

    def pack(self) -> bytes:
        """Return the bytes that follow the token's place."""
        return _NAMES.pack(*self)

    @classmethod
    def of_body(cls, body: bytes) -> Self:
        """Read the names from a request, which may have none."""
        return (
            cls(*_NAMES.unpack_from(body, NAMES_OFFSET))
            if len(body) >= NAMES_OFFSET + _NAMES.size
            else cls()
        )


NO_NAMES: Final = SlotFiles()


@dataclass(frozen=True, slots=True)
class Creation:
    """The owner's choices for a VM (KVM_CREATE_VM): the arguments of SPAWN, as JSON."""

    engine: str = "software"
    policy: int = 0
    #: The model of a host's state (``platform.platform.NAMES``); empty for none.
    platform: str = ""

    def dump(self) -> str:
        """Return the body of SPAWN after the consumer's name."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        """Read the output of ``dump``.

        Raises:
            OSError: EINVAL for an unknown engine, policy or platform, or another shape; EOPNOTSUPP
                for a platform with the kernel engine, which does not tell what it maps.
        """
        try:
            found = cls(**json.loads(text or "{}"))
        except (RecursionError, TypeError, ValueError) as error:
            raise OSError(EINVAL, f"KVM_CREATE_VM: {error}") from None
        if (
            found.engine not in ENGINES
            or type(found.policy) is not int
            or found.policy & ~(POLICY_DEBUG | POLICY_EXPLICIT)
        ):
            raise OSError(
                EINVAL, f"KVM_CREATE_VM: engine {found.engine!r}, policy {found.policy!r}"
            )
        if found.platform not in ("", *platform.NAMES):
            raise OSError(EINVAL, f"KVM_CREATE_VM: platform {found.platform!r}")
        if found.platform and found.engine == "kernel":
            raise OSError(
                EOPNOTSUPP, f"KVM_CREATE_VM: platform {found.platform} needs the software engine"
            )
        return found
