"""The main job as a person types it: a guest digests its input in memory its owner cannot see."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest

import processes
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

#: Options that write the closing table as JSON to stderr, alone.
JSON = ("--quiet", "--json", "/dev/stderr")
COMMAND = [sys.executable, "-m", "restrictedmem"]


def run(*arguments: str, stdin: bytes = b"", status: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr.decode()
    return done


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode() + b"  -\n"


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize(
    "size", [0, 1, 55, 56, 63, 64, 65, 4096, (1 << 20) - 1, 1 << 20, (3 << 20) + 7]
)
def test_sha256_of_any_size(engine: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert run("run", "--quiet", "--engine", engine, "sha256", stdin=data).stdout == digest(data)


def test_memory_may_be_far_below_the_input(engine: str) -> None:
    data = random.Random(1).randbytes(9 << 20)
    done = run("run", "--engine", engine, "--memory", "1M", *JSON, "sha256", stdin=data)
    assert done.stdout == digest(data)
    found = json.loads(done.stderr)
    assert found["private_bytes"] == 1 << 20
    assert found["bytes_in"] == len(data)
    assert 0 < found["pages_taken"] <= 256


def test_an_option_behind_the_guest_is_its_argument_and_that_is_said() -> None:
    done = run("run", "--quiet", "--engine", "software", "sha256", "--memory=4M", status=2)
    assert done.stderr.decode().splitlines() == [
        "hint: --memory=4M is an argument of the guest; options go before GUEST",
        "sha256: no arguments are taken",
    ]


def test_short_reads_come_together() -> None:
    data = random.Random(2).randbytes(50_000)
    process = subprocess.Popen(
        [*COMMAND, "run", "--quiet", "sha256"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for start in range(0, len(data), 997):
        process.stdin.write(data[start : start + 997])
        process.stdin.flush()
    process.stdin.close()
    assert process.stdout.read() == digest(data)
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.parametrize("api", ["v9", "v10"])
def test_both_postings_run_the_same_guest(engine: str, api: str) -> None:
    assert run(
        "run", "--quiet", "--engine", engine, "--api", api, "sha256", stdin=b"abc"
    ).stdout == digest(b"abc")


def test_the_table_says_what_happened(engine: str) -> None:
    done = run("run", "--engine", engine, "sha256", stdin=bytes(100_000))
    text = done.stderr.decode()
    assert ("faults" in text) == (engine == "software"), "the kernel does not tell"
    for word in (
        f"{engine}, ",
        "measurement",
        "pages taken",
        "invalidations",
        "exits",
        "locked",
        "memory charged to",
        "time",
    ):
        assert word in text, text
    assert "Hypercall" in text


def test_json_has_the_same_as_data(engine: str) -> None:
    found = json.loads(run("run", "--engine", engine, *JSON, "spin", "touch").stderr)
    assert found["status"] == 0
    assert found["fatal"] is None
    assert found["pages_taken"] * 4096 <= found["private_bytes"] == 64 << 20
    # The guest wrote each heap page, which is all of its memory but the boot pages, its image and
    # the stack.
    assert found["pages_taken"] * 4096 > 63 << 20
    assert found["exits"] == {"Hypercall": 1}
    assert found["time_total_ns"] == found["time_in_guest_ns"] + found["time_outside_ns"]


def test_the_status_is_the_guests() -> None:
    run("run", "--quiet", "spin", "exit", "7", status=7)


def test_echo_passes_bytes_through() -> None:
    data = random.Random(3).randbytes(2_500_001)
    assert run("run", "--quiet", "spin", "echo", stdin=data).stdout == data


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nonesuch"], "no guest named nonesuch"),
        (["run", "/dev/null"], "not a static x86-64 ELF"),
        (["run", "./does/not/exist.elf"], "No such file"),
        (["run", "--memory", "4K", "sha256"], "at least"),
        (["run", "--memory-max", "8K", "sha256"], "No space left"),
    ],
)
def test_one_clear_error_line(arguments: list[str], words: str) -> None:
    lines = run(*arguments, status=1).stderr.decode().splitlines()
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert len(lines) <= 2


def test_memory_max_stops_the_guest_not_the_machine() -> None:
    done = run("run", "--memory-max", "1M", *JSON, "spin", "touch", status=1)
    first, rest = done.stderr.split(b"\n", 1)
    found = json.loads(first)
    assert "MemoryFault" in found["fatal"]
    assert found["pages_taken"] * 4096 <= 1 << 20
    assert b"error: the guest stopped" in rest


def test_wrong_usage_is_status_2() -> None:
    run("run", "--memory", "tiny", "sha256", status=2)
    run("run", "--memory", "1000", "sha256", status=2)
    run("run", "--vcpus", "0", "sha256", status=2)
    run("run", "--gdb", "65536", "sha256", status=2)
    assert b"name a guest" in run("run", status=2).stderr
    assert b"leave out the guest" in run("run", "--prove", "as-root", "sha256", status=2).stderr


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "--quiet", "spin", "echo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"x" * 100)
    process.stdin.close()
    assert process.wait(30) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_everything() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "--quiet", "spin", "loop"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: len(engines_of(process.pid)) == 1, "the engine of the guest", 60)
    engine = engines_of(process.pid)[0]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT
    wait_until(lambda: processes.process(engine) is None, "the engine to end")


def engines_of(owner: int) -> list[int]:
    """The engine processes that belong to an owner, as ps tells it."""
    done = subprocess.run([*COMMAND, "ps", "--json"], capture_output=True, check=True, timeout=30)
    services = [
        service
        for service in json.loads(done.stdout)["services"]
        if service.get("owner_pid") == owner
    ]
    return [
        vm["report"]["pid"]
        for service in services
        for vm in service["consumers"]
        if "pid" in vm["report"]
    ]
