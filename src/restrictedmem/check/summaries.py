"""Calls of production that a world's actors forget once they have returned.

``control.summarized`` says how. Each call keeps nothing except data that ``World.state`` shows, and
its result or its exception.
"""

from collections.abc import Iterator
from typing import Final

from restrictedmem.check.control import Method
from restrictedmem.check.frames import Frames
from restrictedmem.check.guest_cpu import GuestCpu
from restrictedmem.check.world import Host, SlotNotifier, World
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.mm.design import Design, FolioPoc
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.remembering import Batched, Lazy, _Remembering
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.mm.sequence import InvalidationSequence

_CALLS: Final[dict[type, str]] = {
    InvalidationSequence: "begin end busy_over retry",
    Mmu: "fault invalidate_start invalidate_end expect_end set_attributes wait_settled wake "
    "_told _map_private _zap",
    Pages: "get_pages get_page count invalidate_start invalidate_end forget get_page_noalloc "
    "put_page _refuse_invalidated",
    EngineVcpus: "drop",
    EngineVcpu: "send_out _enter _leave interrupt _goes_on hold release",
    SoftwareVm: "set_attributes invalidate_start invalidate_end error page_count remove_slot "
    "add_slot",
    Memslot: "install install_large split remove leaf has_code",
    RestrictedFile: "fallocate _fallocate put get unregister_notifier register_notifier error_page "
    "_remove _register _set_registrations",
    Design: "punch allocate leave invalidate_all",
    FolioPoc: "_tell",
    _Remembering: "allocate",
    Batched: "punch",
    Lazy: "punch leave _goes",
    SlotNotifier: "invalidate_start invalidate_end error page_count",
    Host: "prepare invalidate freed",
    Frames: "allocate punch order_of",
    GuestCpu: "run _access _fill kick",
    World: "punch fallocate convert error close",
}


def calls() -> Iterator[Method]:
    """Yield each class with the name of one of its methods."""
    for kind, names in _CALLS.items():
        for name in names.split():
            yield kind, name
