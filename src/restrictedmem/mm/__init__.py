"""The shim: restricted files, their backing, their pages and their notifiers.

This package has no processes, mounts or sockets, so the service, the tests and ``check`` drive the
same classes. Start reading in ``restrictedmem``. ``backing`` is the memory and ``pages`` is
get_page. A fault path compares against ``sequence`` before it installs a translation.
"""
