"""The shim itself: restricted files, their backing, their pages and their notifiers.

Plain code without processes, mounts or sockets: the service, a test, a checker and a simulator all
drive the same classes. A reader starts in ``restrictedmem``; ``backing`` is the memory, ``pages``
is get_page, ``sequence`` is what a fault path checks against.
"""
