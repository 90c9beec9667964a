"""One contract over both engines: what an owner and a guest may rely on, whichever runs the guest.

Where the engines differ, the difference has a key in ``DIFFERENCES`` (both_engines.py) and a row in
docs/reference/engines.md. Ports, faults and memory have files of their own, test_engines_*.py.
"""

import contextlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from both_engines import (
    CALL,
    CODE,
    DATA,
    DEADLINE,
    DIFFERENCES,
    ENGINES_MD,
    NUMBER,
    PRIVATE,
    SHARED,
    STACK,
    Machine,
    assembled,
    engine,
    errno_of,
    machine,
    make_machine,
    service,
    word,
)
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.protocol.exits import Hypercall
from restrictedmem.service.client import Service
from waiting import wait_until

__all__ = ["engine", "machine", "service"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096
MIB: Final = 1 << 20

EPERM = 1


def test_every_difference_has_its_row() -> None:
    table = ENGINES_MD.read_text(encoding="utf-8").split("## Differences")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| `([a-z-]+)` \|.*\| `(test_engines\w*\.py)::(\w+)`(?:, `test_\w+\.py::\w+`)* \|$",
        table,
        re.MULTILINE,
    )
    assert sorted(key for key, _, _ in rows) == sorted(DIFFERENCES)
    for _, file, test in rows:
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}::{test}"


# Hypercalls and registers.


def test_hypercall(machine: Machine) -> None:
    exit_ = machine.start(
        "b807000000",  # mov eax, 7
        "be02000000",  # mov esi, 2
        "ba03000000",  # mov edx, 3
        "41ba04000000",  # mov r10d, 4
        "b900001000ffd1",  # mov ecx, HYPERCALL_PAGE; call rcx
        "4889c7",  # mov rdi, rax
        "4889e6",  # mov rsi, rsp
        CALL,
    )
    assert exit_ == Hypercall(7, (DATA, 2, 3, 4))
    assert machine.vcpu.run(-38) == Hypercall(NUMBER, ((1 << 64) - 38, STACK, 3, 4))


def test_registers_are_what_they_are_at_reset(machine: Machine) -> None:
    exit_ = machine.start(
        "4c09fb",  # or rbx, r15
        "4809eb",  # or rbx, rbp
        "4809d8",  # or rax, rbx
        "4889c2",  # mov rdx, rax
        "4989f2",  # mov r10, rsi
        CALL,
        rsi=0x55,
    )
    assert exit_ == Hypercall(NUMBER, (DATA, 0x55, 0, 0x55))


# Several vCPUs, and stopping them.


