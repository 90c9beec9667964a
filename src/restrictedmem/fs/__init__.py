"""The descriptor: a FUSE pseudo file system over ``mm``.

``filesystem`` turns one request into one reply. ``fuse_server`` reads and writes /dev/fuse.
``mounter`` makes the mount, which has no mount point.
"""
