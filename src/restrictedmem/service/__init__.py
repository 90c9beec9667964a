"""The trusted process, and how an owner reaches it.

``client`` is the owner's side. ``start`` starts a service in an order that keeps its owner from
looking into it. It leaves two processes. The ``spawner`` forks consumers and ends with the service.
The ``daemon`` is FUSE and the shim. ``wire`` has the messages between all of them.
"""

from typing import Final

#: Names the socket of ``restrictedmem serve``, to use that server instead of a private service.
#: ``exec`` sets it for its programs.
SERVER_VARIABLE: Final = "RESTRICTEDMEM_SERVER"
