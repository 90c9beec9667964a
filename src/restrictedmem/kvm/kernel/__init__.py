"""The kernel engine: it runs guest code on /dev/kvm, with private memory in guest_memfd."""
