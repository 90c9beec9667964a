"""The text that a random owner gives for its guest's failure: that of the first error."""

from errno import EIO
from functools import partial
from typing import Any, Final

import pytest

from planting import stub
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.protocol.exits import Hypercall
from restrictedmem.stress.owner import Owner

EXIT_1: Final = Hypercall(guest_abi.EXIT, (1, 0, 0, 0))


def owner_of(*, failure: str = "") -> Any:
    made = stub(failure=failure, said=" a word\n")
    made._answer = partial(Owner._answer, made)
    return made


def drive(owner: Any, *said: exits.Exit | OSError) -> str:
    """Have a vCPU come back so."""
    comes = iter(said)

    def run(_: int) -> exits.Exit:
        exit_ = next(comes)
        if isinstance(exit_, OSError):
            raise exit_
        return exit_

    Owner._drive(owner, stub(number=3, run=run))
    return str(owner.failure)


#: How a vCPU comes back, and what that is.
FAILURES: Final[dict[str, tuple[exits.Exit | OSError, str]]] = {
    "error": (OSError(EIO, "lost"), "vCPU 3: lost"),
    "status": (EXIT_1, "the guest ended with 1: a word"),
    "shutdown": (exits.Shutdown(13), f"a vCPU stopped: {exits.Shutdown(13)}"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_first_failure_is_the_one(name: str) -> None:
    exit_, words = FAILURES[name]
    assert drive(owner_of(), exits.Interrupted(), exit_) == words
    assert drive(owner_of(failure="before"), exit_) == "before"


@pytest.mark.parametrize(
    "end", [Hypercall(guest_abi.EXIT, (0, 0, 0, 0)), Hypercall(guest_abi.PARK, (0, 0, 0, 0))]
)
def test_an_end_is_no_failure(end: exits.Exit) -> None:
    assert drive(owner_of(), end) == ""
