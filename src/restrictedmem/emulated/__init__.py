"""Other Linux kernels, which QEMU emulates on this machine without KVM."""
