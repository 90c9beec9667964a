"""Restricted memory: memfd_restricted(2) and what belongs to it, on a stock kernel.

Layers, imports going down only: cli, kvm, service, fs, mm, and below them abi, fd, units, sync.
"""

from restrictedmem.version import __version__ as __version__

__all__ = ["RMFD_HUGEPAGE", "memfd_restricted"]

#: Flag of ``memfd_restricted``: a hint to use folios of 2 MiB, whatever the machine's policy
#: (docs/understand/folios.md).
RMFD_HUGEPAGE = 0x0002


def memfd_restricted(flags: int = 0) -> int:
    """Create a restricted memory descriptor and return it (memfd_restricted(2) as proposed in v9 and v10).

    The file starts with size 0. Its owner may set the size once (``os.ftruncate``, a multiple of
    the page size), allocate (fallocate), free (fallocate with PUNCH_HOLE), look (``os.fstat``),
    pass it on and close it; never read, write or map it. The descriptor is close-on-exec, as every
    one that Python makes; the system call's was not.

    The first call starts this process's service, which ends with the last descriptor; children
    inherit it by fork.

    Args:
        flags: 0, or ``RMFD_HUGEPAGE`` (neither posting had a flag; this one was proposed after
            them).

    Raises:
        OSError: EINVAL for other flags; EMFILE, ENFILE; whatever kept the service from starting
            (``restrictedmem doctor`` says more).
    """
    # Late: --help and --version need none of it.
    from restrictedmem.service import client

    return client.memfd_restricted(flags)
