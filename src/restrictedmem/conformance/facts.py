"""Facts: the differences between versions of Linux, each with its source.

The suite recognises a fact by the kernel's answer, never by the number of a version: vendors carry
changes to older kernels. ``versions`` is a note for the reader.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Fact:
    """One change of the kernel that a program can see."""

    id: str
    says: str
    #: The versions of mainline Linux with the earlier answer.
    versions: str
    source: str
    #: Year of the change, and its month where that is known.
    date: str


OVERLAP_IN_FILE: Final = Fact(
    "overlap-in-file",
    "A slot whose range of a guest_memfd is bound already was EINVAL, and is EEXIST now.",
    "6.8 to 7.1",
    "virt/kvm/guest_memfd.c, kvm_gmem_bind",
    "2026-06",
)

ANON_FILE: Final = Fact(
    "anon-file",
    "Files on anonymous inodes, memfd_secret and guest_memfd among them, took readahead(2) and "
    "FIONREAD as regular files do. readahead is EINVAL now, and FIONREAD is ENOTTY.",
    "up to 6.15, and stable kernels without the backport",
    "19bbfe7b5fcc, fs: add S_ANON_INODE",
    "2025-04",
)
ANON_NOEXEC: Final = Fact(
    "anon-noexec",
    "An executable mapping of a guest_memfd was ENODEV; it is EPERM now, as its file system "
    "forbids execution.",
    "6.8 to 6.15, and stable kernels without the backport",
    "anon_inode: raise SB_I_NODEV and SB_I_NOEXEC (series of 2025-04-07, patch 5 of 9)",
    "2025-04",
)
OWN_FILE_SYSTEM: Final = Fact(
    "gmem-own-file-system",
    "A guest_memfd was an inode of anon_inodefs, named anon_inode:[kvm-gmem]; it is on a file "
    "system of its own now.",
    "6.8 to 6.18",
    "a13cd380ddf6, KVM: guest_memfd: Use guest mem inodes instead of anonymous inodes",
    "2025-10",
)
FLAGS_OFFERED: Final = Fact(
    "gmem-flags",
    "KVM_CREATE_GUEST_MEMFD took no flag; now it takes those of KVM_CAP_GUEST_MEMFD_FLAGS.",
    "6.8 to 6.17",
    "3d3a04fad25a (mmap of guest_memfd), d2042d8f96dd (KVM_CAP_GUEST_MEMFD_FLAGS)",
    "2025-10",
)
FUSE_SPLICE_EMPTY: Final = Fact(
    "fuse-splice-empty",
    "splice from an empty FUSE file asked the server; it is 0 now, as the kernel sees the end.",
    "up to 6.4",
    "2cb1e08985e3, splice: Use filemap_splice_read() instead of generic_file_splice_read()",
    "2023-05",
)
FUSE_SPLICE_ERROR: Final = Fact(
    "fuse-splice-error",
    "splice from a FUSE file returned the server's errno, and returns EIO now.",
    "up to 6.18; EIO was seen on 7.3",
    "runs on 6.1, 6.12, 6.18 and 7.3",
    "2026",
)
LAST_BYTE: Final = Fact(
    "last-byte",
    "fallocate up to byte 2^63 - 2 was done for FUSE and tmpfs, and is EFBIG now.",
    "up to 6.18; EFBIG was seen on 7.3",
    "runs on 6.1, 6.12, 6.18 and 7.3",
    "2026",
)
NO_BLOCK_LAYER: Final = Fact(
    "no-block-layer",
    "A kernel without the block layer answers FIBMAP of a FUSE file with EINVAL, others with 0.",
    "any, without CONFIG_BLOCK; seen on 6.1",
    "<linux/fs.h>, bmap",
    "2020-01",
)
SECRET_UNLOCKED: Final = Fact(
    "secret-unlocked",
    "A mapping of memfd_secret was locked (VmLck), and all of it counted for RLIMIT_MEMLOCK, as "
    "memfd_secret(2) says. On 7.3 it is not locked, and a page counts from its first touch, which "
    "is SIGBUS beyond the limit.",
    "5.14 to 6.18",
    "runs on 6.18 and 7.3.4; mm/secretmem.c secretmem_mmap_prepare, secretmem_fault",
    "2026",
)
TMPFS_XATTR: Final = Fact(
    "tmpfs-xattr",
    "A memfd had no user extended attributes, and without CONFIG_TMPFS_XATTR it has no inode "
    "flags either.",
    "up to 6.5, and any without CONFIG_TMPFS_XATTR",
    "2daf18a7884d, tmpfs,xattr: enable limited user extended attributes",
    "2023-08",
)
SIGNED_OFFSET: Final = Fact(
    "signed-offset",
    "The end of a slot's range in its guest_memfd was computed with a sign, so a range that"
    " overflows was taken; it is EINVAL now.",
    "6.8 to 7.0 or 7.1, and stable kernels without the repair",
    "virt/kvm/guest_memfd.c kvm_gmem_bind, eba85fee7fc6",
    "2026",
)

ENDLESS_PRE_FAULT: Final = Fact(
    "endless-pre-fault",
    "KVM_PRE_FAULT_MEMORY of a slot that is being deleted may retry for ever with page tables that"
    " are obsolete. Only a signal ends it, and the deletion waits as long.",
    "7.3 (seen there), and perhaps earlier ones",
    "runs on 7.3.4; arch/x86/kvm/mmu/mmu.c kvm_tdp_page_prefault, kvm_handle_noslot_fault,"
    " is_page_fault_stale",
    "2026",
)

FACTS: Final = (
    OVERLAP_IN_FILE,
    ANON_FILE,
    ANON_NOEXEC,
    OWN_FILE_SYSTEM,
    FLAGS_OFFERED,
    FUSE_SPLICE_EMPTY,
    FUSE_SPLICE_ERROR,
    LAST_BYTE,
    NO_BLOCK_LAYER,
    SECRET_UNLOCKED,
    TMPFS_XATTR,
    SIGNED_OFFSET,
    ENDLESS_PRE_FAULT,
)
