"""Probes of memory: locked, huge and secret memory, and calls that report on pages."""

import ctypes
import mmap
import os
import re
import resource
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from restrictedmem.abi import memory, pagemap, process
from restrictedmem.machine.finding import Finding, State, reason, setting
from restrictedmem.probe import in_child
from restrictedmem.units import PAGE_SIZE, format_size

_THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
_HUGETLB: Final = Path("/sys/kernel/mm/hugepages")
#: The private memory of a guest of ``run`` by default.
_USUAL_SLOT: Final = 64 << 20


def probe() -> Iterator[Finding]:
    """Yield the findings about memory."""
    swapless = no_swap()
    yield lockable(harmless=swapless.state is State.YES)
    yield swapless
    yield transparent_huge_pages()
    yield collapse()
    yield hugetlb()
    yield populate()
    yield cachestat()
    yield memfd_secret()
    yield pagemap_scan()
    yield frame_numbers()


def lockable(*, harmless: bool) -> Finding:
    """Try to lock a slot of the usual size, and report the limit.

    No page of the slot is ever allocated. ``harmless`` says that no swap exists.
    """
    name = "locked memory"
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_MEMLOCK))
    capable = process.effective_capabilities() >> process.CAP_IPC_LOCK & 1
    detail = f"RLIMIT_MEMLOCK {soft}, at most {hard}; {'with' if capable else 'no'} CAP_IPC_LOCK"
    try:
        in_child(_lock_usual_slot)
    except OSError as error:
        effect = (
            "which matters little, as there is no swap" if harmless else "and can be swapped out"
        )
        return Finding(
            name,
            State.PARTLY,
            f"{detail}; a slot of {format_size(_USUAL_SLOT)}: {reason(error)}",
            f"a slot that does not fit the limit stays unlocked, {effect}",
            "sudo prlimit --pid $$ --memlock=unlimited:unlimited (this shell)",
        )
    size = "any size" if capable or soft == "unlimited" else f"up to {soft} in all"
    return Finding(name, State.YES, f"{size}; {detail}")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else format_size(value)


