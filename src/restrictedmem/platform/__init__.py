"""What a confidential host keeps in step with private memory: its direct map, and SEV-SNP's RMP.

Reference consumers that hear what an engine hears: which pages were mapped into the guest, at which
order, and which ranges go. They check the rules of hardware and count what each design of the
notifications leaves behind. No hardware is needed, and none is touched.
"""
