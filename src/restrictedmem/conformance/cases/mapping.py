"""Cases of a mapping: whether there is one, what a touch does, and calls on its range."""

import mmap
from errno import EACCES, EFAULT, EINVAL, EIO, ENODEV, ENOMEM, EOPNOTSUPP, EPERM
from typing import Final

from restrictedmem.abi.memory import MADV_COLLAPSE, MADV_POPULATE_READ, MADV_POPULATE_WRITE
from restrictedmem.conformance import calls, sequences
from restrictedmem.conformance.case import Case, NotApplicable, Since
from restrictedmem.conformance.cases.rows import (
    GMEM_TEST,
    MM_TEST,
    POSTING,
    by_fuse,
    everywhere,
    file,
    mapped,
    refused,
)
from restrictedmem.conformance.facts import ANON_NOEXEC, SECRET_UNLOCKED
from restrictedmem.conformance.files import SIZE
from restrictedmem.conformance.mappings import (
    HUGE_PAGES,
    PRIVATE,
    SHARED,
    R,
    W,
    X,
    in_child,
    maps,
    on_mapping,
)
from restrictedmem.conformance.outcome import Errno

_MMAP: Final = f"{GMEM_TEST} test_mmap_not_supported, test_mmap_cow; {POSTING}: no mmap; mmap(2)"
_TOUCH: Final = f"{GMEM_TEST} test_mmap_supported, test_fault_sigbus; mmap(2), SIGBUS"
_ADVICE: Final = "madvise(2); a run on Linux 6.18"
_READ: Final = f"{MM_TEST}; a run on Linux 6.18"
_UFFD: Final = "ioctl_userfaultfd(2); a run on Linux 6.18"

#: A shared mapping: guest_memfd has one with GUEST_MEMFD_FLAG_MMAP.
_SHARED: Final = refused(ENODEV, **{"gmem-mapped": 0}, secret=0, memfd=0)
#: A private mapping, which FUSE has for every file (divergence map-private).
_COW: Final = {
    **refused(EINVAL, memfd=0),
    "proposal": Errno(ENODEV),
    "gmem-unmapped": Errno(ENODEV),
    **by_fuse(0),
    "syscall": Errno(ENODEV),
}
_COW_TOUCH: Final = {
    **_COW,
    "descriptor": "SIGBUS",
}
_EXECUTABLE: Final = {
    **refused(EPERM, memfd=0),
    "gmem": Since(Errno(EPERM), Errno(ENODEV), ANON_NOEXEC),
}
_INVALID: Final = Errno(EINVAL)
_LOCKED: Final = (Errno(ENOMEM), _INVALID)


def _by_owner(touched: object, private: object, **others: object) -> dict[str, object]:
    """Return answers of mappings whose pages the owner may touch, and of one where not."""
    return {**mapped(touched), "gmem-private": private, **others}


def _unlocked(now: object, locked: object = _INVALID) -> Since:
    """Return the answer of memfd_secret, whose mappings were locked once."""
    return Since(now, locked, SECRET_UNLOCKED)


def _advice(id: str, advice: int, setting: str = "", **answers: object) -> Case:
    """Write a case of madvise(2): 0, unless an answer says otherwise.

    ``setting`` is a directory of /sys/kernel/mm without which the kernel does not know the advice.
    """
    return file(
        f"madvise-{id}",
        on_mapping(lambda m: m.advised(advice, setting)),
        {**mapped(None), **{name.replace("_", "-"): answer for name, answer in answers.items()}},
        _ADVICE,
    )


def _register(id: str, mode: int, memfd: object) -> Case:
    """Write a case of UFFDIO_REGISTER."""
    return file(
        f"userfaultfd-{id}",
        on_mapping(lambda m: m.userfaultfd(mode)),
        {**mapped(_INVALID), "memfd": memfd},
        _UFFD,
    )


