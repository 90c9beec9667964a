"""The trusted process, and how an owner reaches it.

``client`` is the owner's side. ``start`` is the order in which a service comes to life so that its
owner cannot look into it; it leaves two processes: the ``spawner``, which forks consumers and ends
with the service, and the ``daemon``, which is FUSE and the shim. ``wire`` is what travels between
all of them.
"""

from typing import Final

#: Set to the socket of ``restrictedmem serve`` to use that instead of a private service; ``exec``
#: sets it for its programs.
SERVER_VARIABLE: Final = "RESTRICTEDMEM_SERVER"
