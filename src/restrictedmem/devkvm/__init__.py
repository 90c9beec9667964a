"""/dev/kvm as typed, owned handles: one class for each kind of descriptor, one method for each ioctl, each error named by its ioctl."""

from restrictedmem.devkvm.guest_memfd import GuestMemfd
from restrictedmem.devkvm.system import Kvm
from restrictedmem.devkvm.vcpu import Vcpu
from restrictedmem.devkvm.vm import Vm, address_of

__all__ = ["GuestMemfd", "Kvm", "Vcpu", "Vm", "address_of"]
