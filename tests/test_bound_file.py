"""What a window does at a callback, and in which order."""

from unittest.mock import MagicMock, Mock, call

from planting import stub
from restrictedmem.consumer.bound_file import BoundFile
from restrictedmem.units import PageRange, pgoff_t

START, END = pgoff_t(3), pgoff_t(8)
SPAN = PageRange(START, END)


def window(lost: set[int]) -> tuple[BoundFile, Mock]:
    """Make a window of pages 2 to 6 without a file, and the note of what it calls."""
    note = Mock()
    file = stub(
        window=PageRange(pgoff_t(2), pgoff_t(6)),
        _ops=note.ops,
        _pages=note.pages,
        _settled=MagicMock(notify_all=note.wake),
        _lost=lost,
    )
    note.pages.count.return_value = 4
    return file, note


def test_pages_are_given_back_once_no_translation_leads_to_them() -> None:
    file, note = window({2, 3, 7, 8})
    BoundFile.invalidate_start(file, START, END, 9)
    assert note.mock_calls == [
        call.ops.invalidate_start(START, END, 9),
        call.pages.invalidate_start(SPAN),
    ]
    # What was lost and punched can be taken again.
    assert file._lost == {2, 8}


def test_at_the_end_orders_are_remembered_again_and_faults_go_on() -> None:
    file, note = window(set())
    BoundFile.invalidate_end(file, START, END, None)
    assert note.mock_calls == [
        call.pages.invalidate_end(SPAN),
        call.ops.invalidate_end(START, END, None),
        call.wake(),
    ]


def test_pages_of_the_window_are_lost() -> None:
    file, note = window({2})
    BoundFile.error(file, START, END)
    assert file._lost == {2, 3, 4, 5}
    assert note.mock_calls == [call.ops.error(START, END)]


def test_taken_pages_are_counted() -> None:
    file, note = window(set())
    assert BoundFile.page_count(file, START, END) == 4
    assert note.mock_calls == [call.pages.count(SPAN)]
