"""Conversion of a trace (docs/use/trace.md) to Perfetto's format, which ui.perfetto.dev opens.

The format is protobuf, ``perfetto.protos.Trace``. Processes and threads become Perfetto's processes
and threads. An event with a duration becomes a slice, and so does a vCPU's time in the guest. An
event without a duration becomes an instant. The engine's private pages become a counter.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from errno import EINVAL
from typing import Any, Final, final

from restrictedmem.failure import failed
from restrictedmem.protocol.trace_events import VERSION
from restrictedmem.units import U64_MAX

# Field numbers of Perfetto's .proto files.
_TRACE_PACKET: Final = 1
_PACKET_TIMESTAMP: Final = 8
_PACKET_SEQUENCE: Final = 10
_PACKET_TRACK_EVENT: Final = 11
_PACKET_SEQUENCE_FLAGS: Final = 13
_PACKET_TRACK_DESCRIPTOR: Final = 60
_TRACK_UUID: Final = 1
_TRACK_NAME: Final = 2
_TRACK_PROCESS: Final = 3
_TRACK_THREAD: Final = 4
_TRACK_PARENT: Final = 5
_TRACK_COUNTER: Final = 8
_PROCESS_PID: Final = 1
_PROCESS_NAME: Final = 6
_THREAD_PID: Final = 1
_THREAD_TID: Final = 2
_THREAD_NAME: Final = 5
_COUNTER_UNIT: Final = 3
_EVENT_ANNOTATION: Final = 4
_EVENT_TYPE: Final = 9
_EVENT_TRACK: Final = 11
_EVENT_NAME: Final = 23
_EVENT_VALUE: Final = 30
_ANNOTATION_BOOL: Final = 2
_ANNOTATION_INT: Final = 4
_ANNOTATION_STRING: Final = 6
_ANNOTATION_NAME: Final = 10

_SLICE_BEGIN: Final = 1
_SLICE_END: Final = 2
_INSTANT: Final = 3
_COUNTER: Final = 4
_UNIT_COUNT: Final = 2
_INCREMENTAL_STATE_CLEARED: Final = 1

#: All packets are written by one writer.
_SEQUENCE: Final = 1
_COUNTER_UUID: Final = 1 << 62
_LENGTH_DELIMITED: Final = 2
#: Fields that do not become annotations.
_NO_ANNOTATION: Final = ("ts", "pid", "tid", "event", "ns")

_ALWAYS: Final = {"ts", "pid", "tid", "event"}
_NUMBERS: Final = ("ts", "pid", "tid", "vcpu", "ns", "private_pages", "lost", "version")
_TEXTS: Final = ("event", "side", "engine", "call")

Event = dict[str, Any]


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= U64_MAX
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode(errors="replace") if isinstance(value, str) else value
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(data)) + data


@dataclass(slots=True)
class _Slice:
    """An interval from ``start`` to ``end``, in nanoseconds."""

    start: int
    end: int
    name: str
    annotations: bytes = b""


@final
@dataclass(slots=True)
class _Track:
    """A thread's track."""

    pid: int
    tid: int
    name: str = ""
    slices: list[_Slice] = field(default_factory=list["_Slice"])
    #: The open slice of a vCPU that is in the guest.
    inside: _Slice | None = None

    @property
    def uuid(self) -> int:
        return self.pid << 32 | self.tid


@final
@dataclass(frozen=True, slots=True)
class Read:
    """The events of a trace in the order of time, and a text that says what is missing."""

    events: list[Event]
    missing: str


def read(lines: Iterable[str]) -> Read:
    """Read a trace; leave out a last line that was cut off.

    Raises:
        OSError: EINVAL for a file that is no trace, or a trace of another version.
    """
    events: list[Event] = []
    running: dict[int, str] = {}
    lost, cut = 0, False
    for number, line in enumerate(lines, 1):
        event = _parse(line)
        if event is None:
            cut = not line.endswith("\n")
            if cut:
                break
            raise failed("read", EINVAL, f"line {number} is not an event")
        if event["event"] == "trace":
            if event.get("version") != VERSION:
                raise failed(
                    "read",
                    EINVAL,
                    f"the trace has version {event.get('version')}, only {VERSION} can be read",
                )
            running[event["pid"]] = event.get("side", "?")
        elif event["event"] == "end":
            running.pop(event["pid"], None)
        lost += event.get("lost", 0)
        events.append(event)
    if not any(event["event"] == "trace" for event in events):
        raise failed("read", EINVAL, "not a trace: no event gives its version")
    missing = ["the end of its last line"] if cut else []
    missing += [f"the {side}'s end ({pid})" for pid, side in running.items()]
    missing += [f"{lost} events"] if lost else []
    return Read(sorted(events, key=lambda event: event["ts"]), ", ".join(missing))


def _parse(line: str) -> Event | None:
    try:
        event: Event = json.loads(line)
        valid = (
            event.keys() >= _ALWAYS
            and all(isinstance(event.get(name, ""), str) for name in _TEXTS)
            and all(_is_number(event.get(name, 0)) for name in _NUMBERS)
            # Writing a deeply nested value takes a little more stack than reading it, so it could
            # be read and then not be written.
            and not any(isinstance(value, dict | list) for value in event.values())
        )
    except (ValueError, AttributeError, RecursionError):
        return None
    return event if valid else None


def _is_number(value: object) -> bool:
    """Say whether a value is an integer from 0 to 2^63 - 1, the largest number in Perfetto."""
    return type(value) is int and 0 <= value < 1 << 63


