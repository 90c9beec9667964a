"""The address of a service's socket, by a path or by a name in the abstract namespace."""

import socket
from errno import ECONNREFUSED, ENAMETOOLONG
from typing import Final

from restrictedmem.failure import failed

#: A name that begins with ``@`` is known in one network namespace (unix(7)).
NOBODY: Final = "the service does not listen there: it is gone, or in another network namespace"


def address(path: str) -> str:
    """Return the address of a socket.

    A path that begins with ``@`` is a name in the abstract namespace (unix(7)).
    """
    return "\0" + path[1:] if path.startswith("@") else path


def connect(sock: socket.socket, path: str) -> None:
    """Connect to the address of a path.

    Raises:
        OSError: ENAMETOOLONG for a path that no socket can have; as connect(2).
    """
    try:
        sock.connect(address(path))
    except OSError as error:
        # Python reports a path that does not fit into the address without an errno.
        detail = NOBODY if error.errno == ECONNREFUSED else ""
        raise failed("connect", error.errno or ENAMETOOLONG, detail, path) from None