def test_atomic_increments_of_all_vcpus_add_up(machine: Machine) -> None:
    count = 200_000
    code = assembled(
        f"b9{count.to_bytes(4, 'little').hex()}",  # mov ecx, count
        "f048ff07",  # lock inc qword [rdi]
        "e2fa",  # loop
        "488b37",  # mov rsi, [rdi]
        CALL,
    )
    machine.vm.launch_update(CODE, code.ljust(PAGE, b"\xf4"))
    with contextlib.ExitStack() as stack:
        vcpus = [machine.vcpu, *(stack.enter_context(machine.vm.create_vcpu()) for _ in range(2))]
        for index, vcpu in enumerate(vcpus):
            vcpu.set_regs(rip=CODE, rsp=STACK - index * PAGE // 2, rdi=DATA)
        with ThreadPoolExecutor(len(vcpus)) as pool:
            runs = [pool.submit(vcpu.run) for vcpu in vcpus]
            seen = [word(run.result(DEADLINE)) for run in runs]
    assert max(seen) == count * len(vcpus)


def test_a_stop_request_ends_an_endless_loop(machine: Machine) -> None:
    machine.vm.launch_update(
        CODE, assembled("488b07", "4885c0", "74f8", "4889c6", CALL).ljust(PAGE, b"\xf4")
    )  # until [rdi] is not 0
    machine.vcpu.set_regs(rip=CODE, rsp=STACK, rdi=SHARED)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(machine.vcpu.run)
        machine.vcpu.interrupt()
        assert running.result(DEADLINE) == exits.Interrupted()
        # Before the run it is not lost, and one is enough for one.
        machine.vcpu.interrupt()
        assert machine.vcpu.run() == exits.Interrupted()
        machine.window[0] = 7
        assert word(pool.submit(machine.vcpu.run).result(DEADLINE)) == 7


def test_conversions_and_punches_under_a_running_guest(machine: Machine) -> None:
    """A guest that stores all over 2 MiB goes on while pages change halves and vanish under it."""
    code = assembled(
        "89fb",  # mov ebx, edi
        "b900020000",  # mov ecx, 512
        "c60301",  # mov byte [rbx], 1
        "81c300100000",  # add ebx, 4096
        "e2f5",  # loop
        "a00000001000000000",  # mov al, [SHARED]
        "84c0",  # test al, al
        "74e1",  # jz the first
        "89c6",  # mov esi, eax
        CALL,
    )
    machine.vm.launch_update(CODE, code.ljust(PAGE, b"\xf4"))
    at = PRIVATE + 2 * MIB
    machine.vcpu.set_regs(rip=CODE, rsp=STACK, rdi=at)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(machine.vcpu.run)
        for turn in range(20):
            machine.vm.convert(at + turn * 16 * PAGE, 64 * PAGE, private=bool(turn % 2))
            machine.punch(at + MIB, 16 * PAGE)
        machine.vm.convert(at, 2 * MIB, private=False)
        wait_until(
            lambda: all(machine.half[2 * MIB : 4 * MIB : PAGE]),
            "the guest's stores to the shared half",
        )
        machine.window[0] = 1
        assert isinstance(running.result(DEADLINE), Hypercall)


# Abilities of some engines.


def test_prefault(machine: Machine) -> None:
    assert isinstance(machine.start(CALL), Hypercall)
    try:
        found = machine.vcpu.pre_fault_memory(DATA, PAGE)
    except OSError as error:
        found = error.errno or 0
    assert (found,) == machine.expect("prefault")


def test_memory_failure(machine: Machine) -> None:
    assert (errno_of(machine.vm.inject_failure, DATA),) == machine.expect("memory-failure")


# Launch, report and policy.


def test_the_measurement_does_not_depend_on_the_engine(service: Service) -> None:
    pytest.importorskip("unicorn")
    found: set[bytes] = set()
    for name in ("software", *(["kernel"] if os.access("/dev/kvm", os.W_OK) else [])):
        with make_machine(service, name) as machine:
            machine.vm.launch_update(CODE, assembled(CALL).ljust(PAGE, b"\xf4"))
            fd = service.memfd_restricted()
            machine.vm.set_user_memory_region(
                slot=2,
                guest_phys_addr=PRIVATE + 64 * MIB,
                memory_size=PAGE,
                restricted_fd=fd,
                readonly=True,
            )
            os.close(fd)
            machine.vm.convert(PRIVATE + 64 * MIB, PAGE, private=True)
            machine.vm.launch_update(PRIVATE + 64 * MIB, b"a" * PAGE)
            machine.vcpu.set_regs(rip=CODE, rsp=STACK)
            found.add(machine.vm.launch_finish())
            assert errno_of(machine.vm.launch_update, CODE, bytes(PAGE)) == EPERM
    assert len(found) == 1


def test_the_report_page_is_the_guest_s_and_not_the_owner_s(machine: Machine) -> None:
    exit_ = machine.start(
        "bb00101000",  # mov ebx, REPORT_PAGE
        "8b33",  # mov esi, [rbx]
        "c7032a000000",  # mov dword [rbx], 42
        "8b13",  # mov edx, [rbx]
        CALL,
    )
    assert exit_ == Hypercall(NUMBER, (DATA, 0, 42, 0))
    assert errno_of(machine.vm.read_memory, guest_abi.REPORT_PAGE, 4) == EPERM


def test_registers_and_memory_are_open_under_a_debug_policy_alone(
    service: Service, engine: str
) -> None:
    for debug in (False, True):
        with make_machine(service, engine, debug=debug) as machine:
            assert isinstance(machine.start("c7072a000000", CALL), Hypercall)  # mov dword [rdi], 42
            if not debug:
                assert (
                    errno_of(machine.vm.read_memory, DATA, 4)
                    == errno_of(machine.vcpu.get_regs)
                    == EPERM
                )
                continue
            assert machine.vm.read_memory(DATA, 4) == (42).to_bytes(4, "little")
            machine.vm.write_memory(DATA + 1, b"\1")
            assert machine.vm.read_memory(DATA, 2) == b"\x2a\1"
            assert machine.vcpu.get_regs().rdi == DATA


def test_steps_and_breakpoints(service: Service, engine: str) -> None:
    with make_machine(service, engine, debug=True) as machine:
        machine.vm.launch_update(CODE, assembled("90", "ffc7", "ffc7", CALL).ljust(PAGE, b"\xf4"))
        machine.vcpu.set_regs(rip=CODE, rsp=STACK)
        machine.vcpu.set_guest_debug(step=True)
        assert machine.vcpu.run() == exits.Debug(exits.SINGLE_STEP, CODE + 1, exits.DR6_BS)
        machine.vcpu.set_guest_debug(breakpoints=[CODE + 5])
        assert machine.vcpu.run() == exits.Debug(exits.BREAKPOINT, CODE + 5)
        machine.vcpu.set_guest_debug()
        assert machine.vcpu.run() == Hypercall(NUMBER, (2, 0, 0, 0))


def test_statistics(machine: Machine) -> None:
    assert isinstance(machine.start("c647012a", CALL), Hypercall)  # mov byte [rdi + 1], 42
    before = machine.vm.statistics()
    machine.punch(PRIVATE, 4 * MIB)
    after = machine.vm.statistics()
    assert after["engine"] == machine.engine
    assert after["invalidations"] - before["invalidations"] == 1
    assert after["pages_freed"] - before["pages_freed"] >= 2
    assert 2 <= after["pages_taken"] <= 64
    assert ("faults_private" in after,) == machine.expect("fault-counts")


def test_an_unknown_exit_has_a_value_of_its_own() -> None:
    assert exits.unpack(exits.LAYOUT.pack(77, 0, 0, 0, 0, 0, 0, 0)) == exits.Unknown(77)
