"""Cases of a descriptor's attributes, and of the calls that set them."""

from errno import EINVAL, ENODATA, EOPNOTSUPP
from typing import Final

from restrictedmem.conformance import handles
from restrictedmem.conformance.case import Case, NotApplicable, Since
from restrictedmem.conformance.cases.rows import GMEM_TEST, POSTING, by_fuse, everywhere, file
from restrictedmem.conformance.facts import OWN_FILE_SYSTEM, TMPFS_XATTR
from restrictedmem.conformance.files import SIZE
from restrictedmem.conformance.outcome import Errno
from restrictedmem.units import PAGE_SIZE

_P: Final = PAGE_SIZE
_STAT: Final = f"{GMEM_TEST} test_file_size; {POSTING} restrictedmem_getattr, as repaired later"
_SET: Final = f"{POSTING} restrictedmem_setattr; guest_memfd: kvm_gmem_setattr"
_NONE: Final = Errno(EOPNOTSUPP)
_FIXED: Final = {"gmem": Errno(EINVAL)}
#: GUEST_MEMFD_MAGIC and ANON_INODE_FS_MAGIC of <linux/magic.h>.
_GMEM_MAGIC, _ANON_MAGIC = 0x474D_454D, 0x0904_1934

CASES: Final[tuple[Case, ...]] = (
    # st_mode, nlink, uid, gid, size, blocks, blksize, rdev.
    file(
        "fstat",
        lambda f: f.fields(),
        {
            **dict.fromkeys(("proposal", "memfd"), ("-rwxrwxrwx", 0, 0, 0, 0, 0, _P, 0)),
            "secret": ("-rw-------", 1, 0, 0, 0, 0, _P, 0),
            "gmem": ("-rw-------", 1, 0, 0, SIZE, 0, _P, 0),
        },
        _STAT,
        ("GM-STAT-1",),
    ),
    file("fstat-fresh-times", lambda f: f.fresh_times(), everywhere(True), "inode(7); fstat(2)"),
    file(
        "fstat-times-after-size",
        lambda f: f.size_moves_times(),
        {**everywhere((True, True, True)), **_FIXED},
        "inode(7); ftruncate(2)",
    ),
    file(
        "fstat-identity",
        lambda f: f.identity(),
        everywhere((True, True, True)),
        f"{GMEM_TEST} test_create_guest_memfd_multiple; inode(7)",
        ("GM-MULTI-3",),
    ),
    file(
        "fstat-after-last-close",
        handles.after_close,
        {
            "proposal": NotApplicable("fstat reads a structure that release has freed"),
            "descriptor": (_P, 0),
            "memfd": (_P, 1),
            "secret": (_P, 0),
            "gmem": (SIZE, 0),
        },
        f"{POSTING} restrictedmem_release, restrictedmem_getattr",
        divergence="path-after-close",
    ),
    file(
        "fstatfs",
        lambda f: f.statfs(),
        {
            "proposal": ("0x5245534d", _P, 255),
            **by_fuse(("0x65735546", _P, 255)),
            "syscall": ("0x5245534d", _P, 255),
            "memfd": ("0x1021994", _P, 255),
            "secret": ("0x5345434d", _P, 255),
            "gmem": Since(
                (f"{_GMEM_MAGIC:#x}", _P, 255), (f"{_ANON_MAGIC:#x}", _P, 255), OWN_FILE_SYSTEM
            ),
        },
        f"{POSTING}: a pseudo file system with magic RESM; <linux/magic.h>",
        divergence="statfs",
    ),
    file("fchmod", lambda f: f.chmod(), {**everywhere("-rw-r-----"), **_FIXED}, _SET),
    file("fchown", lambda f: f.chown(), {**everywhere((0, 0)), **_FIXED}, _SET),
    file(
        "futimens",
        lambda f: f.utimens(),
        {**everywhere((1_000_000_001, 2_000_000_002)), **_FIXED},
        _SET,
    ),
    file(
        "flistxattr",
        lambda f: f.listxattr(),
        {**everywhere(0), **by_fuse(_NONE)},
        "flistxattr(2)",
        divergence="listxattr",
    ),
    file(
        "fsetxattr",
        lambda f: f.setxattr(),
        {**everywhere(_NONE), "memfd": Since(0, _NONE, TMPFS_XATTR)},
        "fsetxattr(2)",
    ),
    file(
        "fgetxattr",
        lambda f: f.getxattr(),
        {**everywhere(_NONE), "memfd": Since(Errno(ENODATA), _NONE, TMPFS_XATTR)},
        "fgetxattr(2)",
    ),
)
