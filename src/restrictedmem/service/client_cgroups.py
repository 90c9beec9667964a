"""A cgroup with a memory limit for each client's uid of ``serve`` (cgroups(7)).

Pages that a guest has from KVM (guest_memfd) count for no process. So they do not count when the
kernel chooses a process to kill for lack of memory. But they are charged to the cgroup of the
process that takes them. At a cgroup's own limit the kernel kills in that cgroup alone.
"""

import fcntl
import os
import re
from contextlib import suppress
from errno import EBUSY, ENODEV, ENOENT
from pathlib import Path
from typing import Final, Self, final

from restrictedmem.failure import failed, named
from restrictedmem.fd import OwnedFd
from restrictedmem.service.cgroup import Cgroup

#: Version 2 only: the cgroup of ``serve`` itself. A cgroup that has processes cannot have children
#: with limits.
_LEAF: Final = "restrictedmem-serve"

#: Most cgroups that stay although their uids have no service any more. The kernel may hold memory
#: for a client, such as answers that it leaves unread. That memory is charged to the client's
#: cgroup only as long as the cgroup exists.
_KEPT: Final = 256


@final
class ClientCgroups:
    """The cgroups of clients' uids, below the cgroup in which this process was started."""

    def __init__(self, limit: int) -> None:
        """Prepare this process's cgroup, and try to make a cgroup of ``limit`` bytes below it.

        Raises:
            OSError: ENOENT, ENODEV without a memory controller; EBUSY when another process is in
                this process's cgroup; EACCES, EROFS and others of files there.
        """
        own = Cgroup.own()
        if own is None:
            raise failed("cgroup", ENOENT, "no hierarchy with the memory controller is mounted")
        self._version = own.version
        self._limit = str(limit)
        self._base = own.directory.parent if own.directory.name == _LEAF else own.directory
        #: Uids whose cgroup has got its limit from this process.
        self._limited: set[int] = set()
        self._lock = self._take()
        try:
            if self._version == 2:
                self._make_room()
            names = (re.fullmatch(r"restrictedmem-(\d+)", name) for name in os.listdir(self._base))
            #: Uids without any service of this process. Their cgroups are to be removed, the first
            #: one first.
            self._ended = dict.fromkeys(int(found[1]) for found in names if found)
            try:
                self.open(0).close()
            finally:
                self.leave(0)
                self._remove_ended(0)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the cgroups that are empty; the next ``serve`` here finds the others."""
        self._remove_ended(0)
        self._lock.close()

    def open(self, uid: int) -> OwnedFd:
        """Return the file cgroup.procs of a uid's cgroup, which is made if it is missing.

        A process that writes 0 to the file is in the cgroup, with all processes that it forks from
        then on.

        Raises:
            OSError: as mkdir(2), open(2) and write(2) there.
        """
        self._ended.pop(uid, None)
        if uid not in self._limited:
            self._make(self._of(uid))
            self._limited.add(uid)
        return _open(self._of(uid) / "cgroup.procs")

    def leave(self, uid: int) -> None:
        """Let the cgroup go of a uid that has no service left.

        The cgroup stays for the uid's next service, unless many other uids come after it.
        """
        self._limited.discard(uid)
        self._ended[uid] = None
        self._remove_ended(_KEPT)

    def _of(self, uid: int) -> Path:
        return self._base / f"restrictedmem-{uid}"

    def _take(self) -> OwnedFd:
        """Lock the directory: another ``serve`` would remove cgroups that were just made."""
        directory = _open(self._base, os.O_RDONLY)
        try:
            fcntl.flock(directory.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            directory.close()
            raise failed(
                "flock", error.errno, "another serve makes cgroups there", str(self._base)
            ) from None
        return directory

    def _make_room(self) -> None:
        """Move this process out of the way, and enable limits on memory below (version 2)."""
        base = self._base
        if "memory" not in (base / "cgroup.controllers").read_text(encoding="ascii").split():
            raise failed("cgroup", ENODEV, "it has no memory controller", str(base))
        others = {*(base / "cgroup.procs").read_text(encoding="ascii").split()} - {str(os.getpid())}
        # The root cgroup, which has no type, may have processes.
        if others and (base / "cgroup.type").exists():
            raise failed(
                "cgroup", EBUSY, f"process {min(others, key=int)} is in it, too", str(base)
            )
        _mkdir(base / _LEAF)
        _write(base / _LEAF / "cgroup.procs", "0")
        _write(base / "cgroup.subtree_control", "+memory")

    def _make(self, group: Path) -> None:
        _mkdir(group)
        if self._version == 2:
            _write(group / "memory.max", self._limit)
            swap, most = group / "memory.swap.max", "0"
        else:
            swap, most = group / "memory.memsw.limit_in_bytes", self._limit
            # The limit with swap may not be below the limit on memory. An earlier ``serve`` may
            # have set it below the new limit.
            if swap.exists():
                _write(swap, "-1")
            _write(group / "memory.limit_in_bytes", self._limit)
        # Without swap, or without its accounting, this file does not exist.
        if swap.exists():
            _write(swap, most)

    def _remove_ended(self, most: int) -> None:
        """Remove cgroups of ended uids until ``most`` are left.

        If the kernel is not done with a cgroup yet, a later call removes it.
        """
        for uid in list(self._ended):
            if len(self._ended) <= most:
                return
            group = self._of(uid)
            if _holds_files(group):
                continue
            try:
                group.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                continue
            del self._ended[uid]


def _holds_files(group: Path) -> bool:
    """Say whether pages of files are charged to a cgroup.

    If the cgroup has no process left, these are pages of a client's own memfd, which an engine has
    filled. In a new cgroup the client could do that again, until this process's own cgroup is full.
    """
    with suppress(OSError):
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        return any(line.startswith("shmem ") and line != "shmem 0" for line in lines)
    return False


def _mkdir(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise named("mkdir", error) from None


def _open(path: Path, flags: int = os.O_WRONLY) -> OwnedFd:
    try:
        return OwnedFd(os.open(path, flags | os.O_CLOEXEC))
    except OSError as error:
        raise named("open", error) from None


def _write(path: Path, text: str) -> None:
    with _open(path) as file:
        try:
            os.write(file.fileno(), text.encode())
        except OSError as error:
            raise named("write", error, str(path)) from None
