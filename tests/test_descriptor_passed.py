"""The descriptor, passed to other users: what they may do with it for each way to mount."""

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EACCES, EINVAL, EOVERFLOW, EPERM
from functools import partial

import pytest

from outcomes import Errno, in_child, outcome
from own_server import Mount, mount_for_one_user, serving
from processes import closing
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH, FallocMode, fallocate
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.mounter import mount
from restrictedmem.mm.notifier import Api
from restrictedmem.units import PAGE_SIZE

OWNER, STRANGER = 65534, 65533


@contextmanager
def passed(
    mount: Mount, owner: int | None, creator: int | None = None
) -> Generator[int, None, None]:
    """Yield a sized descriptor on a mount that ``owner`` made (None: root).

    ``creator`` created the descriptor, or else the owner.
    """
    uid = creator if creator is not None else owner
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, serving(Api.V10, mount, owner) as server:

        def create() -> None:
            fd = server.create()
            os.ftruncate(fd, PAGE_SIZE)
            socket.send_fds(theirs, [b"descriptor"], [fd])

        assert in_child(create if uid is None else as_user(uid, create)) == "None"
        _, fds, _, _ = socket.recv_fds(ours, 100, 1)
        with closing(fds) as (fd,):
            yield fd


def as_user(uid: int, body: Callable[[], object]) -> Callable[[], object]:
    def with_uid() -> object:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return body()

    return with_uid


def what_works(fd: int) -> dict[str, object]:
    """Try what a stranger might do with a descriptor."""
    calls: dict[str, Callable[[], object]] = {
        "fstat": lambda: os.fstat(fd).st_size,
        "ftruncate": lambda: os.ftruncate(fd, PAGE_SIZE),
        "fallocate": lambda: fallocate(fd, FallocMode.KEEP_SIZE, 0, PAGE_SIZE),
        "punch": lambda: fallocate(fd, PUNCH, 0, PAGE_SIZE),
        "read": lambda: os.read(fd, 1),
        "fchmod": lambda: os.fchmod(fd, 0o600),
        "fchown": lambda: os.fchown(fd, os.getuid(), -1),
        "futimens": lambda: os.utime(fd, ns=(1, 1)),
        "futimens now": lambda: os.utime(fd),
        "truncate by path": lambda: os.truncate(f"/proc/self/fd/{fd}", PAGE_SIZE),
        "dup": lambda: os.dup(fd) > 0,
    }
    return {name: outcome(call) for name, call in calls.items()}


OWN_MOUNT: dict[str, object] = {
    "fstat": PAGE_SIZE,
    # It is sized already; that is the file's answer, not a refusal of the user.
    "ftruncate": Errno(EPERM),
    "fallocate": None,
    "punch": None,
    "read": Errno(EINVAL),
    "fchmod": Errno(EPERM),
    "fchown": Errno(EPERM),
    "futimens": Errno(EPERM),
    "futimens now": Errno(EPERM),
    "truncate by path": Errno(EPERM),
    "dup": True,
}
OWNER_ALONE: dict[str, object] = {
    "fstat": Errno(EACCES),
    "ftruncate": Errno(EACCES),
    # The stranger's uid has no number in the namespace, so the request cannot even be written.
    "fallocate": Errno(EOVERFLOW),
    "punch": Errno(EOVERFLOW),
    "read": Errno(EOVERFLOW),
    "fchmod": Errno(EACCES),
    "fchown": Errno(EACCES),
    "futimens": Errno(EACCES),
    "futimens now": Errno(EACCES),
    "truncate by path": Errno(EACCES),
    "dup": True,
}


@pytest.mark.requires("fuse", "root")
def test_another_user_on_an_own_mount() -> None:
    with passed(partial(mount, Way.OWN), None) as fd:
        assert in_child(as_user(STRANGER, lambda: what_works(fd))) == repr(OWN_MOUNT)


@pytest.mark.requires("root")
def test_another_user_on_a_file_of_the_proposals_recipe() -> None:
    with memory.memfd_secret() as secret:
        fd = secret.fileno()
        os.ftruncate(fd, PAGE_SIZE)
        found = in_child(
            as_user(
                STRANGER,
                lambda: {
                    name: what_works(fd)[name]
                    for name in ("fstat", "futimens now", "truncate by path")
                },
            )
        )
        assert found == repr(
            {"fstat": PAGE_SIZE, "futimens now": Errno(EACCES), "truncate by path": Errno(EACCES)}
        )


@pytest.mark.requires("fuse", "root")
def test_another_user_on_a_user_namespace_mount() -> None:
    with passed(partial(mount, Way.USERNS), OWNER) as fd:
        assert in_child(as_user(STRANGER, lambda: what_works(fd))) == repr(OWNER_ALONE)
        # Root cannot do more.
        assert in_child(lambda: what_works(fd)) == repr(OWNER_ALONE)
        works = in_child(as_user(OWNER, lambda: what_works(fd)["fallocate"]))
        assert works == repr(None)


# Without a user namespace in between, a stranger's requests are written, and only what looks at
# permissions refuses them.
OWNER_ALONE_IN_INITIAL_NAMESPACE = {
    **OWNER_ALONE,
    "fallocate": None,
    "punch": None,
    "read": Errno(EINVAL),
}


@pytest.mark.requires("fuse", "root")
def test_another_user_on_a_root_mount_for_one_user() -> None:
    with passed(mount_for_one_user(OWNER), None, creator=OWNER) as fd:
        assert in_child(as_user(STRANGER, lambda: what_works(fd))) == repr(
            OWNER_ALONE_IN_INITIAL_NAMESPACE
        )
        assert in_child(lambda: what_works(fd)) == repr(OWNER_ALONE_IN_INITIAL_NAMESPACE)


@pytest.mark.requires("fuse", "root", "fusermount")
def test_another_user_on_a_fusermount_mount() -> None:
    with passed(partial(mount, Way.FUSERMOUNT), OWNER) as fd:
        assert in_child(as_user(STRANGER, lambda: what_works(fd))) == repr(
            OWNER_ALONE_IN_INITIAL_NAMESPACE
        )
