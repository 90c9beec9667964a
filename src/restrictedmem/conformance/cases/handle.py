"""Cases of a descriptor as a handle: flags, copies, names, and calls for any file."""

import fcntl
import os
from errno import EAGAIN, EBADF, EFAULT, EINVAL, ENOTDIR, ENOTTY, ENXIO, EPERM
from typing import Final

from restrictedmem.conformance import calls, handles
from restrictedmem.conformance.case import Case, Since
from restrictedmem.conformance.cases.rows import (
    GMEM_TEST,
    POSTING,
    by_fuse,
    everywhere,
    file,
    private,
    refused,
)
from restrictedmem.conformance.facts import (
    ANON_FILE,
    NO_BLOCK_LAYER,
    OWN_FILE_SYSTEM,
    TMPFS_XATTR,
)
from restrictedmem.conformance.files import SIZE
from restrictedmem.conformance.outcome import Errno

_FCNTL: Final = f"{POSTING}; fcntl(2)"
_OPEN: Final = f"{POSTING}: an anonymous inode has no_open_fops; open(2)"
_COPY: Final = f"{GMEM_TEST}; dup(2), fork(2), unix(7)"
_IOCTL: Final = f"{POSTING}: no ioctl operation; ioctl(2)"
_LARGEFILE: Final = 0o100000
_OPENED: Final = os.O_RDWR | _LARGEFILE

