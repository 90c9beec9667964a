"""Errors in one form: what an error says beside its errno's text is not cut."""

from errno import EMFILE, ENOENT

import pytest

from restrictedmem.failure import detail_of, failed, named

_WAYS = "own mount: fsopen: Too many open files; fusermount3: Too many open files"


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (OSError(ENOENT, "No such file or directory"), ""),
        (failed("open", ENOENT), "open"),
        (failed("open", ENOENT, "of the mount"), "open: of the mount"),
        (OSError(EMFILE, "at the limit"), "at the limit"),
        # The ways to mount, each with its failure: the errno's text stands in the middle.
        (OSError(EMFILE, _WAYS), _WAYS),
    ],
    ids=str,
)
def test_the_detail_is_all_but_the_errnos_text(error: OSError, detail: str) -> None:
    assert detail_of(error) == detail


def test_an_error_that_gets_a_name_keeps_its_detail() -> None:
    assert (
        named("start", OSError(EMFILE, _WAYS)).strerror == f"start: Too many open files ({_WAYS})"
    )
