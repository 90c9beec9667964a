"""The descriptor: a FUSE pseudo file system over ``mm``.

``filesystem`` turns one request into one reply, ``server`` reads and writes /dev/fuse, ``mount``
makes the mount that has no mount point.
"""