CASES: Final[tuple[Case, ...]] = (
    file(
        "getfl", handles.getfl, {**everywhere(_OPENED), "in-place": _OPENED | os.O_DIRECT}, _FCNTL
    ),
    file(
        "getfd",
        handles.getfd,
        {**everywhere(0), **by_fuse(fcntl.FD_CLOEXEC), "syscall": 0},
        _FCNTL,
        divergence="cloexec",
    ),
    file(
        "set-direct",
        handles.set_direct,
        {**everywhere(Errno(EINVAL)), **by_fuse(0)},
        _FCNTL,
        divergence="o-direct",
    ),
    file("get-seals", handles.seals, refused(EINVAL, memfd=fcntl.F_SEAL_SEAL), _FCNTL),
    file("add-seals", handles.add_seals, refused(EINVAL, memfd=Errno(EPERM)), _FCNTL),
    file(
        "dup",
        handles.duplicate,
        everywhere((True, SIZE)),
        _COPY,
    ),
    file("fork", handles.inherited, everywhere(("0", SIZE)), _COPY),
    file("scm-rights", handles.passed, everywhere((True, SIZE)), _COPY),
    file(
        "name",
        handles.name,
        {
            "proposal": "/restrictedmem (deleted)",
            "memfd": "/memfd:case (deleted)",
            "secret": "/secretmem (deleted)",
            "gmem": Since("/[kvm-gmem] (deleted)", "anon_inode:[kvm-gmem]", OWN_FILE_SYSTEM),
            "in-place": f"/guest_memfd-{SIZE:x}-3 (deleted)",
        },
        f"{POSTING}; proc_pid_fd(5)",
    ),
    file("reopen-read", lambda f: handles.reopen(f, os.O_RDONLY), refused(ENXIO, memfd=0), _OPEN),
    file("reopen-write", lambda f: handles.reopen(f, os.O_RDWR), refused(ENXIO, memfd=0), _OPEN),
    file(
        "reopen-truncate",
        lambda f: handles.reopen(f, os.O_RDWR | os.O_TRUNC),
        refused(ENXIO, memfd=0),
        _OPEN,
    ),
    file(
        "reopen-path",
        lambda f: handles.reopen(f, os.O_PATH),
        {**everywhere(0), "gmem": SIZE},
        "open(2), O_PATH",
    ),
    file(
        "execveat",
        handles.execute,
        {**everywhere("EACCES"), "memfd": "ENOEXEC"},
        f"{POSTING}: SB_I_NOEXEC; execveat(2)",
    ),
    file("fsync", handles.sync, refused(EINVAL, memfd=None), f"{POSTING}; fsync(2)"),
    file("fdatasync", handles.datasync, refused(EINVAL, memfd=None), f"{POSTING}; fsync(2)"),
    file("getdents", handles.getdents, everywhere(Errno(ENOTDIR)), "getdents(2)"),
    file(
        "epoll-add",
        handles.epoll_add,
        {**everywhere(Errno(EPERM)), **by_fuse(0)},
        "epoll_ctl(2)",
        divergence="epoll",
    ),
    file("poll", handles.poll, everywhere(5), "poll(2)"),
    file(
        "ioctl-unknown",
        lambda f: handles.ioctl(f, 0x12345),
        everywhere(Errno(ENOTTY)),
        _IOCTL,
    ),
    file(
        "ioctl-unknown-8-bytes",
        lambda f: handles.unknown_ioctl(f, 8),
        everywhere(Errno(ENOTTY)),
        _IOCTL,
    ),
    file(
        "ioctl-unknown-longest",
        lambda f: handles.unknown_ioctl(f, 2**14 - 1),
        everywhere(Errno(ENOTTY)),
        _IOCTL,
    ),
    file(
        "ioctl-unknown-null",
        lambda f: handles.unknown_ioctl(f, 8, readable=False),
        {**everywhere(Errno(ENOTTY)), **by_fuse(Errno(EFAULT))},
        _IOCTL,
        divergence="ioctl-argument",
    ),
    file(
        "ioctl-fibmap",
        handles.fibmap,
        {
            **private(Since(Errno(ENOTTY), Errno(EINVAL), ANON_FILE)),
            **by_fuse(Since(0, Errno(EINVAL), NO_BLOCK_LAYER)),
            "memfd": Errno(EINVAL),
        },
        "fs/ioctl.c ioctl_fibmap; capabilities(7), CAP_SYS_RAWIO",
        divergence="fibmap",
    ),
    file(
        "ioctl-fibmap-unprivileged",
        handles.fibmap_unprivileged,
        {
            **private(Since("ENOTTY", "EPERM", ANON_FILE)),
            **by_fuse("EPERM"),
            "memfd": "EPERM",
        },
        "fs/ioctl.c ioctl_fibmap; capabilities(7), CAP_SYS_RAWIO",
        divergence="fibmap",
    ),
    file(
        "ioctl-fionread",
        lambda f: handles.ioctl(f, handles.FIONREAD),
        {
            "proposal": Since(Errno(ENOTTY), 0, ANON_FILE),
            **by_fuse(SIZE),
            "memfd": SIZE,
            "secret": Since(Errno(ENOTTY), SIZE, ANON_FILE),
            "gmem": Since(Errno(ENOTTY), SIZE, ANON_FILE),
        },
        "fs/ioctl.c do_vfs_ioctl; ioctl(2)",
        divergence="fionread",
    ),
    file(
        "ioctl-getflags",
        lambda f: handles.ioctl(f, handles.FS_IOC_GETFLAGS),
        {
            **everywhere(Errno(ENOTTY)),
            **by_fuse(Errno(ENXIO)),
            "memfd": Since(0, Errno(ENOTTY), TMPFS_XATTR),
        },
        f"{POSTING}: no fileattr operation; ioctl_iflags(2)",
        divergence="fileattr",
    ),
    file("flock", handles.flock, everywhere(0), "flock(2)"),
    file("flock-inherited", handles.flock_inherited, everywhere("0"), "flock(2)"),
    file("closed-number", handles.closed, everywhere((Errno(EBADF),) * 3), "close(2)"),
    file("record-lock", handles.record_lock, everywhere("EAGAIN"), "fcntl_locking(2)"),
    file(
        "inotify",
        handles.inotify,
        {**everywhere(calls.IN_MODIFY), "gmem": Errno(EAGAIN)},
        "inotify(7)",
    ),
)
