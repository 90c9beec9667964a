"""A hint fits what failed, and an error that nothing is known of has none."""

from errno import (
    EACCES,
    EAGAIN,
    EFBIG,
    EINVAL,
    EMFILE,
    ENFILE,
    ENODEV,
    ENOENT,
    ENOEXEC,
    ENOMEM,
    ENOSPC,
    ENOSYS,
    ENOTSUP,
    EPERM,
    ESRCH,
)

import pytest

from restrictedmem.cli import hints
from restrictedmem.failure import failed

DOCTOR = "which ways to mount"
FILTER = "a seccomp filter, such as a container's, forbids the call"


@pytest.mark.parametrize(
    ("call", "errno", "detail", "hint"),
    [
        (
            "exec",
            ENOEXEC,
            "linked at 0x400000, and guests are linked from 0x40010000 on",
            "guests/guest.ld",
        ),
        ("exec", ENOEXEC, "it ends at 0x1, and the stacks of 1 vCPUs begin at 0x0", "--memory"),
        ("exec", ENOEXEC, "not a static x86-64 ELF", "docs/use/guests.md"),
        ("start", EACCES, "the service cannot start: /dev/fuse", DOCTOR),
        ("start", EPERM, "mount", DOCTOR),
        ("start", ENODEV, "/dev/fuse", DOCTOR),
        ("start", EPERM, "the service is being traced; strace -f does that", None),
        ("memfd_create", EPERM, "", FILTER),
        ("seccomp", ENOSYS, "", FILTER),
        # ENOSYS, once it has passed FUSE.
        ("memfd_restricted", ENOTSUP, "", FILTER),
        ("SPAWN", EPERM, "pidfd_open", FILTER),
        ("open", EACCES, "", None),
        ("connect", EPERM, "", None),
        ("SIGN", ENOSYS, "signatures need cryptography", "pip install cryptography"),
        ("mmap", ENOMEM, "", "ulimit -v"),
        (
            "LAUNCH_UPDATE",
            ENOMEM,
            "get_page: cannot pin: RLIMIT_MEMLOCK, CAP_IPC_LOCK",
            "ulimit -l",
        ),
        ("socketpair", EMFILE, "", "ulimit -n"),
        ("memfd_restricted", ENFILE, "", "ulimit -Hn"),
        ("exec", EAGAIN, "the supervisor cannot start: fork", "ulimit -u"),
        ("start", EAGAIN, "", "ulimit -u"),
        ("KVM_CREATE_VM", EAGAIN, "fork", "ulimit -u"),
        ("read", EAGAIN, "", None),
        ("memfd_restricted", EFBIG, "", "ulimit -f"),
        ("write", EFBIG, "", "ulimit -f"),
        ("read", EFBIG, "", None),
        ("fallocate", ENOSPC, "", None),
        ("key", EINVAL, "no public key in PEM", None),
    ],
)
def test_a_hint(call: str, errno: int, detail: str, hint: str | None) -> None:
    found = hints.of(failed(call, errno, detail))
    assert hint in found if hint else found == ""


@pytest.mark.parametrize(
    ("errno", "hint"),
    [(ENOENT, "--mount-proc"), (ESRCH, "--mount-proc"), (EMFILE, "ulimit -n"), (EACCES, "")],
)
def test_a_hint_about_proc(errno: int, hint: str) -> None:
    found = hints.of(failed("open", errno, path="/proc"))
    assert hint in found if hint else found == ""
