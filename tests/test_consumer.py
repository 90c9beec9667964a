"""What a consumer does with each message of its service."""

from functools import partial
from unittest.mock import Mock, call

import pytest

from planting import stub
from restrictedmem import sync
from restrictedmem.consumer.consumer import Consumer
from restrictedmem.service import wire
from restrictedmem.service.wire import Call, Message


def answer(number: Call, binding: int, folio: int, notifiers: dict[int, Mock]) -> bytes | None:
    """Answer a message about pages 3 to 8."""
    consumer = stub(_known=sync.condition(sync.mutex()), _binding=0, _notifiers=notifiers)
    consumer._find = partial(Consumer._find, consumer)
    body = wire.INVALIDATION.pack(binding, 3, 8, folio)
    return Consumer._answer(consumer, Message(number.number, body, []))


@pytest.mark.parametrize(
    ("number", "folio", "told", "reply"),
    [
        (wire.INVALIDATE_START, wire.NO_FOLIO, call.invalidate_start(3, 8, None), b""),
        (wire.INVALIDATE_START, 9, call.invalidate_start(3, 8, 9), b""),
        (wire.INVALIDATE_END, wire.NO_FOLIO, call.invalidate_end(3, 8, None), None),
        (wire.INVALIDATE_END, 0, call.invalidate_end(3, 8, 0), None),
        (wire.ERROR, wire.NO_FOLIO, call.error(3, 8), b""),
        (wire.PRIVATE, wire.NO_FOLIO, call.convert(3, 8, private=True), b""),
        (wire.SHARED, wire.NO_FOLIO, call.convert(3, 8, private=False), b""),
        (wire.PAGE_COUNT, wire.NO_FOLIO, call.page_count(3, 8), wire.COUNT.pack(5)),
    ],
)
def test_a_message_is_one_call_of_the_binding(
    number: Call, folio: int, told: object, reply: bytes | None
) -> None:
    notifier, other = Mock(), Mock()
    notifier.page_count.return_value = 5
    assert answer(number, 2, folio, {2: notifier, 1: other}) == reply
    assert notifier.mock_calls == [told]
    assert other.mock_calls == []


@pytest.mark.parametrize("number", [wire.PRIVATE, wire.SHARED])
def test_a_binding_that_converts_nothing_is_not_told(number: Call) -> None:
    notifier = Mock(spec=["invalidate_start", "invalidate_end", "error", "page_count"])
    assert answer(number, 2, wire.NO_FOLIO, {2: notifier}) == b""
    assert notifier.mock_calls == []


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (wire.INVALIDATE_START, b""),
        (wire.INVALIDATE_END, None),
        (wire.ERROR, b""),
        (wire.PRIVATE, b""),
        (wire.PAGE_COUNT, wire.COUNT.pack(0)),
    ],
)
def test_for_a_binding_that_is_gone_there_is_an_answer(number: Call, reply: bytes | None) -> None:
    other = Mock()
    assert answer(number, 2, wire.NO_FOLIO, {1: other}) == reply
    assert other.mock_calls == []
