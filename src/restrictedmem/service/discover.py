"""Finding the services of this machine: each listens on an abstract socket that says its pid."""

import os
import re
import socket
from collections.abc import Generator
from contextlib import contextmanager
from errno import ESRCH
from typing import Any

from restrictedmem.fd import peer_credentials
from restrictedmem.service import door, wire
from restrictedmem.service.client import read_status
from restrictedmem.service.wire import Channel

#: Seconds to wait for a service's answer.
_PATIENCE = 2.0


def pids() -> list[int]:
    """Return the pids that name themselves services, of any user."""
    return sorted(_names())


def _names() -> dict[int, str]:
    """Return the sockets that are named as a service's, by pid (/proc/net/unix)."""
    pattern = re.compile(r"@(" + door.NAME.format(pid=r"(\d+)", word=r"[0-9a-f]+") + r")$")
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        return {int(found[2]): found[1] for line in table if (found := pattern.search(line.rstrip()))}


def status_of(pid: int) -> dict[str, Any]:
    """Ask one service for its state.

    Raises:
        OSError: ECONNREFUSED when it is gone; EACCES when it is another user's; ESRCH when the name is somebody else's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_PATIENCE)
        name = _names().get(pid, "")
        with _as_user(_uid_of(pid)):
            sock.connect("\0" + name)
        peer, uid, _ = peer_credentials(sock)
        if peer != pid:
            raise OSError(ESRCH, f"the name of service {pid} is held by process {peer}")
        _, fds = Channel(sock, f"service {pid}", takes_fds=True).call(wire.STATUS)
        return {**read_status(fds[0]), "uid": uid}


def _uid_of(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("Uid:")).split()[2])


@contextmanager
def _as_user(uid: int) -> Generator[None, None, None]:
    """Connect as another user, which root may: a service in a user namespace cannot tell root from a stranger."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(mine)
