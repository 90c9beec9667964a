"""Rows for a descriptor as a handle: flags, copies, names, and calls for any file."""

import fcntl
import os
from errno import EFAULT, EINVAL, ENOTDIR, ENOTTY, ENXIO, EPERM

import descriptor_handle as handle
from descriptor_operations import PAGE
from descriptor_rows import SAME, refused, row, since
from outcomes import Errno
from restrictedmem.abi import process

#: Whether FIBMAP gets further than its capability, CAP_SYS_RAWIO.
_RAWIO = process.effective_capabilities() >> 17 & 1

DESCRIPTOR = [
    row("F_GETFL", lambda t: fcntl.fcntl(t.fd, fcntl.F_GETFL), 0x8002, all_same=True),
    row(
        "F_GETFD",
        lambda t: fcntl.fcntl(t.fd, fcntl.F_GETFD),
        0,
        key="cloexec",
        here=fcntl.FD_CLOEXEC,
        all_same=True,
    ),
    refused(
        "F_SETFL O_DIRECT",
        lambda t: fcntl.fcntl(t.fd, fcntl.F_SETFL, os.O_DIRECT),
        EINVAL,
        key="o-direct",
        here=0,
    ),
    refused("F_GET_SEALS", handle.seals, EINVAL, memfd=1),
    refused("F_ADD_SEALS", handle.add_seals, EINVAL, memfd=Errno(EPERM)),
    row("dup", handle.duplicate, (True, 4 * PAGE), all_same=True, memfd=SAME),
    row("fork", handle.fork_, ("None", 4 * PAGE), all_same=True, memfd=SAME),
    row("SCM_RIGHTS", handle.pass_on, (True, 4 * PAGE), all_same=True, memfd=SAME),
    row(
        "name",
        handle.name,
        "/restrictedmem (deleted)",
        secret="/secretmem (deleted)",
        gmem=since((7, 3), "/[kvm-gmem] (deleted)", "anon_inode:[kvm-gmem]"),
    ),
    refused("reopen O_RDONLY", handle.reopen(os.O_RDONLY), ENXIO),
    refused("reopen O_RDWR", handle.reopen(os.O_RDWR), ENXIO),
    refused("reopen O_TRUNC", handle.reopen(os.O_RDWR | os.O_TRUNC), ENXIO),
    row("reopen O_PATH", handle.reopen(os.O_PATH), 0, secret=SAME),
    row("execveat", handle.execute, "EACCES", secret=SAME),
    refused("fsync", lambda t: os.fsync(t.fd), EINVAL),
    refused("fdatasync", lambda t: os.fdatasync(t.fd), EINVAL),
    refused("getdents", lambda t: os.listdir(t.fd), ENOTDIR),
    refused("epoll_ctl ADD", handle.epoll_add, EPERM, key="epoll", here=0, memfd=SAME),
    row("poll", handle.poll, 5, all_same=True, memfd=SAME),
    refused("ioctl unknown", handle.ioctl(0x12345), ENOTTY, memfd=SAME),
    refused("ioctl unknown, 8 bytes", handle.ioctl_of(8), ENOTTY, memfd=SAME),
    refused("ioctl unknown, as long as one can be", handle.ioctl_of(2**14 - 1), ENOTTY, memfd=SAME),
    refused(
        "ioctl unknown, at no address",
        handle.ioctl_of(8, 0),
        ENOTTY,
        key="ioctl-argument",
        here=Errno(EFAULT),
        memfd=SAME,
    ),
    row(
        "ioctl FIBMAP",
        handle.ioctl(handle.FIBMAP),
        Errno(EINVAL if _RAWIO else EPERM),
        key="fibmap",
        here=0 if _RAWIO else SAME,
        memfd=SAME,
    ),
    row("ioctl FIONREAD", handle.ioctl(handle.FIONREAD), 0, key="fionread", here=4 * PAGE),
    refused(
        "ioctl FS_IOC_GETFLAGS",
        handle.ioctl(handle.FS_IOC_GETFLAGS),
        ENOTTY,
        key="fileattr",
        here=Errno(ENXIO),
    ),
    row("flock", handle.flock, 0, all_same=True, memfd=SAME),
    row("fcntl lock", handle.record_lock, "EAGAIN", all_same=True, memfd=SAME),
    row("inotify", handle.inotify, handle.IN_MODIFY, memfd=SAME, secret=SAME),
]
