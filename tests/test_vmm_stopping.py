"""The small VMM is stopped, and what goes wrong with its streams."""

import os
import signal
from typing import Final

import pytest

from package_guests import engine, load, run, service, talk
from processes import high
from restrictedmem.service.client import Service
from restrictedmem.vmm.vmm import Vmm
from waiting import wait_until

__all__ = ["engine", "service"]

pytestmark = pytest.mark.requires("fuse")

MIB: Final = 1 << 20

EPIPE = 32


@pytest.mark.parametrize("vcpus", [1, 3])
def test_stop_ends_what_loops(service: Service, engine: str, vcpus: int) -> None:
    with Vmm(MIB, service, engine=engine, vcpus=vcpus) as vmm:
        guest = talk(load(vmm, "spin", "loop"))
        wait_until(lambda: len(vmm._driven) == vcpus, "every vCPU to be driven")
        vmm.stop()
        assert guest.end().interrupted


def test_stop_ends_a_wait_for_input(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        guest = talk(load(vmm, "seal"))
        assert len(guest.ask("sign abc")) == 64
        vmm.stop()
        assert guest.end().interrupted


def test_stop_by_a_descriptor_with_a_high_number(service: Service) -> None:
    with Vmm(MIB, service) as vmm, high(vmm._over) as over:
        low, vmm._over = vmm._over, over.fileno()
        guest = talk(load(vmm, "spin", "loop"))
        vmm.stop()
        assert guest.end().interrupted
        vmm._over = low


def test_stop_before_the_run(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        load(vmm, "spin", "loop")
        vmm.stop()
        assert run(vmm).ended.interrupted


def test_stop_from_a_signal_handler(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        load(vmm, "spin", "loop")

        def stop(_number: int, _frame: object) -> None:
            vmm.stop()

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            assert run(vmm).ended.interrupted
        finally:
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_an_exception_of_a_handler_comes_out_of_run(
    service: Service, engine: str, vcpus: int
) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with Vmm(MIB, service, engine=engine, vcpus=vcpus) as vmm:
        load(vmm, "spin", "loop")
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(KeyboardInterrupt):
                run(vmm)
        finally:
            signal.signal(signal.SIGALRM, before)


def test_an_error_of_a_stream_comes_out_of_run(service: Service, engine: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with (
        Vmm(MIB, service, engine=engine, vcpus=2) as vmm,
        open(writer, "wb", buffering=0) as out,
        open(os.devnull, "rb", buffering=0) as null,
        pytest.raises(OSError, match=os.strerror(EPIPE)) as caught,
    ):
        load(vmm, "sha256").run(null, out, out)
    assert caught.value.errno == EPIPE
