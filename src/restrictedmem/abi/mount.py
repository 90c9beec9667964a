"""The mount API by descriptors, without mount points: fsopen(2), fsconfig(2), fsmount(2)."""

import os
from typing import Final

from restrictedmem.abi._syscall import syscall
from restrictedmem.fd import OwnedFd

SYS_fsopen: Final = 430
SYS_fsconfig: Final = 431
SYS_fsmount: Final = 432

FSOPEN_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
FSMOUNT_CLOEXEC: Final = 1

MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8


def fsopen(name: str) -> OwnedFd:
    """Open a configuration context for a file system type; the caller owns it.

    Raises:
        OSError: ENODEV for an unknown type, EPERM without CAP_SYS_ADMIN over the mount namespace.
    """
    return OwnedFd(syscall("fsopen", SYS_fsopen, name.encode(), FSOPEN_CLOEXEC))


def fsconfig(context: OwnedFd, key: str, value: str | None = None) -> None:
    """Set one option of a context: a flag, or a string when ``value`` is given.

    Raises:
        OSError: EINVAL, with the kernel's message if it left one in the context.
    """
    command = FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING
    text = None if value is None else value.encode()
    _configure(context, command, key.encode(), text)


def fsconfig_create(context: OwnedFd) -> None:
    """Create the superblock of a context."""
    _configure(context, FSCONFIG_CMD_CREATE, None, None)


def fsmount(context: OwnedFd, attributes: int) -> OwnedFd:
    """Make a mount that is attached nowhere, and return a descriptor of its root.

    The caller owns the descriptor. The mount lives as long as descriptors on it.
    """
    return OwnedFd(syscall("fsmount", SYS_fsmount, context.fileno(), FSMOUNT_CLOEXEC, attributes))


def _configure(context: OwnedFd, command: int, key: bytes | None, value: bytes | None) -> None:
    try:
        syscall("fsconfig", SYS_fsconfig, context.fileno(), command, key, value, 0)
    except OSError as error:
        try:
            said = os.read(context.fileno(), 1024).decode(errors="replace").strip()
        except OSError:
            raise error from None
        raise OSError(error.errno, f"{error.strerror} ({said})") from None
