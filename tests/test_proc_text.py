"""The text of /proc, where names that anybody gives to threads, files and cgroups hold what Python takes for a line's end."""

import os
from collections.abc import Callable

import pytest

from outcomes import in_child
from restrictedmem.abi import process


def named(name: str, look: Callable[[], object]) -> str:
    """Return what a thread of a name finds."""

    def body() -> object:
        process.set_name(name)
        return look()

    return in_child(body)


@pytest.mark.parametrize("end", ["\r", "\n", "\\\n"], ids=repr)
def test_a_threads_name_is_no_line_of_its_status(end: str) -> None:
    assert named(f"{end}TracerPid: 7", process.tracer_pid) == "0"
    # The bit of SIGKILL.
    assert named(f"{end}SigPnd: 100", lambda: process.is_dying(os.getpid())) == "False"
    assert named(f"{end}SigPnd: x", lambda: process.is_dying(os.getpid())) == "False"


def test_a_line_that_a_kernel_does_not_have() -> None:
    assert process.status("self", b"NoSuch:") == []