def _lock_usual_slot() -> None:
    # With ONFAULT and an untouched private mapping, the kernel checks the limit but uses no memory.
    mapping = mmap.mmap(-1, _USUAL_SLOT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.mlock_onfault(_address(mapping), _USUAL_SLOT)


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def no_swap() -> Finding:
    """Report whether pages that are not locked can leave the RAM."""
    name = "no swap"
    swaps = setting("/proc/swaps")
    if swaps is None:
        return Finding(name, State.UNKNOWN, "/proc/swaps cannot be read")
    lines = [line.rsplit(maxsplit=4) for line in swaps.split("\n")[1:]]
    zswap = ", zswap on" if setting("/sys/module/zswap/parameters/enabled") == "Y" else ""
    if not lines:
        return Finding(
            name, State.YES, f"/proc/swaps is empty{zswap}: nothing is swapped, locked or not"
        )
    detail = "; ".join(f"{fields[0]} {format_size(int(fields[2]) << 10)}" for fields in lines)
    return Finding(
        name, State.NO, detail + zswap, "unlocked pages can be swapped out", "sudo swapoff -a"
    )


def transparent_huge_pages() -> Finding:
    """Read the policies for huge pages in memfds: the general one, and one for each size."""
    name = "huge pages in memfds"
    general = _chosen(setting(str(_THP / "shmem_enabled")))
    if general is None:
        return Finding(
            name,
            State.NO,
            "no transparent huge pages for shmem",
            "all pages are small",
            "CONFIG_TRANSPARENT_HUGEPAGE",
        )
    sizes = {
        int(path.parent.name.removeprefix("hugepages-").removesuffix("kB")): _chosen(
            setting(str(path))
        )
        for path in _THP.glob("hugepages-*kB/shmem_enabled")
    }
    effective = {size: general if policy == "inherit" else policy for size, policy in sizes.items()}
    on = [
        f"{format_size(size << 10)} {policy}"
        for size, policy in sorted(effective.items())
        # "deny" holds for every size (shmem_allowable_huge_orders).
        if policy != "never" and general != "deny"
    ]
    detail = f"shmem_enabled {general}; " + (
        ", ".join(on)
        if on
        else f"never in each of {len(sizes)} sizes"
        if sizes
        else "no policy for single sizes"
    )
    if general in ("never", "deny") and not on:
        return Finding(
            name,
            State.PARTLY,
            detail,
            "pages are small unless they are collapsed (see MADV_COLLAPSE)",
            f"echo always | sudo tee {_THP}/shmem_enabled",
        )
    return Finding(name, State.YES, detail)


def _chosen(text: str | None) -> str | None:
    """Return the word in brackets."""
    found = re.search(r"\[(\w+)]", text or "")
    return found[1] if found else None


def collapse() -> Finding:
    """Collapse small pages of a memfd into a huge page, and check that it is one."""
    name = "MADV_COLLAPSE"
    size = int(setting(str(_THP / "hpage_pmd_size")) or 0)
    if not size:
        return Finding(
            name,
            State.NO,
            "no transparent huge pages",
            "no huge page on demand",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        )
    try:
        huge = in_child(lambda: _collapse(size))
    except OSError as error:
        return Finding(
            name,
            State.NO,
            reason(error),
            "no huge page on demand",
            "Linux 6.1 or later, or less fragmented free memory",
        )
    seen = {
        None: "not checked, because PAGEMAP_SCAN is missing",
        True: "and seen to be mapped as one",
    }.get(huge, "but not seen to be mapped as one")
    state = State.PARTLY if huge is False else State.YES
    return Finding(name, state, f"{format_size(size)} of a memfd collapsed into one page, {seen}")


def _collapse(size: int) -> bool | None:
    with memory.memfd_create("restrictedmem-doctor") as file:
        os.ftruncate(file.fileno(), size)
        with closing(memory.Mapping(file.fileno(), 0, size, size)) as mapping:
            mapping.madvise(memory.MADV_POPULATE_WRITE, 0, size)
            mapping.madvise(memory.MADV_COLLAPSE, 0, size)
            try:
                return pagemap.bytes_in(pagemap.Category.HUGE, mapping.address, size) == size
            except OSError:
                return None


def hugetlb() -> Finding:
    """Read the pools of reserved huge pages."""
    name = "hugetlb pools"
    # The free pages of each pool, by its line.
    pools: dict[str, int] = {}
    for pool in sorted(_HUGETLB.glob("hugepages-*kB"), key=lambda path: len(path.name)):
        size = int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        total, unused = (
            int(setting(str(pool / f)) or 0) for f in ("nr_hugepages", "free_hugepages")
        )
        pools[f"{format_size(size)}: {unused} free of {total}"] = unused
    if not pools:
        return Finding(
            name,
            State.NO,
            "the kernel has no hugetlb",
            "only transparent huge pages can be compared",
            "a kernel with CONFIG_HUGETLBFS",
        )
    if not any(pools.values()):
        return Finding(
            name,
            State.PARTLY,
            "; ".join(pools),
            "only transparent huge pages can be compared",
            "sudo sysctl vm.nr_hugepages=64 (2 MiB pages)",
        )
    return Finding(name, State.YES, "; ".join(pools))


def populate() -> Finding:
    """Map pages of a memfd without touching them one by one."""
    name = "MADV_POPULATE_WRITE"
    try:
        in_child(_populate)
    except OSError as error:
        return Finding(
            name,
            State.NO,
            reason(error),
            "prefaulting has to touch each page",
            "Linux 5.14 or later",
        )
    return Finding(name, State.YES, "pages of a memfd can be prefaulted")


def _populate() -> None:
    with memory.memfd_create("restrictedmem-doctor") as file:
        os.ftruncate(file.fileno(), PAGE_SIZE)
        mmap.mmap(file.fileno(), PAGE_SIZE).madvise(memory.MADV_POPULATE_WRITE)


def cachestat() -> Finding:
    """Count a memfd's pages without mapping it."""
    name = "cachestat"
    try:
        pages = in_child(allocated_pages)
    except OSError as error:
        return Finding(
            name,
            State.NO,
            reason(error),
            "resident pages are counted from st_blocks",
            "Linux 6.5 or later",
        )
    return Finding(
        name,
        State.YES,
        f"counts {pages} page of a memfd that has 1"
        if pages != 1
        else "counts a memfd's pages without mapping it",
    )


def allocated_pages() -> int:
    """Return how many pages the kernel counts in a memfd with one page (call number 451).

    Raises:
        OSError: ENOSYS where the kernel has no such call.
    """
    with memory.memfd_create("restrictedmem-doctor") as file:
        os.write(file.fileno(), b"\0")
        return memory.resident_pages(file.fileno(), 0, PAGE_SIZE)


def memfd_secret() -> Finding:
    """Create secret memory, without touching a page.

    A touch would split the kernel's direct map, and nothing would put it together again.
    """
    name = "memfd_secret"
    try:
        in_child(lambda: memory.memfd_secret().close())
    except OSError as error:
        return Finding(
            name,
            State.NO,
            reason(error),
            "the direct map's fragmentation cannot be measured",
            "boot with secretmem.enable=1 (Linux 5.14, the default since 6.5), CONFIG_SECRETMEM",
        )
    return Finding(name, State.YES, "can be created; no page of it was touched")


def pagemap_scan() -> Finding:
    """Ask which pages of a mapping are present."""
    name = "PAGEMAP_SCAN"
    try:
        found = in_child(_scan_one_page)
    except OSError as error:
        return Finding(
            name,
            State.NO,
            reason(error),
            "whether a page is huge is not shown",
            "Linux 6.7 or later",
        )
    if found != PAGE_SIZE:
        return Finding(
            name,
            State.PARTLY,
            f"reports {found} bytes of a page that is present",
            "whether a page is huge is not shown",
        )
    return Finding(name, State.YES, "for this user")


def _touched_page() -> tuple[mmap.mmap, int]:
    mapping = mmap.mmap(-1, PAGE_SIZE)
    mapping.write(b"1")
    return mapping, _address(mapping)


def _scan_one_page() -> int:
    _mapping, address = _touched_page()
    return pagemap.bytes_in(pagemap.Category.PRESENT, address, PAGE_SIZE)


def _frame_of_one_page() -> int:
    _mapping, address = _touched_page()
    return pagemap.frame_number(address)


def frame_numbers() -> Finding:
    """Ask for the physical page behind a virtual one."""
    name = "page frame numbers"
    try:
        frame = in_child(_frame_of_one_page)
    except OSError as error:
        detail = reason(error)
    else:
        if frame:
            return Finding(name, State.YES, "/proc/self/pagemap shows them")
        detail = "/proc/self/pagemap shows 0 for them"
    return Finding(
        name,
        State.NO,
        detail,
        "physical contiguity is not measured; nothing else needs frame numbers",
        "run as root (CAP_SYS_ADMIN)",
    )
