"""The state that a confidential host keeps in step with private memory.

This state is the kernel's direct map and SEV-SNP's RMP. The models here hear what an engine hears:
which pages were mapped into the guest, at which order, and which ranges go. They check the rules of
the hardware. They count what is left behind by each design of the notifications. No hardware is
needed, and none is touched.
"""
