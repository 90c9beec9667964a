"""The progress line and the closing table of ``restrictedmem run``, both on stderr."""

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from restrictedmem.text import Line, duration, plain
from restrictedmem.units import PAGE_SHIFT, format_size

if TYPE_CHECKING:
    from restrictedmem.vmm.vmm import Ended, Vmm

_NAME_WIDTH = 19
_VERBS = {
    "splits": "split",
    "merges": "put together",
    "removals": "taken out",
    "restores": "put back",
}


@contextmanager
def progress(vmm: "Vmm", *, show: bool) -> Generator[Callable[[], None], None, None]:
    """Show bytes and rate on a terminal while the guest runs.

    Yield the function that the VMM calls after each exit. Nothing is shown while stdout is a
    terminal, because the guest's output would be in the middle of the line.
    """
    line = Line(sys.stderr, show=show and not sys.stdout.isatty())
    began, total = time.monotonic(), _input_size()

    def text() -> str:
        passed = time.monotonic() - began
        of = f" of {format_size(total)}" if total is not None else ""
        rate = format_size(round(vmm.bytes_in / passed)) if passed else "0 B"
        return f"guest runs  {format_size(vmm.bytes_in)}{of}, {rate}/s, {duration(passed)}"

    try:
        yield lambda: line.update(text)
    finally:
        line.clear()


def _input_size() -> int | None:
    found = os.fstat(sys.stdin.fileno())
    return (
        found.st_size
        if found.st_size and os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) == 0
        else None
    )


def as_data(found: dict[str, Any], ended: "Ended") -> dict[str, Any]:
    """Return the closing table as a dictionary for JSON."""
    return {**found, "status": ended.status, "fatal": ended.fatal and str(ended.fatal)}


def show(found: dict[str, Any]) -> None:
    """Print the closing table."""
    for name, value in _rows(found):
        # Most of the table comes from the engine, and a guest may have broken out into the engine.
        print(f"{name:{_NAME_WIDTH}}{plain(value)}", file=sys.stderr)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    seconds = found["time_total_ns"] / 1e9
    rate = (
        f", {format_size(round(found['bytes_in'] / seconds))}/s"
        if found["bytes_in"] and seconds
        else ""
    )
    yield "engine, mount", f"{found['engine']}, {found['way']}"
    if "not_kernel" in found:
        yield "kernel engine", f"not used, a trial guest did not run: {found['not_kernel']}"
    yield "measurement", found["measurement"]
    yield (
        "input, output",
        f"{format_size(found['bytes_in'])} in, {format_size(found['bytes_out'])} out{rate}",
    )
    yield (
        "pages taken",
        f"{found['pages_taken']} ({format_size(found['pages_taken'] << PAGE_SHIFT)}"
        f" of {format_size(found['private_bytes'])})",
    )
    if "faults_private" in found:
        yield (
            "faults",
            f"{found['faults_private']} private, {found['faults_shared']} shared,"
            f" {found['fault_retries']} retried",
        )
    yield "invalidations", _invalidations(found)
    yield (
        "exits",
        ", ".join(f"{count} {name}" for name, count in sorted(found["exits"].items())) or "none",
    )
    if found["locked_bytes"] or found["unlocked_because"]:
        yield "locked", _locked(found)
    yield "memory charged to", found["cgroup"]
    yield from _platform_rows(found)
    yield (
        "time",
        f"{found['time_in_guest_ns'] / 1e9:.3f} s in the guest,"
        f" {found['time_outside_ns'] / 1e9:.3f} s outside",
    )


def _platform_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows about the platform's state after the run, if there is a platform."""
    platform = found["platform"]
    if not platform:
        return
    counts = platform["direct_map"]
    yield "platform, design", f"{platform['platform']}, {found['design']}"
    yield (
        "direct map",
        ", ".join(f"{counts['entries'][size]} of {size}" for size in counts["entries"]),
    )
    changes = [
        f"{count} of {size} {verb}"
        for name, verb in _VERBS.items()
        for size, count in counts[name].items()
        if count
    ]
    yield "", ", ".join(changes) or "as it was"
    yield (
        "RMP",
        ", ".join(f"{count} {name}" for name, count in sorted(platform["rmp_operations"].items()))
        or "nothing",
    )
    left, leaked = platform["assigned_pages"], platform["leaked_pages"]
    yield (
        "left assigned",
        f"{left} pages ({format_size(left << PAGE_SHIFT)})"
        + (f", {leaked} of them leaked" if leaked else ""),
    )
    if platform["violated_pages"]:
        yield "rules violated", f"for {platform['violated_pages']} pages"


def story(platform: dict[str, Any]) -> list[str]:
    """Return the history of the first page for which a rule of the platform was violated."""
    first = platform["violations"][0]
    return [
        f"{first['rule']}: page {first['start']:#x} of file {first['ino']},"
        f" {first['npages']} pages alike",
        *first["story"],
    ]


def _invalidations(found: dict[str, Any]) -> str:
    zapped = (
        f": {found['entries_zapped']} entries zapped, {found['pages_freed']} pages freed"
        if "entries_zapped" in found
        else ""
    )
    return f"{found['invalidations']}{zapped}"


def _locked(found: dict[str, Any]) -> str:
    if found["locked_bytes"]:
        return f"yes, {format_size(found['locked_bytes'])}"
    swap = (
        "swap exists, so pages may be written to it"
        if found["swap"]
        else "no swap exists, so nothing is written out"
    )
    return (
        f"no ({found['unlocked_because']}: the limit is {format_size(found['memlock_limit'])});"
        f" {swap}"
    )
