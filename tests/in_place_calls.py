"""The call that converts pages of a guest_memfd."""

from restrictedmem.abi.kvm import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2,
    kvm_memory_attributes2,
)


def set_memory_attributes(fd: int, offset: int, size: int, *, private: bool) -> None:
    """Make bytes of a file private or shared."""
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    KVM_SET_MEMORY_ATTRIBUTES2(
        fd, kvm_memory_attributes2(offset=offset, size=size, attributes=attributes)
    )
