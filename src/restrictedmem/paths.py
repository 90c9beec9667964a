"""Paths that lead through directories where others may write.

A user who may write to a directory can put a symbolic link, a FIFO or a second name of another's
file there, at any moment. So this module walks a path one name at a time, and holds each directory
open. It uses exactly the file that it has looked at.
"""

import os
import stat
from collections.abc import Iterator
from errno import EACCES, EINVAL, EISDIR, ELOOP, EMLINK, ENOENT
from pathlib import Path
from typing import Final, Self, final

from restrictedmem.failure import failed, named
from restrictedmem.fd import OwnedFd
from restrictedmem.users import is_known

_LOOK: Final = os.O_PATH | os.O_CLOEXEC
#: Most links that the kernel follows in one path (MAXSYMLINKS).
_MOST_LINKS: Final = 40
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def _is_trusted(found: os.stat_result, room: os.stat_result) -> bool:
    """Say whether a file in a directory belongs to a user whose actions are no danger.

    Such users are root, the user of this process, and the owner of /. In a user namespace without
    root, root looks like the owner of /. Strangers look the same there (``users``). Then the file
    is trusted only if nobody but such a user may put files into its directory (``room``).
    """
    good = {0, os.geteuid(), os.stat("/").st_uid}
    if found.st_uid not in good:
        return False
    return is_known(found.st_uid) or (room.st_uid in good and not room.st_mode & _OTHERS_WRITE)


def resolve(path: str, *, last: bool) -> tuple[OwnedFd, str, int]:
    """Open the directory of a path's last name (``O_PATH``); follow trusted users' links.

    Returns the directory, which the caller owns, the name, and O_NOFOLLOW. The last is 0 instead
    for a link that the kernel itself made (/proc/self/fd/1). With ``last``, a link at the last name
    is followed. Without it, the last name is whatever stands there.

    Raises:
        OSError: ELOOP for another user's link; EISDIR for a path without a last name; as openat(2).
    """
    proc = _proc()
    names, links = _names(path), 0
    directory = _root(path)
    try:
        while names:
            name = names.pop()
            target, follow = None, os.O_NOFOLLOW
            if names or last:
                target, follow = _link(directory, name, proc)
            if target is not None:
                links += 1
                if links > _MOST_LINKS:
                    raise failed("open", ELOOP)
                names += _names(target)
                before = directory
                directory = _root(target) if target.startswith("/") else directory
            elif names:
                flags = _LOOK | os.O_DIRECTORY | follow
                before = directory
                directory = OwnedFd(os.open(name, flags, dir_fd=before.fileno()))
            else:
                return directory, name, follow
            if before is not directory:
                before.close()
        raise failed("open", EISDIR)
    except OSError as error:
        directory.close()
        raise named("open", error, path) from None


def _proc() -> int:
    """Return the device of /proc; -1, which no file has, where /proc is not mounted."""
    try:
        return os.stat("/proc/self").st_dev
    except FileNotFoundError:
        return -1


def _names(path: str) -> list[str]:
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _root(path: str) -> OwnedFd:
    return OwnedFd(os.open("/" if path.startswith("/") else ".", _LOOK | os.O_DIRECTORY))


def _link(directory: OwnedFd, name: str, proc: int) -> tuple[str | None, int]:
    """Return where a name leads if it is a symbolic link, and a flag to open the name with.

    The flag is O_NOFOLLOW, or 0 for a link that the kernel itself made.
    """
    try:
        fd = OwnedFd(os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=directory.fileno()))
    except FileNotFoundError:
        return None, os.O_NOFOLLOW
    with fd:
        found = os.fstat(fd.fileno())
        if not stat.S_ISLNK(found.st_mode):
            return None, os.O_NOFOLLOW
        if not _is_trusted(found, os.fstat(directory.fileno())):
            words = f"{name} is a symbolic link of uid {found.st_uid}, which is not followed"
            raise failed("open", ELOOP, words)
        if found.st_dev == proc:
            return None, 0
        return os.readlink("", dir_fd=fd.fileno()), os.O_NOFOLLOW


