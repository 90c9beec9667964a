"""The effects of an invalid instruction before #UD, on both engines.

The processor has to fetch it whole, and it must not touch any memory.
"""

from collections.abc import Iterator
from typing import Final

import pytest

import emulation
from both_engines import MIB, PAGE, PRIVATE, STACK, Machine, make_machine, missing_page
from restrictedmem.protocol.exits import Exit, Shutdown
from restrictedmem.service.client import Service

pytestmark = pytest.mark.requires("fuse")

#: No slot covers it.
NOWHERE: Final = 0xD000_0000
#: The page behind the private memory of ``make_machine``.
MISSING: Final = PRIVATE + 4 * MIB
INVALID: Final = Shutdown(6)
LOCKABLE: Final = (
    *(
        "0003",
        "0903",
        "1103",
        "1803",
        "2003",
        "2903",
        "3103",
    ),  # add, or, adc, sbb, and, sub, xor of [rbx] and a register
    *("803301", "81330100", "8303ff"),  # xor, xor, add of [rbx] and a number
    *("8603", "8703", "f613", "f71b", "fe03", "ff0b"),  # xchg, not, neg, inc, dec
    *("0fab03", "0fb303", "0fbb03", "0fba2b01", "0fba3301", "0fba3b01"),  # bts, btr, btc
    *(
        "0fb003",
        "0fb103",
        "0fc003",
        "0fc103",
        "0fc70b",
        "480fc70b",
    ),  # cmpxchg, xadd, cmpxchg8b, cmpxchg16b
)
NOT_LOCKABLE: Final = (
    *("0203", "0303", "0b03", "1303", "1b03", "2303", "2b03", "3303"),  # arithmetic to a register
    *("3803", "3903", "3b03", "803b01", "833b01"),  # cmp
    *("8403", "8503", "f60301", "f70301000000"),  # test
    *("f623", "f733", "f63b", "ff33", "ff23", "ff13"),  # mul, div, idiv, push, jmp, call
    *("8803", "8b03", "c60301", "8f03", "d103", "c12b01"),  # mov, pop, rol, shr
    *(
        "0fa303",
        "0fba2301",
        "0faf03",
        "0fb603",
        "0fbc03",
        "0f9403",
        "0f4403",
    ),  # bt, imul, movzx, bsf, setz, cmovz
    *("0f38f003", "0f38f103", "660f3a0b0301", "0f1003", "0fc303"),  # movbe, roundsd, movups, movnti
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture
def machine(service: Service, engine: str) -> Iterator[Machine]:
    with make_machine(service, engine) as found:
        yield found


@pytest.fixture(
    params=["software", pytest.param("kernel", marks=pytest.mark.requires("processor"))]
)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def at(machine: Machine, address: int, code: str) -> Exit:
    """Run one instruction with RBX at an address."""
    return machine.start(f"bb{address.to_bytes(4, 'little').hex()}", code)  # mov ebx, address


@pytest.mark.parametrize("address", [MISSING, NOWHERE], ids=["missing", "nowhere"])
@pytest.mark.parametrize(
    "code",
    [
        *(f"f0{code}" for code in NOT_LOCKABLE),
        *("ff3b", "0fba0301", "0fba1b01"),  # what is undefined of groups 5 and 8
    ],
)
def test_what_is_invalid_touches_nothing(machine: Machine, code: str, address: int) -> None:
    missing_page(machine, MISSING, b"")
    assert at(machine, address, code) == INVALID


@pytest.mark.parametrize("code", LOCKABLE)
def test_what_can_be_locked_touches_memory(machine: Machine, code: str) -> None:
    missing = missing_page(machine, MISSING, b"")
    assert at(machine, MISSING, f"f0{code}") == missing


#: Each with how many of its bytes are needed: another may follow that is none of its own.
FETCHED: Final = (
    *(
        "82 00 ff",
        "8200ff",
        "62 03",
        "6243 08",
        "8e 33",
        "8eb3000000 00",
        "c6 cb 00",
        "c78b 0000000000000000",
    ),
    *(
        "66c7cb 0000",
        "9a 000000000000",
        "ea000000000000",
        "669a 00000000",
        "d4 0a",
        "d50a",
        "fe 13",
        "fe 9424 00000000",
        "06",
        "27",
        "d6",
    ),
    *(
        "0fc7 14 25 00000000",
        "f30f6c c0",
        "0fb8 c3",
        "f20fc6 c3 00",
        "0f0b",
        "0f04",
        "0f36",
        "0fb9",
        "0fff",
    ),
    *(
        "0f380c c3",
        "f30f38 fa 00",
        "f30f3a 0f c3 00",
        "66c5 fc58 c0",
        "66c4 e278f3 c3",
        "f00303",
        "f0038300 000000",
    ),
)


@pytest.mark.parametrize("code", FETCHED)
@pytest.mark.parametrize(
    "engine", ["software", pytest.param("kernel", marks=pytest.mark.requires("amd"))]
)
def test_what_is_invalid_is_fetched_whole(service: Service, engine: str, code: str) -> None:
    """Up to the page's end, wherever it is cut; the next page is needed for no more than that."""
    if engine == "kernel" and code.startswith("62") and emulation.has("avx512f"):
        pytest.skip("62 begins a longer instruction here (EVEX): docs/reference/engines.md")
    whole = bytes.fromhex(code)
    cuts = [len(bytes.fromhex(code[:index])) for index, letter in enumerate(code) if letter == " "]
    for inside in (*cuts, len(whole)):
        with make_machine(service, engine) as machine:
            missing = missing_page(machine, MISSING, whole[inside:])
            machine.vm.launch_update(MISSING - PAGE, b"\xf4" * (PAGE - inside) + whole[:inside])
            machine.vcpu.set_regs(rip=MISSING - inside, rsp=STACK)
            if inside < len(whole):
                assert machine.vcpu.run() == machine.vcpu.run() == missing
                machine.vm.convert(MISSING, PAGE, private=True)
            assert machine.vcpu.run() == INVALID