CASES: Final[tuple[Case, ...]] = (
    file("mmap-shared-read", maps(R, SHARED), _SHARED, _MMAP),
    file("mmap-shared", maps(R | W, SHARED), _SHARED, _MMAP, ("GM-NOMMAP-1",)),
    file("mmap-shared-4-pages", maps(R | W, SHARED, SIZE), _SHARED, _MMAP, ("GM-NOMMAP-2",)),
    file("mmap-shared-none", maps(0, SHARED), _SHARED, _MMAP),
    file("mmap-shared-validate", maps(R, calls.MAP_SHARED_VALIDATE), _SHARED, _MMAP),
    file("mmap-private-read", maps(R, PRIVATE), _COW, _MMAP, divergence="map-private"),
    file(
        "mmap-private",
        maps(R | W, PRIVATE, SIZE),
        _COW,
        _MMAP,
        ("GM-COW-1",),
        divergence="map-private",
    ),
    file("mmap-private-none", maps(0, PRIVATE), _COW, _MMAP, divergence="map-private"),
    file("mmap-shared-execute", maps(R | X, SHARED), _EXECUTABLE, _MMAP),
    file("mmap-private-execute", maps(R | X, PRIVATE), _EXECUTABLE, _MMAP),
    file("mmap-nothing", maps(R, SHARED, 0), everywhere(_INVALID), "mmap(2)"),
    file("mmap-unaligned", maps(R, SHARED, offset=1), everywhere(_INVALID), "mmap(2)"),
    file("mmap-past-end", maps(R, SHARED, offset=1 << 30), _SHARED, _MMAP),
    file("mmap-huge", maps(R, SHARED | calls.MAP_HUGETLB), everywhere(_INVALID), "mmap(2)"),
    file(
        "mmap-private-huge", maps(R, PRIVATE | calls.MAP_HUGETLB), everywhere(_INVALID), "mmap(2)"
    ),
    file("mmap-neither", maps(R, 0), everywhere(_INVALID), "mmap(2)"),
    file(
        "touch-read",
        in_child(lambda m: m.load()),
        {
            **_SHARED,
            **_by_owner("0", "SIGBUS"),
            "proposal": Errno(ENODEV),
            "gmem-unmapped": Errno(ENODEV),
        },
        _TOUCH,
    ),
    file(
        "touch-write",
        in_child(lambda m: m.store(1)),
        {**_by_owner("1", "SIGBUS"), "proposal": Errno(ENODEV), "gmem-unmapped": Errno(ENODEV)},
        _TOUCH,
    ),
    file(
        "touch-private-read",
        in_child(lambda m: m.load(), R, PRIVATE),
        {**_COW_TOUCH, "memfd": "0", "in-place": "0"},
        _MMAP,
        divergence="map-private",
    ),
    file(
        "touch-private-write",
        in_child(lambda m: m.store(1), R | W, PRIVATE),
        {**_COW_TOUCH, "memfd": "1", "in-place": "1"},
        _MMAP,
        divergence="map-private",
    ),
    file(
        "touch-past-end",
        in_child(lambda m: m.store(1, SIZE), length=2 * SIZE),
        mapped("SIGBUS"),
        _TOUCH,
    ),
    file(
        "touch-at-size-0",
        sequences.touched_at_size_0,
        {
            **mapped("SIGBUS"),
            "gmem": NotApplicable("it has its size from creation"),
            "gmem-mapped": NotApplicable("it has its size from creation"),
        },
        "mmap(2), SIGBUS; memfd_secret(2)",
    ),
    file(
        "touch-filled-and-punched",
        sequences.fill_and_punch,
        {
            "memfd": ("0xaa", "0x00", "0xaa", "0xaa"),
            "gmem-shared": ("0xaa", "0x00", "0xaa", "0xaa"),
            "gmem-private": NotApplicable("its owner cannot touch it"),
            "gmem-unmapped": NotApplicable("it cannot be mapped"),
            "secret": NotApplicable("it cannot be punched"),
            "proposal": NotApplicable("it cannot be mapped"),
        },
        f"{GMEM_TEST} test_mmap_supported",
        tuple(f"GM-MMAP-{number}" for number in range(1, 6)),
    ),
    file(
        "touch-over-end",
        sequences.over_end,
        _by_owner(("SIGBUS", "SIGBUS", "0xaa"), ("SIGBUS", "SIGBUS", "SIGBUS")),
        f"{GMEM_TEST} test_fault_overflow, test_fault_private",
        ("GM-OVER-1", "GM-OVER-2", "GM-OVER-3", "GM-OVER-4", "GM-PRIV-1"),
    ),
    file(
        "collapse-2-mib",
        sequences.collapse,
        {
            "gmem-shared": ("0x00", _INVALID, None, 0),
            "gmem-private": NotApplicable("its owner cannot touch it"),
            "gmem-unmapped": NotApplicable("it cannot be mapped"),
            "secret": _unlocked(("0x00", _INVALID, None, 0), ("0x00", _INVALID, _INVALID, 0)),
            "memfd": NotApplicable("settings of the kernel decide whether it can be collapsed"),
            "proposal": NotApplicable("it cannot be mapped"),
        },
        f"{GMEM_TEST} test_collapse",
        tuple(f"GM-COLL-{number}" for number in range(1, 7)),
    ),
    file(
        "mincore",
        sequences.allocated_or_touched,
        {
            "memfd": ("0000", "1000"),
            "gmem-shared": ("0000", "1000"),
            "in-place": ("0000", "1111"),
            "gmem-private": ("0000", "0000"),
            "gmem-unmapped": NotApplicable("it cannot be mapped"),
            "secret": NotApplicable("it cannot be allocated without a touch"),
            "proposal": NotApplicable("it cannot be mapped"),
        },
        "mincore(2); a run on Linux 6.18",
    ),
    file(
        "mlock",
        on_mapping(lambda m: m.mlock()),
        _by_owner(None, Errno(ENOMEM), secret=Errno(ENOMEM)),
        "mlock(2); a run on Linux 6.18",
    ),
    file(
        "mlock-then-dontneed",
        on_mapping(sequences.dropped_after_mlock),
        _by_owner((None, _INVALID), _LOCKED, secret=_unlocked((Errno(ENOMEM), None), _LOCKED)),
        "mlock(2), madvise(2): VM_LOCKED stays set; a run on Linux 6.18",
    ),
    file(
        "mlock-limit",
        sequences.locked_limit,
        {**mapped("0, 0"), "secret": _unlocked("0, 0", "0, EAGAIN")},
        f"{MM_TEST} test_mlock_limit; memfd_secret(2), RLIMIT_MEMLOCK",
        ("SEC-1", "SEC-2"),
    ),
    file(
        "mlock-limit-touched",
        sequences.touched_over_locked_limit,
        _by_owner("0xaa", "SIGBUS", secret=_unlocked("SIGBUS", "EAGAIN")),
        "memfd_secret(2), RLIMIT_MEMLOCK; mm/secretmem.c secretmem_fault; runs on Linux 6.18, 7.3",
    ),
    _advice("populate-read", MADV_POPULATE_READ, secret=_INVALID, gmem_private=Errno(EFAULT)),
    _advice("populate-write", MADV_POPULATE_WRITE, secret=_INVALID, gmem_private=Errno(EFAULT)),
    _advice("dontneed", mmap.MADV_DONTNEED, secret=_unlocked(None)),
    _advice("remove", mmap.MADV_REMOVE, secret=_unlocked(Errno(EOPNOTSUPP))),
    _advice("hugepage", mmap.MADV_HUGEPAGE, HUGE_PAGES),
    _advice("mergeable", mmap.MADV_MERGEABLE, "ksm"),
    _advice("dontfork", mmap.MADV_DONTFORK),
    _advice("dontdump", mmap.MADV_DONTDUMP),
    _advice("cold", calls.MADV_COLD, secret=_unlocked(None)),
    _advice("pageout", calls.MADV_PAGEOUT, secret=_unlocked(None)),
    _advice("free", mmap.MADV_FREE, secret=_INVALID, gmem_mapped=_INVALID, memfd=_INVALID),
    _advice(
        "wipeonfork", calls.MADV_WIPEONFORK, secret=_INVALID, gmem_mapped=_INVALID, memfd=_INVALID
    ),
    _advice("collapse", MADV_COLLAPSE, secret=_INVALID, gmem_mapped=_INVALID, memfd=_INVALID),
    file(
        "dontneed-keeps-content",
        on_mapping(sequences.kept_after_dontneed),
        {
            **mapped(sequences.FILLED),
            "secret": _unlocked(sequences.FILLED),
            "gmem-private": NotApplicable("its owner cannot touch it"),
        },
        _ADVICE,
    ),
    file(
        "remove-drops-content",
        on_mapping(sequences.gone_after_remove),
        {
            **mapped(0),
            "secret": _unlocked(Errno(EOPNOTSUPP)),
            "gmem-private": NotApplicable("its owner cannot touch it"),
        },
        _ADVICE,
    ),
    file(
        "mprotect-execute",
        on_mapping(lambda m: m.mprotect(R | X)),
        {**mapped(Errno(EACCES)), "memfd": None},
        "mprotect(2); a run on Linux 6.18",
    ),
    file(
        "msync",
        on_mapping(lambda m: m.msync()),
        {**mapped(_INVALID), "memfd": None},
        "msync(2); a run on Linux 6.18",
    ),
    file(
        "proc-self-mem-read",
        on_mapping(lambda m: m.own_memory()),
        _by_owner(1, Errno(EIO), secret=Errno(EIO)),
        "proc_pid_mem(5); a run on Linux 6.18",
    ),
    file(
        "proc-self-mem-write",
        on_mapping(lambda m: m.own_memory(write=True)),
        _by_owner(1, Errno(EIO), secret=Errno(EIO)),
        "proc_pid_mem(5); a run on Linux 6.18",
    ),
    file(
        "process-vm-readv-own",
        on_mapping(lambda m: m.process_vm_readv()),
        _by_owner(8, Errno(EFAULT), secret=Errno(EFAULT)),
        _READ,
    ),
    file(
        "process-vm-readv-by-child",
        on_mapping(sequences.read_by_child),
        {
            **mapped("8"),
            "secret": "EFAULT",
            "gmem-private": NotApplicable("its owner cannot touch it"),
        },
        f"{MM_TEST} test_process_vm_read",
        ("SEC-5",),
    ),
    file(
        "ptrace-by-child",
        on_mapping(sequences.peeked_by_child),
        {
            **mapped("0"),
            "secret": "EIO",
            "gmem-private": NotApplicable("its owner cannot touch it"),
        },
        f"{MM_TEST} test_ptrace; ptrace(2)",
        ("SEC-6",),
    ),
    file(
        "write-from-mapping",
        on_mapping(lambda m: m.write_from()),
        _by_owner(8, Errno(EFAULT)),
        "write(2); a run on Linux 6.18",
    ),
    file(
        "read-into-mapping",
        on_mapping(lambda m: m.read_into()),
        _by_owner(8, Errno(EFAULT)),
        "read(2); a run on Linux 6.18",
    ),
    file(
        "vmsplice",
        on_mapping(sequences.spliced),
        {**_by_owner(4096, Errno(EFAULT)), "secret": Errno(EFAULT)},
        f"{MM_TEST} test_vmsplice; vmsplice(2)",
        ("SEC-4",),
    ),
    file(
        "vmsplice-then-punch",
        sequences.punched_in_pipe,
        {
            "memfd": (0, sequences.FILLED),
            "gmem-shared": (0, sequences.FILLED),
            "gmem-private": NotApplicable("its owner cannot touch it"),
            "gmem-unmapped": NotApplicable("it cannot be mapped"),
            "secret": NotApplicable("it cannot be punched"),
            "proposal": NotApplicable("it cannot be mapped"),
        },
        "vmsplice(2); a run on Linux 6.18",
    ),
    _register("missing", 1, 0),
    _register("write-protect", 2, 0),
    _register("minor", 4, 0),
)
