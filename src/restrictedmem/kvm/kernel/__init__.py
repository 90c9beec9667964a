"""The kernel engine: guest code on /dev/kvm, private memory in guest_memfd."""
