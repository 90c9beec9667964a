"""Paths that lead through directories where others may write.

Whoever may write to a directory can put a symbolic link, a FIFO or a second name of a foreign file
there, at any moment. So a path is walked one name at a time, each in a directory that is held open,
and what was looked at is what is used.
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
#: As many as the kernel follows (MAXSYMLINKS).
_MOST_LINKS: Final = 40
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def _is_trusted(found: os.stat_result, room: os.stat_result) -> bool:
    """Say whether what stands in a directory is of a user whose doings are no danger.

    That is root, this process, and the owner of /, which is what root looks like from a user
    namespace that has none. Strangers look the same there (``users``): then a thing counts where
    nobody but such an owner may put one.
    """
    good = {0, os.geteuid(), os.stat("/").st_uid}
    if found.st_uid not in good:
        return False
    return is_known(found.st_uid) or (room.st_uid in good and not room.st_mode & _OTHERS_WRITE)


def resolve(path: str, *, last: bool) -> tuple[OwnedFd, str, int]:
    """Open the directory of a path's last name (``O_PATH``); only links of trusted users count.

    Returns the directory, which the caller owns, the name, and O_NOFOLLOW; or 0 in its place for a
    link that the kernel itself made (/proc/self/fd/1). The last name is followed with ``last``,
    else it is whatever stands there.

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
    """Return the device of /proc; -1, which no file has, where none is mounted."""
    try:
        return os.stat("/proc/self").st_dev
    except FileNotFoundError:
        return -1


def _names(path: str) -> list[str]:
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _root(path: str) -> OwnedFd:
    return OwnedFd(os.open("/" if path.startswith("/") else ".", _LOOK | os.O_DIRECTORY))


def _link(directory: OwnedFd, name: str, proc: int) -> tuple[str | None, int]:
    """Return where a name leads if it is a symbolic link; O_NOFOLLOW unless it is the kernel's."""
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
    """Open a file to write to its end, made anew or emptied; the caller owns it.

    Raises:
        OSError: as ``resolve``; EMLINK for a file that has another name, too; EACCES for another
            user's FIFO or device, and for its file where all may put theirs; EAGAIN when a lease
            keeps another's file; as open(2).
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
    """Open a file that is held (``O_PATH``), by its inode: another may have the name by now.

    Unless this ``waits``, an owner's lease (fcntl(2)) is EAGAIN.

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
    """Check that what stands in a directory may be written; returns whether to wait for its owner.

    Other than with O_CREAT, the kernel takes no file in a sticky directory for planted
    (fs.protected_regular).
    """
    trusted = _is_trusted(found, room)
    if stat.S_ISLNK(found.st_mode):
        raise failed("open", ELOOP)
    if not stat.S_ISREG(found.st_mode):
        if not trusted:
            raise failed("open", EACCES, f"not a file, and uid {found.st_uid}'s")
    elif found.st_nlink > 1:
        raise failed("open", EMLINK, "the file has another name, too, and is not emptied")
    elif not trusted and room.st_mode & stat.S_ISVTX and room.st_mode & _OTHERS_WRITE:
        words = f"uid {found.st_uid}'s file, where others may put theirs"
        raise failed("open", EACCES, words)
    return trusted


@final
class NewFile:
    """A file that is written once, from its beginning to its end; every error has its path.

    What writes too little, or fails at close (a quota, a network's file system), is an error.
    """

    def __init__(self, path: str) -> None:
        """Open it as ``create`` does, which raises what this raises."""
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
        """Close it; a second call does nothing.

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
    """Open a file whose opening does nothing to a device and waits for nobody; the caller owns it.

    Raises:
        OSError: EINVAL for anything but a regular file; EAGAIN for one with a lease; as open(2).
    """
    try:
        with OwnedFd(os.open(path, _LOOK)) as there:
            if not stat.S_ISREG(os.fstat(there.fileno()).st_mode):
                raise failed("open", EINVAL, "not a file")
            return _reopen(there, flags | os.O_CLOEXEC, waits=False)
    except OSError as error:
        raise named("open", error, path) from None


def dangers(directory: OwnedFd) -> Iterator[str]:
    """Say of a directory and those above it what lets other users change where its path leads."""
    path = Path(os.readlink(f"/proc/self/fd/{directory.fileno()}"))
    for each in (path, *path.parents):
        found = each.stat()
        if not _is_trusted(found, each.parent.stat()):
            yield f"{each} is uid {found.st_uid}'s"
        elif found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            yield f"others may write to {each}"