def convert(events: list[Event]) -> bytes:
    """Return some events, which are in the order of time, as a Perfetto trace."""
    threads: dict[tuple[int, int], _Track] = {}
    processes: dict[int, str] = {}
    packets: list[tuple[int, bytes]] = []
    for event in events:
        thread = threads.setdefault(
            (event["pid"], event["tid"]), _Track(event["pid"], event["tid"])
        )
        if event["event"] == "trace":
            processes[thread.pid] = " ".join(
                event[key] for key in ("engine", "side") if key in event
            )
        packets += _take(thread, event)
    last = events[-1]["ts"]
    for thread in threads.values():
        if thread.inside is not None:
            thread.inside.end = last
        packets += _slices(thread)
    packets.sort(key=lambda packet: packet[0])
    head = b"".join(
        _tracks(
            threads.values(),
            processes,
            {event["pid"] for event in events if "private_pages" in event},
        )
    )
    return head + b"".join(packet for _, packet in packets)


def _take(thread: _Track, event: Event) -> Iterator[tuple[int, bytes]]:
    """Put an event's slice on its thread's track, or yield the packet of another event."""
    ts, name = event["ts"], event["event"]
    if "private_pages" in event:
        yield _event(ts, _COUNTER, _COUNTER_UUID | thread.pid, value=event["private_pages"])
    match name:
        case "enter":
            thread.name = f"vCPU {event.get('vcpu', '?')}"
            thread.inside = _Slice(ts, ts, "guest")
            thread.slices.append(thread.inside)
        case "exit":
            if thread.inside is not None:
                thread.inside.end = ts
                thread.inside.annotations = _annotations(event)
                thread.inside = None
        case _ if "ns" in event:
            thread.slices.append(
                _Slice(ts - event["ns"], ts, event.get("call") or name, _annotations(event))
            )
        case _:
            yield _event(ts, _INSTANT, thread.uuid, name, _annotations(event))
    if name.startswith("invalidate"):
        thread.name = "invalidations"


def _slices(thread: _Track) -> Iterator[tuple[int, bytes]]:
    """Yield the begin and the end of each slice, properly nested."""
    open_slices: list[_Slice] = []
    for piece in sorted(thread.slices, key=lambda piece: (piece.start, -piece.end)):
        while open_slices and open_slices[-1].end <= piece.start:
            yield _event(open_slices.pop().end, _SLICE_END, thread.uuid)
        if open_slices:
            piece.end = min(piece.end, open_slices[-1].end)
        yield _event(piece.start, _SLICE_BEGIN, thread.uuid, piece.name, piece.annotations)
        open_slices.append(piece)
    while open_slices:
        yield _event(open_slices.pop().end, _SLICE_END, thread.uuid)


def _packet(body: bytes) -> bytes:
    return _field(_TRACE_PACKET, body + _field(_PACKET_SEQUENCE, _SEQUENCE))


def _event(
    ts: int,
    kind: int,
    track: int,
    name: str = "",
    annotations: bytes = b"",
    value: int | None = None,
) -> tuple[int, bytes]:
    body = _field(_EVENT_TYPE, kind) + _field(_EVENT_TRACK, track) + annotations
    body += _field(_EVENT_NAME, name) if name else b""
    body += b"" if value is None else _field(_EVENT_VALUE, value)
    return ts, _packet(_field(_PACKET_TIMESTAMP, ts) + _field(_PACKET_TRACK_EVENT, body))


def _annotations(event: Event) -> bytes:
    found = b""
    for name, value in event.items():
        if name not in _NO_ANNOTATION:
            found += _field(_EVENT_ANNOTATION, _field(_ANNOTATION_NAME, name) + _value(value))
    return found


def _value(value: object) -> bytes:
    match value:
        case bool():
            return _field(_ANNOTATION_BOOL, value)
        case int():
            return _field(_ANNOTATION_INT, value)
        case _:
            return _field(_ANNOTATION_STRING, str(value))


def _tracks(
    threads: Iterable[_Track], processes: dict[int, str], counting: set[int]
) -> Iterator[bytes]:
    """Yield the description of each track.

    The first packet says that no packet came before it.
    """
    flags = _field(_PACKET_SEQUENCE_FLAGS, _INCREMENTAL_STATE_CLEARED)
    for pid, name in processes.items():
        process = _field(_PROCESS_PID, pid) + _field(_PROCESS_NAME, name)
        yield _track(_field(_TRACK_UUID, pid) + _field(_TRACK_PROCESS, process), flags)
        flags = b""
        if pid in counting:
            counter = _field(_TRACK_COUNTER, _field(_COUNTER_UNIT, _UNIT_COUNT))
            yield _track(
                _field(_TRACK_UUID, _COUNTER_UUID | pid)
                + _field(_TRACK_PARENT, pid)
                + _field(_TRACK_NAME, "private pages")
                + counter
            )
    for thread in threads:
        name = thread.name or processes.get(thread.pid, "") or "thread"
        about = (
            _field(_THREAD_PID, thread.pid)
            + _field(_THREAD_TID, thread.tid)
            + _field(_THREAD_NAME, name)
        )
        yield _track(
            _field(_TRACK_UUID, thread.uuid)
            + _field(_TRACK_PARENT, thread.pid)
            + _field(_TRACK_THREAD, about)
        )


def _track(descriptor: bytes, flags: bytes = b"") -> bytes:
    return _packet(_field(_PACKET_TRACK_DESCRIPTOR, descriptor) + flags)
