"""A cgroup with a limit on memory for each client's uid of ``serve`` (cgroups(7)).

Pages that a guest has from KVM (guest_memfd) count for no process, and so not in the kernel's
choice of whom to kill when memory runs out. But they are charged to the cgroup of who takes them.
At a cgroup's own limit the kernel kills in that cgroup alone.
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

#: Of version 2: where ``serve`` itself is, for a cgroup that has processes has no children with
#: limits.
_LEAF: Final = "restrictedmem-serve"

#: How many cgroups stay whose uids have no service any more. What the kernel holds for a client,
#: answers that it leaves unread for one, is charged to its cgroup alone as long as that is there.
_KEPT: Final = 256


@final
class ClientCgroups:
    """Makes and removes the cgroups of clients' uids, below that in which this process was started."""

    def __init__(self, limit: int) -> None:
        """Prepare this process's cgroup, and try to make one of ``limit`` bytes below it.

        Raises:
            OSError: ENOENT, ENODEV without a memory controller; EBUSY when another process is in
                the way; EACCES, EROFS and others of files there.
        """
        own = Cgroup.own()
        if own is None:
            raise failed("cgroup", ENOENT, "no hierarchy with the memory controller is mounted")
        self._version = own.version
        self._limit = str(limit)
        self._base = own.directory.parent if own.directory.name == _LEAF else own.directory
        #: Uids whose cgroup has its limit from this process.
        self._limited: set[int] = set()
        self._lock = self._take()
        try:
            if self._version == 2:
                self._make_room()
            names = (re.fullmatch(r"restrictedmem-(\d+)", name) for name in os.listdir(self._base))
            #: Uids none of whose services, by this process, is left: their cgroups are to go, the
            #: first one first.
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
        """Remove those that are empty; what else there is, the next ``serve`` here finds."""
        self._remove_ended(0)
        self._lock.close()

    def open(self, uid: int) -> OwnedFd:
        """Return a uid's cgroup.procs: a process that writes 0 there is in it, with all that it forks from then on.

        Raises:
            OSError: as mkdir(2), open(2) and write(2) there.
        """
        self._ended.pop(uid, None)
        if uid not in self._limited:
            self._make(self._of(uid))
            self._limited.add(uid)
        return _open(self._of(uid) / "cgroup.procs")

    def leave(self, uid: int) -> None:
        """Let a uid's cgroup go, of whose services none is left; it is there for the next one, unless many others came after it."""
        self._limited.discard(uid)
        self._ended[uid] = None
        self._remove_ended(_KEPT)

    def _of(self, uid: int) -> Path:
        return self._base / f"restrictedmem-{uid}"

    def _take(self) -> OwnedFd:
        """Keep others from this: what one has just made, another would remove."""
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
        """Go out of the way of version 2, and have limits on memory below."""
        base = self._base
        if "memory" not in (base / "cgroup.controllers").read_text(encoding="ascii").split():
            raise failed("cgroup", ENODEV, "it has no memory controller", str(base))
        others = {*(base / "cgroup.procs").read_text(encoding="ascii").split()} - {str(os.getpid())}
        # The root, which has no type, may have processes.
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
            # It may not be less than the other, which an earlier ``serve`` may have set lower.
            if swap.exists():
                _write(swap, "-1")
            _write(group / "memory.limit_in_bytes", self._limit)
        # Without swap, or its accounting, there is no such file.
        if swap.exists():
            _write(swap, most)

    def _remove_ended(self, most: int) -> None:
        """Remove cgroups that are to go until ``most`` are left; another call does when the kernel is not done with one yet."""
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

    With no process left they are a memfd's of the client's own, which an engine has filled. In a
    new cgroup the client could do that again, until this process's own is full.
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
