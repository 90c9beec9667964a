"""Events of a run in Perfetto's format."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recorded_runs import engine, recorded, service
from restrictedmem.protocol.trace_events import VERSION
from restrictedmem.vmm import perfetto

__all__ = ["engine", "recorded", "service"]


@pytest.fixture(scope="module")
def excerpt(recorded: Path) -> Path:
    """Return a part of the run that has some of everything: the beginning, and both ends.

    The last lines of the processes may come interleaved.
    """
    path, every = (
        recorded.with_name("excerpt.jsonl"),
        recorded.read_text().splitlines(keepends=True),
    )
    path.write_text(
        "".join([*every[:3000], *(line for line in every[3000:] if '"event":"end"' in line)])
    )
    return path


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Decode a protobuf message of integers and nested bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            assert key & 7 == 2, "a wire type that Perfetto's fields here do not have"
            size = varint()
            assert at + size <= len(data)
            at += size
            yield key >> 3, data[at - size : at]


def message(data: int | bytes) -> dict[int, int | bytes]:
    assert isinstance(data, bytes)
    return dict(fields(data))


BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4


@pytest.mark.requires("fuse")
def test_perfetto_gets_tracks_slices_and_a_counter(excerpt: Path, engine: str) -> None:
    with excerpt.open() as file:
        events = perfetto.read(file).events
    packets = [
        message(packet) for number, packet in fields(perfetto.convert(events)) if number == 1
    ]
    assert packets[0][13] == 1, (
        "the sequence's first packet must say that there is no earlier state"
    )
    assert all(packet[10] == packets[0][10] for packet in packets)
    descriptors = [message(packet[60]) for packet in packets if 60 in packet]
    names = {descriptor[1]: descriptor for descriptor in descriptors}
    assert len(names) == len(descriptors), "uuids are unique"
    assert all(descriptor[5] in names for descriptor in descriptors if 5 in descriptor)
    threads = {message(descriptor[4])[5] for descriptor in descriptors if 4 in descriptor}
    assert {b"vCPU 0", b"invalidations", b"owner", f"{engine} engine".encode()} <= threads
    depth: dict[int, int] = {}
    last = 0
    counted: list[int] = []
    slices = 0
    for packet in packets:
        if 11 not in packet:
            continue
        event, ts = message(packet[11]), packet[8]
        track, kind = event[11], event[9]
        assert isinstance(ts, int)
        assert isinstance(track, int)
        assert ts >= last
        last = ts
        assert track in names
        if kind == COUNTER:
            value = event[30]
            assert isinstance(value, int)
            counted.append(value)
            # A counter of things (UNIT_COUNT).
            assert message(names[track][8]) == {3: 2}
            continue
        assert 4 in names[track]
        slices += kind == BEGIN
        depth[track] = (
            depth.get(track, 0)
            + {BEGIN: 1, END: -1, INSTANT: 0}[kind if isinstance(kind, int) else 0]
        )
        assert depth[track] >= 0
        assert (23 in event) == (kind != END)
    assert set(depth.values()) == {0}
    assert slices == sum("ns" in event or event["event"] == "enter" for event in events)
    assert counted == [event["private_pages"] for event in events if "private_pages" in event]


def test_a_slice_ends_where_the_one_around_it_does() -> None:
    def line(**more: object) -> str:
        return json.dumps({"pid": 1, "tid": 2, **more}) + "\n"

    text = [
        line(ts=1, event="trace", version=VERSION, side="engine"),
        line(ts=10, event="enter", vcpu=3),
        line(ts=20, event="fault", ns=5),
        line(ts=30, event="fault", ns=10),
        # The run was cut off: no exit.
        '{"ts": 40, "pid": 1',
    ]
    packets = [
        message(packet) for _, packet in fields(perfetto.convert(perfetto.read(text).events))
    ]
    told = [(packet[8], message(packet[11])[9]) for packet in packets if 11 in packet]
    assert told == [
        (1, INSTANT),
        (10, BEGIN),
        (15, BEGIN),
        (20, END),
        (20, BEGIN),
        (30, END),
        (30, END),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a trace"),
        ('{"ts":1,"pid":1,"tid":1,"event":"enter","vcpu":0}\n', "not a trace"),
        ('{"ts":1,"pid":1,"tid":1,"event":"trace","version":2,"side":"owner"}\n', "version 2"),
        ('{"ts":1,"pid":1,"tid":1,"event":"trace","version":1,"side":"owner"}\n[]\n', "line 2"),
        ('{"ts":"1","pid":1,"tid":1,"event":"trace","version":1}\n', "line 1"),
        ("\x00\xff\n", "line 1"),
        ("[" * 100_000 + "\n", "line 1"),
        ("0" * 100_000, "line 1"),
    ],
)
def test_what_is_no_trace_is_refused(content: str, words: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text(content, encoding="latin-1")
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "trace",
        "to-perfetto",
        str(source),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert str(source) in done.stderr
    assert not (tmp_path / "out").exists()


def test_half_a_character_is_converted() -> None:
    text = [
        '{"ts":1,"pid":1,"tid":1,"event":"trace","version":1}\n',
        '{"ts":2,"pid":1,"tid":1,"event":"\\ud800"}\n',
    ]
    assert perfetto.convert(perfetto.read(text).events).count(b"?") == 1


@pytest.mark.requires("fuse")
def test_the_command_converts(excerpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "trace",
        "to-perfetto",
        str(excerpt),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with excerpt.open() as file:
        assert out.read_bytes() == perfetto.convert(perfetto.read(file).events)
