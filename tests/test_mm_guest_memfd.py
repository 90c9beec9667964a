"""The file behind conversion in place, without FUSE: what it refuses while, and how it fails."""

import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restrictedmem.abi.kvm import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    kvm_memory_attributes2,
)
from restrictedmem.conformance.in_place_machine import PRIVATE, SHARED
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.fs.guest_memfd_requests import AttributesRequest
from restrictedmem.fs.owner_abi import name_of, parse_name
from restrictedmem.mm.guest_memfd_file import GuestMemfdFile
from restrictedmem.mm.inode import Inode
from restrictedmem.units import PageRange, pgoff_t

P = 4096
NPAGES = 4


@contextmanager
def made(flags: int, limit: int | None = None) -> Generator[GuestMemfdFile]:
    file = GuestMemfdFile(NPAGES * P, flags, Inode.make(0, 0), limit=limit)
    try:
        yield file
    finally:
        file.put()


@pytest.fixture
def file() -> Iterator[GuestMemfdFile]:
    with made(SHARED) as file:
        yield file


def span(start: int, end: int) -> PageRange:
    return PageRange(pgoff_t(start), pgoff_t(end))


def nothing(_: PageRange) -> None:
    """Have no page cache."""


def content(file: GuestMemfdFile, page: int) -> object:
    return outcome(lambda: file.read(page * P, P)[0])


def change(file: GuestMemfdFile, page: int, value: int) -> object:
    return outcome(lambda: file.write_back(page * P, bytes([value]) * P))


EIO = Errno(errno.EIO)


def test_a_page_that_is_about_to_be_private_is_written_back_and_not_read(
    file: GuestMemfdFile,
) -> None:
    answers: list[object] = []

    def drop(pages: PageRange) -> None:
        answers.append(pages)
        answers.extend((content(file, 1), change(file, 1, 7), content(file, 0)))

    file.convert(span(1, 2), private=True, zero=False, drop=drop)
    assert answers == [span(1, 2), EIO, None, 0]
    assert (content(file, 1), change(file, 1, 8)) == (EIO, EIO)
    file.convert(span(1, 2), private=False, zero=False, drop=nothing)
    assert content(file, 1) == 7


@pytest.mark.parametrize("private", [True, False])
def test_a_conversion_that_fails_changes_nothing(file: GuestMemfdFile, private: bool) -> None:
    def drop(_: PageRange) -> None:
        raise OSError(errno.EIO, "the process is gone")

    change(file, 0, 7)
    file.convert(span(0, 1), private=not private, zero=False, drop=nothing)
    refused = outcome(lambda: file.convert(span(0, 1), private=private, zero=False, drop=drop))
    assert refused == EIO
    assert content(file, 0) == (7 if private else EIO)
    assert not file.sequence().busy()
    file.convert(span(0, 1), private=False, zero=False, drop=nothing)
    assert content(file, 0) == 7


def test_only_pages_that_change_are_dropped(file: GuestMemfdFile) -> None:
    dropped: list[PageRange] = []
    file.convert(span(0, 2), private=True, zero=False, drop=dropped.append)
    file.convert(span(0, 4), private=True, zero=False, drop=dropped.append)
    file.convert(span(0, 4), private=True, zero=False, drop=dropped.append)
    file.convert(span(1, 2), private=False, zero=False, drop=dropped.append)
    assert dropped == [span(0, 2), span(2, 4), span(1, 2)]


def test_the_size_stays(file: GuestMemfdFile) -> None:
    for size in (0, P, NPAGES * P, 2 * NPAGES * P):
        assert outcome(lambda: file.ftruncate(size)) == Errno(errno.EINVAL)  # noqa: B023
    assert file.size == NPAGES * P


def test_a_file_shows_no_blocks_and_one_link(file: GuestMemfdFile) -> None:
    assert change(file, 0, 7) is None
    assert (file.blocks, file.blksize, file.nlink) == (0, P, 1)


def test_a_read_of_several_pages_is_refused_for_one_private_page(file: GuestMemfdFile) -> None:
    """The kernel then asks for the page alone that was touched."""
    file.convert(span(3, 4), private=True, zero=False, drop=nothing)
    assert outcome(lambda: file.read(0, 4 * P)) == EIO
    assert len(file.read(0, 3 * P)) == 3 * P


def test_a_page_is_read_only_where_it_can_be_written_back() -> None:
    with made(SHARED, P) as file:
        assert content(file, 0) == 0
        assert content(file, 1) == Errno(errno.ENOSPC)
        assert change(file, 0, 7) is None


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_pages_begin_as_the_flags_say(flags: int) -> None:
    with made(flags) as file:
        assert content(file, 0) == (EIO if flags == PRIVATE else 0)


@given(
    offset=st.integers(0, 6).map(lambda page: page * P) | st.integers(0, (1 << 64) - 1),
    size=st.integers(0, 6).map(lambda page: page * P) | st.integers(0, (1 << 64) - 1),
    attributes=st.sampled_from((0, KVM_MEMORY_ATTRIBUTE_PRIVATE, 1)),
    flags=st.integers(0, 4),
)
def test_a_request_is_refused_or_lies_in_the_file(
    offset: int, size: int, attributes: int, flags: int
) -> None:
    asked = kvm_memory_attributes2(offset=offset, size=size, attributes=attributes, flags=flags)
    with suppress(OSError):
        found = AttributesRequest.of(asked, NPAGES * P)
        assert 0 <= found.span.start < found.span.end <= NPAGES
        assert (found.span.start * P, len(found.span) * P) == (offset, size)
        assert found.private == (attributes == KVM_MEMORY_ATTRIBUTE_PRIVATE)
        assert flags in (
            (0, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE)
            if found.private
            else (0, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE, KVM_SET_MEMORY_ATTRIBUTES2_ZERO)
        )
        assert found.zero == (flags == KVM_SET_MEMORY_ATTRIBUTES2_ZERO)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_a_name_carries_size_and_flags(size: int, flags: int) -> None:
    assert parse_name(name_of(size, flags)) == (size, flags)


@given(st.binary(max_size=48))
def test_another_name_carries_nothing(name: bytes) -> None:
    found = parse_name(name)
    assert found is None or max(found) < 1 << 64
