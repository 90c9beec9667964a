"""The owner of a VM.

``vm`` offers the VM and its vCPUs in KVM's words. ``vmm`` is the small VMM of ``restrictedmem
run``, with ``elf`` to load a guest, ``recording`` and ``perfetto`` for traces, and ``gdb`` for a
debugger. The owner's process never imports the engine's (``restrictedmem.kvm``): the two share the
messages of ``restrictedmem.protocol``.
"""
