"""The ways to make the mount; none leaves a mount point or opens a file on the mount.

Not every way is possible on every machine. ``Way`` lists the ways in the order in which the service
tries them. A process that does nothing else mounts (``mounter``).
"""

import array
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from enum import Enum
from errno import EBUSY, EIO, ENOENT, EPERM
from typing import Final

from restrictedmem.abi import mount, process
from restrictedmem.child import fork
from restrictedmem.fd import OwnedFd, above_standard, receive_with_fds

DEVICE: Final = "/dev/fuse"
_ATTRIBUTES: Final = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC


class Way(Enum):
    """The way in which the mount was made."""

    OWN = "own mount"
    """By fsopen and fsmount with CAP_SYS_ADMIN.

    The mount has ``allow_other``, so a descriptor works for every process that gets it.
    """

    USERNS = "user namespace"
    """By the same calls inside a user namespace.

    A descriptor works only for its owner's uid and gid.
    """

    FUSERMOUNT = "fusermount3"
    """By the set-uid helper of the fuse3 package.

    A descriptor works only for its owner's uid and gid.
    """


def mount_detached(*, allow_other: bool) -> tuple[OwnedFd, OwnedFd]:
    """Mount by descriptors, in this process's namespaces; ``Way.OWN`` or ``Way.USERNS``.

    This function opens /dev/fuse, because it must be opened in the user namespace that the mount
    belongs to. It returns the device and the root of the mount (``O_PATH``). The caller owns both.
    It must hand the root on and keep no copy: a server that holds a file of its own mount cannot be
    killed.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN over the user namespace; EACCES or ENOENT for
            /dev/fuse.
    """
    try:
        device = OwnedFd(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise OSError(error.errno, f"{DEVICE}: {error.strerror}") from None
    try:
        with mount.fsopen("fuse") as context:
            mount.fsconfig(context, "source", "restrictedmem")
            mount.fsconfig(context, "subtype", "restrictedmem")
            mount.fsconfig(context, "fd", str(device.fileno()))
            mount.fsconfig(context, "rootmode", "40000")
            mount.fsconfig(context, "user_id", str(os.getuid()))
            mount.fsconfig(context, "group_id", str(os.getgid()))
            if allow_other:
                mount.fsconfig(context, "allow_other")
            mount.fsconfig_create(context)
            return device, mount.fsmount(context, _ATTRIBUTES)
    except BaseException:
        device.close()
        raise


def mount_fusermount() -> tuple[OwnedFd, OwnedFd]:
    """Mount through fusermount3, and detach the mount at once; ``Way.FUSERMOUNT``.

    It returns what ``mount_detached`` returns. The mount point exists only between two commands, in
    a directory of its own. A separate process (``rmem-unmounter``) removes the directory, even if
    the others are killed meanwhile.

    Raises:
        OSError: ENOENT without the helper; EPERM when it refuses, with its words; EBUSY when the
            directory stays.
    """
    helper = shutil.which("fusermount3")
    if helper is None:
        raise OSError(ENOENT, "fusermount3: not installed (package fuse3)")
    with _mount_point(helper) as (point, hold):
        device = _fusermount(helper, point, hold)
        try:
            return device, OwnedFd(os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except BaseException:
            device.close()
            raise


@contextmanager
def _mount_point(helper: str) -> Generator[tuple[str, int]]:
    """Yield a directory to mount on, and a descriptor for each process that may mount.

    A process of its own unmounts and removes the directory. It does so when every process that has
    the descriptor open has ended or closed it.

    Raises:
        OSError: EBUSY when it could not.
    """
    point = os.path.join(tempfile.gettempdir(), f"restrictedmem-{secrets.token_hex(8)}")
    reader, writer = map(OwnedFd, os.pipe())
    with writer:
        with reader:
            # It outlives this process, if that is killed.
            cleaner = fork(lambda: _clean_up(helper, point, reader.fileno()))
        try:
            os.mkdir(point, 0o700)
            yield point, writer.fileno()
        finally:
            writer.close()
            _, status = os.waitpid(cleaner, 0)
    if status:
        raise OSError(EBUSY, f"{point}: it cannot be unmounted and removed")


def _clean_up(helper: str, point: str, reader: int) -> None:
    # A signal for the others, from a terminal say, is none for this process.
    os.setsid()
    process.set_name("rmem-unmounter")
    process.close_others([reader])
    os.read(reader, 1)
    subprocess.run(
        [helper, "-u", "-z", "--", point],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    with suppress(FileNotFoundError):
        os.rmdir(point)


def _fusermount(helper: str, point: str, hold: int) -> OwnedFd:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, above_standard(theirs.fileno()) as passed:
        theirs.close()
        options = "nosuid,nodev,noexec,fsname=restrictedmem,subtype=restrictedmem"
        done = subprocess.run(
            [helper, "-o", options, "--", point],
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            # It mounts even when this process is killed meanwhile.
            pass_fds=[passed.fileno(), hold],
            env={"_FUSE_COMMFD": str(passed.fileno()), "PATH": os.defpath},
        )
        passed.close()
        if done.returncode:
            raise OSError(EPERM, f"fusermount3: {done.stderr.strip() or 'refused'}")
        _, fds = receive_with_fds(ours, array.array("i").itemsize, 1)
    if not fds:
        raise OSError(EIO, "fusermount3: sent no descriptor")
    return fds[0]
