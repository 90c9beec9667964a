"""The closing table of ``restrictedmem run``, row by row."""

from typing import Any

import pytest

from restrictedmem.cli import run_table

SIZES = ("4 KiB", "2 MiB")
PLAIN: dict[str, Any] = {
    "time_total_ns": 2_000_000_000,
    "time_in_guest_ns": 1_500_000_000,
    "time_outside_ns": 500_000_000,
    "bytes_in": 3 << 20,
    "bytes_out": 32,
    "engine": "software",
    "way": "own mount",
    "measurement": "ab12",
    "pages_taken": 256,
    "private_bytes": 4 << 20,
    "invalidations": 2,
    "exits": {},
    "locked_bytes": 0,
    "unlocked_because": "",
    "swap": False,
    "memlock_limit": 8 << 20,
    "cgroup": "/",
    "platform": None,
    "design": "v10",
}
ROWS = {
    "engine, mount": "software, own mount",
    "measurement": "ab12",
    "input, output": "3 MiB in, 32 B out, 1.5 MiB/s",
    "pages taken": "256 (1 MiB of 4 MiB)",
    "invalidations": "2",
    "exits": "none",
    "memory charged to": "/",
    "time": "1.500 s in the guest, 0.500 s outside",
}


def rows(**changes: object) -> dict[str, str]:
    return dict(run_table._rows({**PLAIN, **changes}))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, {}),
        ({"bytes_in": 0}, {"input, output": "0 B in, 32 B out"}),
        ({"time_total_ns": 0}, {"input, output": "3 MiB in, 32 B out"}),
        (
            {"not_kernel": "no room"},
            {"kernel engine": "not used, a trial guest did not run: no room"},
        ),
        (
            {"faults_private": 4, "faults_shared": 5, "fault_retries": 6},
            {"faults": "4 private, 5 shared, 6 retried"},
        ),
        (
            {"entries_zapped": 7, "pages_freed": 8},
            {"invalidations": "2: 7 entries zapped, 8 pages freed"},
        ),
        ({"exits": {"mmio": 2, "io": 1}}, {"exits": "1 io, 2 mmio"}),
        ({"locked_bytes": 1 << 20}, {"locked": "yes, 1 MiB"}),
        (
            {"unlocked_because": "mlock: no"},
            {
                "locked": "no (mlock: no: the limit is 8 MiB);"
                " no swap exists, so nothing is written out"
            },
        ),
        (
            {"unlocked_because": "mlock: no", "swap": True},
            {
                "locked": "no (mlock: no: the limit is 8 MiB);"
                " swap exists, so pages may be written to it"
            },
        ),
    ],
)
def test_a_row_says_what_was_counted(changes: dict[str, object], differs: dict[str, str]) -> None:
    assert rows(**changes) == {**ROWS, **differs}


def platform(**changes: object) -> dict[str, object]:
    nothing = dict.fromkeys(SIZES, 0)
    return {
        "platform": "snp",
        "direct_map": {
            "entries": {"4 KiB": 512, "2 MiB": 3},
            "splits": {"4 KiB": 0, "2 MiB": 1},
            "merges": nothing,
            "removals": {"4 KiB": 9, "2 MiB": 2},
            "restores": nothing,
        },
        "rmp_operations": {"RMPUPDATE": 5, "PSMASH": 1},
        "assigned_pages": 3,
        "leaked_pages": 0,
        "violated_pages": 0,
        **changes,
    }


ON_SNP = {
    "platform, design": "snp, v10",
    "direct map": "512 of 4 KiB, 3 of 2 MiB",
    "": "1 of 2 MiB split, 9 of 4 KiB taken out, 2 of 2 MiB taken out",
    "RMP": "1 PSMASH, 5 RMPUPDATE",
    "left assigned": "3 pages (12 KiB)",
}


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, {}),
        ({"rmp_operations": {}}, {"RMP": "nothing"}),
        ({"leaked_pages": 2}, {"left assigned": "3 pages (12 KiB), 2 of them leaked"}),
        ({"violated_pages": 1}, {"rules violated": "for 1 pages"}),
    ],
)
def test_a_platform_has_rows_of_its_own(
    changes: dict[str, object], differs: dict[str, str]
) -> None:
    assert rows(platform=platform(**changes)) == {**ROWS, **ON_SNP, **differs}


def test_a_direct_map_that_nobody_changed_is_as_it_was() -> None:
    nothing = dict.fromkeys(SIZES, 0)
    counts = dict.fromkeys(("entries", "splits", "merges", "removals", "restores"), nothing)
    assert rows(platform=platform(direct_map=counts))[""] == "as it was"
