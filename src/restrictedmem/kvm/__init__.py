"""Guests on restricted memory.

Two processes. The owner's has ``vm`` (VM, vCPU, exits as values), ``vmm`` (what ``run`` does with
them), ``recording`` and ``gdb``. The engine's has ``process`` (how it starts), ``machine`` and
``vcpu_socket`` (what is said on its sockets), ``vm_memory``, ``attributes``, ``conversions`` and
``lpage`` (slots, and what their pages are), ``vcpu`` (entering and leaving the guest), ``launch``,
``report``, ``debug`` and ``trace``. ``engine`` is the seam to those who run guest code:
``software``, with ``memslot`` and ``mmu`` as its fault path, and ``kernel``. ``wire`` and ``exits``
are what both processes agree on.
"""
