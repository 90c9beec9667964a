"""The engine process, which runs the guest of one VM.

``engine_process`` starts it. ``machine`` and ``vcpu_socket`` answer the owner's requests, whose
format is in ``restrictedmem.protocol``. ``vm_memory``, ``attributes``, ``conversions`` and
``lpage`` keep slots and what their pages are. ``engine_vcpu`` enters and leaves the guest.
``launch``, ``report_hypercall`` and ``debug_requests`` are what their names say.

``engine`` is the interface of the two engines: ``software``, with ``memslot`` and ``mmu`` as its
fault path, and ``kernel``.
"""
