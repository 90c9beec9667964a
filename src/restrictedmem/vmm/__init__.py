"""The owner's side of a VM.

``vm`` has the VM and its vCPUs in KVM's words. ``vmm`` is the small VMM of ``restrictedmem run``.
``elf`` loads a guest, ``recording`` and ``perfetto`` handle traces, and ``gdb`` is a stub for a
debugger. The owner's process must not import the engine's code (``restrictedmem.kvm``). The two
share the messages of ``restrictedmem.protocol``.
"""
