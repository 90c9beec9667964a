"""The measurement of a launch by itself, and the states of the launch."""

import struct
from dataclasses import dataclass, replace
from hashlib import sha384

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launching import GPA, errno_of
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.kvm.launch import Launch
from restrictedmem.protocol.measurement import Measurement, measure

MIB = 1 << 20
PAGE = 4096
EIO = 5


# The measurement itself.


@dataclass(frozen=True)
class Launched:
    """All that a measurement is made of."""

    policy: int
    pages: tuple[tuple[int, bytes], ...]
    registers: tuple[tuple[int, ...], ...]
    private: tuple[tuple[int, int, int, int], ...]

    def measured(self) -> bytes:
        return measure(
            self.policy,
            self.pages,
            [kvm_regs.from_buffer_copy(struct.pack("<18Q", *regs)) for regs in self.registers],
            self.private,
        )

    def by_the_book(self) -> bytes:
        """Compute it as docs/use/reports.md has it, from nothing of the package."""
        value = sha384(b"restrictedmem launch 1\0" + struct.pack("<II", self.policy, 0)).digest()
        for gpa, content in self.pages:
            for start in range(0, len(content), PAGE):
                digest = sha384(content[start : start + PAGE]).digest()
                value = sha384(value + struct.pack("<IIQ", 1, 0, gpa + start) + digest).digest()
        for number, regs in enumerate(self.registers):
            value = sha384(
                value
                + struct.pack("<IIQ", 2, 0, number)
                + sha384(struct.pack("<18Q", *regs)).digest()
            ).digest()
        for gpa, *rest in sorted(self.private):
            value = sha384(
                value + struct.pack("<IIQ", 3, 0, gpa) + sha384(struct.pack("<QQQ", *rest)).digest()
            ).digest()
        return value


VECTORS = {
    "nothing": (
        Launched(0, (), (), ()),
        "71a1eb64f794590096cb3140cf374fe956fa75f8e2023db4797f4910000422a99ea4cbb8a5c497ce4c60bc1239346994",
    ),
    "a page": (
        Launched(0, ((GPA, bytes(range(256)) * 16),), (), ()),
        "85b73019e1b82861cd370d2ba8bb11863f949beeb862b091f14226f56e19f1da51179f37b90fd0dbb807684d2a4dedb0",
    ),
    "all there is": (
        Launched(
            3,
            ((GPA, b"\x90" * 2 * PAGE), (GPA, bytes(PAGE))),
            (tuple(range(18)), (0,) * 18),
            ((GPA, MIB, 0, 2),),
        ),
        "bd1bbf9eef2a85796eba17f2aab417df66fdc8c711fb9202c0705bedbc35e0a8ee74cf204de4d89fca8cb68117500ffa",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_recorded_measurements(name: str) -> None:
    launched, recorded = VECTORS[name]
    assert launched.measured().hex() == recorded
    assert launched.by_the_book().hex() == recorded


_PAGES = st.tuples(
    st.integers(0, 1 << 32).map(lambda gfn: gfn * PAGE),
    st.binary(min_size=1, max_size=8).map(lambda data: data.ljust(PAGE, b"\0")),
)
_REGISTERS = st.tuples(*[st.integers(0, (1 << 64) - 1)] * 18)
_RUNS = st.tuples(
    *[st.integers(0, 1 << 32).map(lambda page: page * PAGE)] * 3, st.sampled_from((0, 2))
)
LAUNCHES = st.builds(
    Launched,
    st.integers(0, 3),
    st.lists(_PAGES, max_size=4).map(tuple),
    st.lists(_REGISTERS, max_size=2).map(tuple),
    st.lists(_RUNS, max_size=2, unique_by=lambda run: run[0]).map(lambda runs: tuple(sorted(runs))),
)


@given(LAUNCHES)
def test_measurements_by_the_book(launched: Launched) -> None:
    assert launched.measured() == launched.by_the_book()


@given(LAUNCHES, LAUNCHES)
def test_another_launch_has_another_measurement(one: Launched, other: Launched) -> None:
    assert (one.measured() == other.measured()) == (one == other)


@given(
    LAUNCHES.filter(lambda launched: launched.pages and launched.registers and launched.private),
    st.data(),
)
def test_every_change_of_a_launch_changes_the_measurement(
    launched: Launched, data: st.DataObject
) -> None:
    gpa, content = page = data.draw(st.sampled_from(launched.pages))
    at, bit = data.draw(st.integers(0, PAGE - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    index = launched.pages.index(page)

    def with_page(*instead: tuple[int, bytes]) -> Launched:
        return replace(
            launched, pages=(*launched.pages[:index], *instead, *launched.pages[index + 1 :])
        )

    regs = list(launched.registers[0])
    regs[data.draw(st.integers(0, 17))] ^= 1 << data.draw(st.integers(0, 63))
    run, *runs = launched.private
    others = [
        replace(launched, policy=launched.policy ^ 1 << data.draw(st.integers(0, 31))),
        with_page((gpa, bytes(changed))),
        with_page((gpa ^ PAGE << data.draw(st.integers(0, 30)), content)),
        with_page(),
        with_page(page, page),
        replace(launched, registers=(tuple(regs), *launched.registers[1:])),
        replace(launched, registers=(*launched.registers, (0,) * 18)),
        replace(launched, private=((run[0], run[1] ^ PAGE, *run[2:]), *runs)),
        replace(launched, private=((*run[:2], run[2] ^ PAGE, run[3]), *runs)),
        replace(launched, private=((*run[:3], run[3] ^ 2), *runs)),
        replace(launched, private=tuple(runs)),
    ]
    if launched.pages != launched.pages[::-1]:
        others.append(replace(launched, pages=launched.pages[::-1]))
    assert launched.measured() not in [other.measured() for other in others]


def test_the_same_words_as_another_record_are_not_the_same() -> None:
    page, regs = bytes(PAGE), kvm_regs()
    as_page, as_registers = Measurement(0), Measurement(0)
    as_page.add_pages(0, bytes(regs).ljust(PAGE, b"\0"))
    as_registers.set_registers(0, regs)
    assert as_page.finish(()) != as_registers.finish(())
    assert measure(0, [(0, page)], [], ()) != measure(0, [], [], [(0, 0, 0, 0)])


# Its states.


def test_a_launch_is_open_until_it_is_finished() -> None:
    said: list[bytes] = []
    launch = Launch(0, tuple, said.append)
    with launch.opened() as measurement:
        measurement.add_pages(0, bytes(PAGE))
    first = launch.finish()
    assert first == measure(0, [(0, bytes(PAGE))], [], ()) == launch.finish()
    assert said == [first]
    with pytest.raises(PermissionError), launch.opened():
        pytest.fail("it was opened again")


def test_registers_count_as_they_were_set_last_and_in_the_order_of_vcpus() -> None:
    launch = Launch(0, tuple, lambda _: None)
    with launch.opened() as measurement:
        for vcpu, rip in ((1, 5), (0, 6), (1, 7)):
            measurement.set_registers(vcpu, kvm_regs(rip=rip))
    assert launch.finish() == measure(0, [], [kvm_regs(rip=6), kvm_regs(rip=7)], ())


def test_what_cannot_be_announced_is_not_finished() -> None:
    failures = [OSError(EIO, "the service is gone")]

    def announce(_: bytes) -> None:
        if failures:
            raise failures.pop()

    launch = Launch(0, tuple, announce)
    with launch.opened() as measurement:
        measurement.set_registers(0, kvm_regs(rip=1))
    assert errno_of(launch.finish) == EIO
    assert launch.finish() == measure(0, [], [kvm_regs(rip=1)], ())
