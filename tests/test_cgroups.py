"""Which cgroup memory is charged to (``service.cgroup``)."""

import os
from pathlib import Path

import pytest

from restrictedmem.abi import process
from restrictedmem.service import cgroup, ending, oom
from restrictedmem.service.cgroup import Cgroup
from test_proc_text import instead

V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
NO_SOURCE = "33 26 0:30 / /x rw -  - tmpfs  rw"
V2 = "30 26 0:24 / /run/a\\040b rw,relatime - cgroup2 none rw,nsdelegate"
PART = "30 26 0:24 /docker/1 /sys/fs/cgroup rw,relatime - cgroup2 none rw"
OUTSIDE = "30 26 0:24 /../.. /mnt rw,relatime - cgroup2 none rw"


@pytest.mark.parametrize(
    ("own", "mounts", "found"),
    [
        (["4:memory:/a/b", "1:cpu:/", "0::/c"], [V1_CPU, V2, V1], Cgroup(1, "/a/b", Path("/sys/fs/cgroup/memory/a/b"))),
        (["4:cpu,memory:/", "0::/c"], [V1], Cgroup(1, "/", Path("/sys/fs/cgroup/memory"))),
        (["1:cpu:/x", "0::/c"], [NO_SOURCE, V1, V2], Cgroup(2, "/c", Path("/run/a b/c"))),
        # A container sees its part.
        (["0::/docker/1/c"], [PART], Cgroup(2, "/docker/1/c", Path("/sys/fs/cgroup/c"))),
        (["0::/docker/12"], [PART], None),
        (["0::/c"], [OUTSIDE, PART, V2], Cgroup(2, "/c", Path("/run/a b/c"))),
        # Memory is with version 1, whose mount is not here.
        (["4:memory:/", "0::/"], [V2], None),
        (["1:cpu:/"], [V1, V2], None),
        (["0::/\r\udcff"], [V2], Cgroup(2, "/\r\N{REPLACEMENT CHARACTER}", Path("/run/a b/\r\udcff"))),
        (None, [V2], None),
    ],
    ids=["v1", "v1 root", "v2", "part", "neighbour", "outside", "unmounted", "none", "no text", "no proc"],
)
def test_the_cgroup_that_memory_is_charged_to(
    own: list[str] | None, mounts: list[str], found: Cgroup | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, lines in ((process, "cgroup", own), (cgroup, "mountinfo", mounts)):
        table = tmp_path / name
        if lines is not None:
            table.write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))
        instead(monkeypatch, module, table)
    assert Cgroup.own() == found


@pytest.mark.parametrize(
    ("version", "limit", "kills"), [(1, "memory.limit_in_bytes", "memory.oom_control"), (2, "memory.max", "memory.events")]
)
def test_its_limit_and_its_count_of_kills(version: int, limit: str, kills: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    monkeypatch.setattr(Cgroup, "own", lambda: Cgroup(version, "/x/b", directory))
    assert ending._counter() == ("/x/b", str(directory / kills))
    (directory / limit).write_text("max\n", encoding="ascii")
    assert oom._memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "a" / limit).write_text("8192\n", encoding="ascii")
    assert oom._memory() == 8192


def test_without_a_cgroup_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "own", lambda: None)
    assert ending.OomKills().since() == ""
    assert oom._memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
