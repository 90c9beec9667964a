"""A platform under a real guest: its notifications by design, DESTROY_VM, and ``run``'s report."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest

from processes import descriptors
from restrictedmem.abi import memory
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call
from restrictedmem.vmm.vm import Vcpu, Vm
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

EBADF, EINVAL, EOPNOTSUPP = 9, 22, 95
GPA: Final = 0x4000_0000
PAGE: Final = 4096
MIB: Final = 1 << 20
SIZE: Final = 4 * MIB
#: Write to rsi pages from rdi on, then tell; and again.
TOUCH: Final = bytes.fromhex(
    "c60701"  # touch: mov byte [rdi], 1
    "4881c700100000"  # add rdi, 0x1000
    "48ffce"  # dec rsi
    "75f1"  # jne touch
    "e642"  # told: out 0x42, al
    "ebfc"  # jmp told
)
#: The pages around the guest's code that are mapped with it: a block of the fault path.
BLOCK: Final = 16
TOUCHED: Final = exits.PortOut(0x42, 1, 0)
SPIN: Final = bytes.fromhex("ebfe")


def refused(*arguments: Any, **keywords: Any) -> int:
    with pytest.raises(OSError) as caught:
        Vm(*arguments, **keywords)
    assert caught.value.errno is not None
    return caught.value.errno


@dataclass
class Guest:
    """A VM of 4 MiB, and its descriptor."""

    vm: Vm
    vcpu: Vcpu
    fd: int

    def touch(self) -> None:
        assert self.vcpu.run() == TOUCHED

    def punch(self, first: int, npages: int) -> None:
        memory.fallocate(self.fd, memory.PUNCH, first * PAGE, npages * PAGE)


@contextmanager
def guest(
    design: str | None = None,
    *,
    backing: str = "memfd",
    platform: str = "snp",
    first: int = BLOCK,
    npages: int = 1024 - BLOCK,
    code: bytes = TOUCH,
) -> Generator[Guest, None, None]:
    """Make a guest that touches pages ``first`` and on when it is run."""
    with (
        Service.start(Options(design=design, backing=backing)) as service,
        Vm(service, platform=platform) as vm,
    ):
        fd = service.memfd_restricted()
        os.ftruncate(fd, SIZE)
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=SIZE, restricted_fd=fd)
        vm.set_memory_attributes(GPA, SIZE, private=True)
        vm.launch_update(GPA, code.ljust(PAGE, b"\0"))
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=GPA, rdi=GPA + first * PAGE, rsi=npages)
            yield Guest(vm, vcpu, fd)
        os.close(fd)


# Making and destroying a VM.


def test_a_platform_is_the_software_engines() -> None:
    with Service.start() as service:
        with Vm(service, engine="auto", platform="snp") as vm:
            assert vm.engine == "software"
        assert refused(service, engine="software", platform="tdx") == EINVAL
        assert refused(service, engine="kernel", platform="snp") == EOPNOTSUPP


def test_without_a_platform_there_is_nothing_to_report() -> None:
    with guest(platform="") as by:
        by.touch()
        assert by.vm.destroy() == {}


@pytest.mark.requires("kvm")
def test_a_vm_of_the_kernels_engine_is_destroyed_alike() -> None:
    with Service.start() as service, Vm(service, engine="kernel") as vm, vm.create_vcpu() as vcpu:
        fd = service.memfd_restricted()
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=SIZE, restricted_fd=fd)
        assert vm.destroy() == {}
        for call in (vm.statistics, vm.destroy, vcpu.run):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == EBADF
        os.close(fd)


def test_without_a_guest_that_ran_what_was_launched_is_the_guests() -> None:
    with guest() as by:
        found = by.vm.destroy()
        assert found["rmp_operations"] == {"RMPUPDATE 4K": 1, "PVALIDATE 4K": 1}
        assert (found["assigned_pages"], found["violated_pages"]) == (1, 0)


ALL_CALLS: Final = [call for call in vars(vm_wire).values() if isinstance(call, Call)]


def test_after_it_every_call_is_ebadf() -> None:
    with guest() as by:
        by.vm.destroy()
        for channel in (by.vm._channel, by.vcpu._channel):
            for call in ALL_CALLS:
                with pytest.raises(OSError) as caught:
                    channel.call(call)
                assert caught.value.errno == EBADF, call.name


def test_a_vcpu_that_runs_is_interrupted_and_gets_nothing_more() -> None:
    with guest(code=SPIN) as by:
        found: list[exits.Exit | int | None] = []

        def run() -> None:
            for _ in range(2):
                try:
                    found.append(by.vcpu.run())
                except OSError as error:
                    found.append(error.errno)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: by.vm.statistics()["faults_private"] > 0, "the guest to run")
        by.vm.destroy()
        thread.join(10)
        assert found == [exits.Interrupted(), EBADF]


ENGINES: Final = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]


def fill(vm: Vm, files: list[int]) -> None:
    for number, fd in enumerate(files):
        gpa = GPA + number * SIZE
        vm.set_user_memory_region(
            slot=number, guest_phys_addr=gpa, memory_size=SIZE, restricted_fd=fd
        )
        vm.set_memory_attributes(gpa, SIZE, private=True)
        vm.launch_update(gpa, bytes(PAGE))


@pytest.mark.parametrize("design", ["v10", "bindings"])
@pytest.mark.parametrize("engine", ENGINES)
def test_its_files_are_free_for_another_vm_at_once(engine: str, design: str) -> None:
    with (
        Service.start(Options(design=design)) as service,
        Vm(service, engine=engine) as first,
        Vm(service, engine=engine) as second,
    ):
        files = [service.memfd_restricted() for _ in range(2)]
        fill(first, files)
        first.destroy()
        assert [file["notifiers"] for file in service.status()["descriptors"]] == [0, 0]
        fill(second, files)
        for fd in files:
            os.close(fd)


@pytest.mark.requires("root")
@pytest.mark.parametrize("design", ["v10", "bindings"])
@pytest.mark.parametrize("engine", ENGINES)
def test_its_engine_keeps_no_file(engine: str, design: str) -> None:
    with Service.start(Options(design=design)) as service, Vm(service, engine=engine) as vm:
        pid = int(vm.statistics()["pid"])
        before = descriptors(pid)
        files = [service.memfd_restricted() for _ in range(2)]
        fill(vm, files)
        assert len(descriptors(pid)) > len(before)
        vm.destroy()
        assert sorted(descriptors(pid)) == sorted(before)
        for fd in files:
            os.close(fd)


# Leftovers of each design, with a memfd's pages of 4 KiB.


@pytest.mark.parametrize(
    "design",
    ["v9", "v10", "bindings", pytest.param("folio", marks=pytest.mark.requires("orders")), "lazy"],
)
def test_what_was_punched_is_the_hosts_and_the_rest_stays_assigned(design: str) -> None:
    with guest(design) as by:
        by.touch()
        by.punch(700, 20)
        found = by.vm.destroy()
        assert found["assigned_pages"] == 1024 - 20
        assert found["violated_pages"] == 0
        assert found["direct_map"]["entries"] == {"1G": 0, "2M": 510, "4K": 1024}


@pytest.mark.parametrize("design", ["v9", "v10", "bindings", "folio", "batched", "lazy"])
def test_with_teardown_nothing_stays(design: str) -> None:
    with guest(f"{design}+teardown") as by:
        by.touch()
        found = by.vm.destroy()
        assert found["assigned_pages"] == 0
        assert found["violated_pages"] == 0


def test_a_slot_that_is_deleted_says_as_much_as_the_end() -> None:
    with guest("v10+teardown") as by:
        by.touch()
        by.vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        assert by.vm.destroy()["assigned_pages"] == 0


def test_batched_frees_pages_that_are_the_guests_still() -> None:
    with guest("batched") as by:
        by.touch()
        by.punch(700, 20)
        found = by.vm.destroy()
        assert found["violated_pages"] == 20
        (violation,) = found["violations"]
        assert (violation["start"], violation["npages"]) == (700, 20)
        assert violation["rule"].endswith("and nobody was told that it goes")
        assert [
            line.split(") ")[1].split(",")[0].split(" from")[0] for line in violation["story"]
        ] == ["mapped into the guest", "freed"]


def test_batched_is_found_out_before_the_end_too() -> None:
    with guest("batched") as by:
        by.touch()
        by.punch(512, 511)
        by.punch(1023, 1)
        found = by.vm.destroy()
        assert found["violated_pages"] == 511, "the last page was told of in time"


def test_of_what_batched_frees_the_pages_that_were_never_taken_are_not_the_guests() -> None:
    with guest("batched", first=640, npages=BLOCK) as by:
        by.touch()
        by.punch(512, 511)
        by.punch(1023, 1)
        (violation,) = by.vm.destroy()["violations"]
        assert (violation["start"], violation["npages"]) == (640, BLOCK)


def test_unmapped_pages_come_back_to_the_direct_map() -> None:
    with guest("v10", platform="snp-unmapped") as by:
        by.touch()
        by.punch(700, 20)
        found = by.vm.destroy()
        assert found["absent_pages"] == 1004
        assert found["direct_map"]["restores"] == {"1G": 0, "2M": 0, "4K": 20}


# The command.

#: Options that write the closing table as JSON to stderr, alone.
JSON = ("--quiet", "--json", "/dev/stderr")


def run(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "restrictedmem", "run", *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def test_the_table_says_what_was_left_behind() -> None:
    text = run("--platform", "snp", "--memory", "4M", "spin", "touch")
    rows = {line[:19].strip(): line[19:] for line in text.splitlines()}
    assert rows["platform, design"] == "snp, v10"
    assert rows["direct map"] == "0 of 1G, 510 of 2M, 1024 of 4K"
    assert rows["RMP"] == "1024 PVALIDATE 4K, 1024 RMPUPDATE 4K"
    assert rows["left assigned"] == "1024 pages (4 MiB)"
    assert "rules violated" not in rows


def test_json_has_all_of_it() -> None:
    found = json.loads(
        run(
            "--platform",
            "snp",
            "--design",
            "v10+teardown",
            "--memory",
            "4M",
            *JSON,
            "spin",
            "touch",
        )
    )
    assert found["design"] == "v10+teardown"
    assert found["platform"]["assigned_pages"] == 0
    assert found["platform"]["direct_map"]["splits"] == {"1G": 1, "2M": 2, "4K": 0}
    assert found["pages_taken"] == 1024, "the engine's statistics are those before the end"


def test_a_guest_that_converts_keeps_the_rules_of_the_default_design() -> None:
    found = json.loads(run("--platform", "snp", "--memory", "4M", *JSON, "convert"))["platform"]
    assert found["violated_pages"] == 0
    assert found["rmp_operations"]["RMPUPDATE 4K"] > 1024, "pages came and went"


def test_a_violated_rule_is_told_as_a_story_and_by_the_status() -> None:
    text = run("--platform", "snp", "--design", "batched", "--memory", "8M", "convert", status=1)
    table, _, story = text.partition("error: rules of the platform were violated for ")
    assert "rules violated     for " in table
    assert "nobody was told that it goes: page 0x" in story
    assert "mapped into the guest from gfn 0x4" in story
    assert story.rstrip().endswith("freed, and written by the host")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--platform", "tdx"], "invalid choice"),
        (["--design", "v11"], "no design 'v11'"),
        (["--backing", "paper"], "invalid choice"),
        (["--platform", "snp", "--engine", "kernel"], "--platform is for the software engine"),
        (["--pin", "--engine", "kernel"], "--pin is for the software engine"),
        (["--backing", "thp", "--engine", "kernel"], "--backing is for the software engine"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_starts(
    arguments: list[str], words: str
) -> None:
    assert words in run(*arguments, "sha256", status=2)


def test_a_server_has_its_own_design(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTRICTEDMEM_SERVER", "/nowhere")
    assert "RESTRICTEDMEM_SERVER names another" in run("--design", "v10", "sha256", status=2)


def test_a_proof_has_no_platform() -> None:
    assert "not with --prove" in run("--prove", "--platform", "snp", status=2)
