"""Guests on restricted memory.

Two processes: the owner's VMM drives ``vm`` (VM, vCPU, exits as values); the engine process (``engine``) holds the memory and runs the
guest. Inside the engine, ``memslot`` and ``mmu`` are the fault path that any engine shares, ``vcpu`` is entering and leaving the guest,
``software`` is the engine on Unicorn. ``wire`` is what both processes agree on.
"""