def create(path: str) -> OwnedFd:
    """Open a file for appending, created or emptied; the caller owns it.

    Raises:
        OSError: as ``resolve``; EMLINK for a file that has another name, too; EACCES for another
            user's FIFO or device, and for another user's file in a directory where others may put
            theirs; EAGAIN when a lease keeps another user's file; as open(2).
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    directory, name, follow = resolve(path, last=True)
    with directory:
        try:
            new = flags | os.O_CREAT | os.O_EXCL
            return OwnedFd(os.open(name, new, 0o666, dir_fd=directory.fileno()))
        except FileExistsError:
            pass
        except OSError as error:
            raise named("open", error, path) from None
        try:
            with OwnedFd(os.open(name, _LOOK | follow, dir_fd=directory.fileno())) as there:
                waits = _check_target(os.fstat(there.fileno()), os.fstat(directory.fileno()))
                return _reopen(there, flags | os.O_TRUNC, waits=waits)
        except OSError as error:
            raise named("open", error, path) from None


def _reopen(there: OwnedFd, flags: int, *, waits: bool) -> OwnedFd:
    """Open a file that is held (``O_PATH``) by its inode, as its name may be another's by now.

    If this does not wait (``waits``), an owner's lease (fcntl(2)) is EAGAIN.

    Raises:
        OSError: ENOENT without /proc; as open(2).
    """
    wait = 0 if waits else os.O_NONBLOCK
    try:
        opened = OwnedFd(os.open(f"/proc/self/fd/{there.fileno()}", flags | wait))
    except FileNotFoundError:
        raise failed("open", ENOENT, "/proc is not mounted") from None
    os.set_blocking(opened.fileno(), True)
    return opened


def _check_target(found: os.stat_result, room: os.stat_result) -> bool:
    """Check that the file in a directory may be written; return whether to wait for its owner.

    The kernel itself checks for planted files in sticky directories only with O_CREAT
    (fs.protected_regular).
    """
    trusted = _is_trusted(found, room)
    if stat.S_ISLNK(found.st_mode):
        raise failed("open", ELOOP)
    if not stat.S_ISREG(found.st_mode):
        if not trusted:
            raise failed(
                "open", EACCES, f"not a regular file, and it belongs to uid {found.st_uid}"
            )
    elif found.st_nlink > 1:
        raise failed("open", EMLINK, "the file has another name, too, and is not emptied")
    elif not trusted and room.st_mode & stat.S_ISVTX and room.st_mode & _OTHERS_WRITE:
        words = f"it belongs to uid {found.st_uid}, in a directory where others may create files"
        raise failed("open", EACCES, words)
    return trusted


@final
class NewFile:
    """A file that is written once, from its beginning to its end; every error has its path.

    A write of too few bytes is an error, and so is a failure at close (a quota, a network file
    system).
    """

    def __init__(self, path: str) -> None:
        """Open the file as ``create`` does, with the same errors."""
        self._path = path
        self._fd = create(path)

    def write(self, data: bytes) -> None:
        """Write all of ``data``.

        Raises:
            OSError: as write(2).
        """
        try:
            while data:
                data = data[os.write(self._fd.fileno(), data) :]
        except OSError as error:
            raise named("write", error, self._path) from None

    def close(self) -> None:
        """Close the file; a second call does nothing.

        Raises:
            OSError: as close(2).
        """
        try:
            self._fd.close()
        except OSError as error:
            raise named("close", error, self._path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_regular(path: str, flags: int = os.O_RDONLY) -> OwnedFd:
    """Open a regular file without waiting for anybody; the caller owns it.

    A device is not opened, because that might have an effect.

    Raises:
        OSError: EINVAL for anything but a regular file; EAGAIN for a file with a lease; as open(2).
    """
    try:
        with OwnedFd(os.open(path, _LOOK)) as there:
            if not stat.S_ISREG(os.fstat(there.fileno()).st_mode):
                raise failed("open", EINVAL, "not a regular file")
            return _reopen(there, flags | os.O_CLOEXEC, waits=False)
    except OSError as error:
        raise named("open", error, path) from None


def dangers(directory: OwnedFd) -> Iterator[str]:
    """Yield what lets other users change where a directory's path leads.

    The directory and all directories above it are checked.
    """
    path = Path(os.readlink(f"/proc/self/fd/{directory.fileno()}"))
    for each in (path, *path.parents):
        found = each.stat()
        if not _is_trusted(found, each.parent.stat()):
            yield f"{each} belongs to uid {found.st_uid}"
        elif found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            yield f"others may write to {each}"
