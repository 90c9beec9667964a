"""The values of options, parsed for argparse (``type=``)."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Final

from restrictedmem.abi.memory import SYS_memfd_restricted
from restrictedmem.mm.notifier import Api
from restrictedmem.units import PAGE_MASK, parse_size

DEFAULT_API: Final = Api.V10.value
#: Higher bits mark a call of x32, which has numbers of its own.
_CALL_BITS = 30
_MOST_PORT = 65535
#: The largest number of vCPUs of KVM on any machine.
MOST_VCPUS = 4096
#: The most characters of a wrong value in an error.
_SHOWN = 40


def add_api(parser: argparse.ArgumentParser) -> None:
    """Add ``--api``, which is None unless given.

    Commands refuse it when they use another service.
    """
    parser.add_argument(
        "--api",
        choices=[api.value for api in Api],
        help=f"which posting of the series to follow (default {DEFAULT_API})",
    )


def memory_size(text: str) -> int:
    """Parse a size in bytes, which must be whole pages and not 0."""
    try:
        found = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not found or found & PAGE_MASK:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of pages")
    return found


def count_of(what: str, most: int = 1 << 20) -> Callable[[str], int]:
    """Return a parser for a number of something, from 1 on."""

    def read(text: str) -> int:
        found = _number(text)
        if found is None or not 0 < found <= most:
            raise argparse.ArgumentTypeError(
                f"{text[:_SHOWN]} is not a number of {what}, 1 to {most}"
            )
        return found

    return read


def seconds(text: str) -> float:
    """Parse a time in seconds, greater than 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:_SHOWN]} is not a number of seconds")
    return found


def seed(text: str) -> int:
    """Parse a seed for random numbers."""
    found = _number(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text[:_SHOWN]} is not a seed: give the number that another run printed"
        )
    return found


def port(text: str) -> int:
    """Parse a port's number, 0 for a free port."""
    found = _number(text)
    if found is None or found > _MOST_PORT:
        raise argparse.ArgumentTypeError(f"{text[:_SHOWN]} is not a port")
    return found


def call_number(text: str) -> int:
    """Parse the number of a system call that programs do not use for something else."""
    found = _number(text)
    if found is None or found >> _CALL_BITS:
        raise argparse.ArgumentTypeError(f"{text[:_SHOWN]} is not a system call's number")
    if found < SYS_memfd_restricted:
        raise argparse.ArgumentTypeError(
            f"{text} may be another system call's: take one from {SYS_memfd_restricted} on"
        )
    return found


def _number(text: str) -> int | None:
    """Return a decimal number of at most 20 digits (64 bits); None for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,20}", text) else None
