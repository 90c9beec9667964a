"""Restricted memory: memfd_restricted(2) and its guests, on a stock kernel.

The subpackages are layers, and imports go down only (docs/understand/architecture.md).
"""

from restrictedmem.version import __version__ as __version__

__all__ = ["RMFD_HUGEPAGE", "memfd_restricted"]

#: Flag of ``memfd_restricted``: a hint to use folios of 2 MiB, whatever the machine's policy
#: (docs/understand/folios.md).
RMFD_HUGEPAGE = 0x0002


def memfd_restricted(flags: int = 0) -> int:
    """Create a restricted memory descriptor and return it (memfd_restricted(2), v9 and v10).

    The file starts with size 0. Its owner may set the size once (``os.ftruncate``, a multiple of
    the page size), allocate (fallocate), free (fallocate with PUNCH_HOLE), look (``os.fstat``),
    pass the descriptor on, and close it. Nobody can read, write or map it. The descriptor is
    close-on-exec, as is every descriptor that Python makes; the system call's was not.

    The first call starts this process's service, which ends with the last descriptor. Children
    inherit the service by fork.

    Args:
        flags: 0 or ``RMFD_HUGEPAGE``. Neither posting had a flag; this one was proposed after them.

    Raises:
        OSError: EINVAL for other flags; EMFILE, ENFILE; the error that kept the service from
            starting (``restrictedmem doctor`` says more).
    """
    # Imported late, because --help and --version do not need it.
    from restrictedmem.service import client

    return client.memfd_restricted(flags)
