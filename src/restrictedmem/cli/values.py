"""What stands behind an option, read for argparse (``type=``)."""

import argparse

from restrictedmem.units import PAGE_MASK, parse_size

#: Of x32, which has numbers of its own.
_CALL_BITS = 30


def size(text: str) -> int:
    """Read a size in bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def memory_size(text: str) -> int:
    """Read a size that is whole pages, and not none."""
    found = size(text)
    if not found or found & PAGE_MASK:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of pages")
    return found


def call_number(text: str) -> int:
    """Read the number of a system call."""
    if not text.isdecimal() or int(text) >> _CALL_BITS:
        raise argparse.ArgumentTypeError(f"{text} is not a system call's number")
    return int(text)
