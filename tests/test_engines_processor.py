"""The processor as a guest sees it, on both engines.

Each difference has a row in docs/reference/engines.md, and a key here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

import emulation
from both_engines import (
    CALL,
    EACCES,
    ENGINES_MD,
    MIB,
    PAGE,
    PRIVATE,
    SHARED,
    make_machine,
    missing_page,
    shared_memory,
)
from restrictedmem.abi.kvm import ExitReason
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import Exit, Hypercall, MemoryFault, MmioWrite, Shutdown
from restrictedmem.service.client import Service

pytestmark = pytest.mark.requires("fuse")

#: Selectors that Linux's table lets a process load: user data, user code, and the segment whose
#: limit is the processor's number.
HOST_SELECTORS: Final = (*range(0x28, 0x2C), *range(0x30, 0x34), *range(0x78, 0x7C))
#: By key, the software engine's answers and the kernel engine's: sets of what may come, None where
#: the guest goes on.
DIFFERENCES: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "iopl": {"software": ({0},), "kernel": ({0, 3},)},
    # The selectors of GS, FS, ES, DS, SS and CS; those that may be loaded; and the result of a far
    # return to the host's for user code.
    "selectors": {
        "software": ({"1b0023"}, [()], {Shutdown(13)}),
        "kernel": ({"2b0033", "1b0023"}, [(), HOST_SELECTORS], {None, Shutdown(13)}),
    },
    "descriptor-tables": {
        "software": ({(0x31, 0)}, {(0, 0)}, [{0}, {0}, {0}]),
        "kernel": ({Shutdown(6), Shutdown(13)}, {Shutdown(6), Shutdown(13)}, [{0}, {0}, {0, 1}]),
    },
    "processor": {"software": ({Shutdown(6)},), "kernel": ({None, Shutdown(6)},)},
    "stack-not-canonical": {
        "software": ({Shutdown(13)},),
        "kernel": ({Shutdown(13), exits.Unknown(ExitReason.INTERNAL_ERROR)},),
    },
    "base-not-canonical": {"software": ({None},), "kernel": ({Shutdown(6), Shutdown(13)},)},
    "cmpxchg-upper-half": {
        "software": (5, 0x2222_2222),
        "kernel": (5 | 0xFFFF_FFFF << 32, 0x1111_1111_2222_2222),
    },
    "bit-scan-of-zero": {"software": (0xFFFF_FFFF,), "kernel": (0xFFFF_FFFF_FFFF_FFFF,)},
    "invalid-lock": {"software": (None,), "kernel": (Shutdown(6),)},
    "undefined-opcodes": {"software": (None, Shutdown(6)), "kernel": (Shutdown(6), None)},
    "opcodes-of-one-vendor": {
        "software": (None, Shutdown(6)),
        "kernel": (None, Shutdown(6)) if emulation.is_amd() else (Shutdown(6), None),
    },
    "alignment": {
        "software": ({None}, {None}),
        "kernel": ({Shutdown(6), Shutdown(13)}, {None, Shutdown(17)}),
    },
    "sse-and-x87": {
        "software": ({None}, {None}, 0),
        "kernel": ({Shutdown(19)}, {Shutdown(6), Shutdown(13)}, 0xFFFF),
    },
    "rotate-read-only": {
        "software": (MmioWrite(SHARED + MIB, 4, 2),),
        "kernel": (MemoryFault(0, SHARED + MIB, PAGE, EACCES),),
    },
    "partial-stores": {"software": (b"\xff" * 8,), "kernel": (bytes(8),)},
}


@dataclass
class Programs:
    """Runs each in a VM of its own."""

    service: Service
    engine: str

    def expect(self, key: str) -> tuple[Any, ...]:
        return DIFFERENCES[key][self.engine]

    def run(self, *code: str) -> Exit:
        """Run code from private memory, with rdi and rbx at DATA, to its first exit."""
        with make_machine(self.service, self.engine) as machine:
            return machine.start("4889fb", *code)  # mov rbx, rdi

    def run_shared(self, *code: str) -> Exit:
        with make_machine(self.service, self.engine) as machine:
            return machine.start_shared("4889fb", *code)

    def end(self, *code: str) -> Exit | None:
        """Return how code in private memory ends: None when it comes to its end."""
        exit_ = self.run(*code, CALL)
        return None if isinstance(exit_, Hypercall) else exit_

    def said(self, *code: str) -> tuple[int, int]:
        """Return what code in private memory leaves in rdi and rsi, which are 0 at first."""
        exit_ = self.run("31ff", "31f6", *code, CALL)
        assert isinstance(exit_, Hypercall), exit_
        return exit_.arguments[:2]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture(
    params=["software", pytest.param("kernel", marks=pytest.mark.requires("processor"))]
)
def programs(service: Service, request: pytest.FixtureRequest) -> Programs:
    return Programs(service, request.param)


def test_every_difference_has_its_row() -> None:
    table = (
        ENGINES_MD.read_text(encoding="utf-8")
        .split("## What a guest sees of the processor")[1]
        .split("\n## ")[0]
    )
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|.*\| `(\w+)` \|$", table, re.MULTILINE)
    assert sorted(key for key, _ in rows) == sorted(DIFFERENCES)
    assert [test for _, test in rows if test not in globals()] == []


#: mov rax, 1 << 47; and the same to RBP, RSI, R12 and R13.
NOT_CANONICAL: Final = "48b800000000008000004889c54889c64989c44989c5"


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("488b00", 13),  # mov rax, [rax]
        ("48894508", 12),  # mov [rbp + 8], rax
        ("4889c44889442408", 12),  # mov rsp, rax; mov [rsp + 8], rax
        ("48890468", 13),  # mov [rax + rbp * 2], rax
        ("498b4500", 13),  # mov rax, [r13]
        ("498b0424", 13),  # mov rax, [r12]
        ("64488b4500", 13),  # mov rax, fs:[rbp]
        ("3e488b4500", 12),  # mov rax, ds:[rbp]
        ("4889c4ff742408", 12),  # mov rsp, rax; push qword [rsp + 8]
        ("488d6008c3", 12),  # lea rsp, [rax + 8]; ret
        ("488d600850", 12),  # lea rsp, [rax + 8]; push rax
        ("c9", 12),  # leave
        ("ff30", 13),  # push qword [rax]
        ("8f00", "stack-not-canonical"),  # pop qword [rax]
        ("ffd0", 13),  # call rax
        ("ffe0", 13),  # jmp rax
        ("50c3", "stack-not-canonical"),  # push rax; ret
        ("a4", 13),  # movsb
        ("48a10000000000800000", 13),  # mov rax, [1 << 47]
        ("48f7d8488b40f8", 13),  # neg rax; mov rax, [rax - 8]
        ("48f7d8488b00", 14),  # neg rax; mov rax, [rax]
    ],
)
def test_addresses_that_are_not_canonical(programs: Programs, code: str, vector: int | str) -> None:
    found = programs.run_shared(NOT_CANONICAL, code)
    assert found in (programs.expect(vector)[0] if isinstance(vector, str) else {Shutdown(vector)})


def test_a_base_that_is_not_canonical(programs: Programs) -> None:
    (expected,) = programs.expect("base-not-canonical")
    for code in ("f3480faed0", "f3480faed8", "0fae38"):  # wrfsbase rax, wrgsbase rax, clflush [rax]
        assert programs.end("48b80000000000800000", code) in expected


def test_flags_at_the_start(programs: Programs) -> None:
    """IF is set; what a guest pops of the rest is what it pushes."""
    # pushf; pop rdi; push 0x207ed7; popf; pushf; pop rsi
    flags, later = programs.said("9c 5f 68d77e2000 9d 9c 5e")
    iopl = flags >> 12 & 3
    assert (flags & ~0x3000, later) == (0x246, 0x204ED7 | iopl << 12)
    assert iopl in programs.expect("iopl")[0]
    # cli; sti
    assert [programs.run_shared(code, "f4") for code in ("fa", "fb")] == [
        Shutdown(13)
    ] * 2 or iopl == 3


def test_selectors(programs: Programs) -> None:
    found, more = programs.said(
        *(
            f"48c1e710 8c{modrm} 6689c7" for modrm in ("c0", "d8", "d0", "c8")
        ),  # shl rdi, 16; mov eax, es, ds, ss, cs; mov di, ax
        *(f"48c1e610 8c{modrm} 6689c6" for modrm in ("e8", "e0")),  # the same to si, of gs and fs
    )
    shown, known, returned = programs.expect("selectors")
    assert f"{more << 64 | found:x}" in shown
    loadable = selectors_known(programs)
    assert loadable in known
    for selector in (0, 0x23, 0x28, 0x2B, 0x33, 0x63, 0x7B, 0x1000, 0xFFFF):
        for modrm in ("d8", "c0", "e0", "e8"):  # mov eax, selector; mov to ds, es, fs, gs
            goes_on = selector == 0 or selector in loadable
            loaded = programs.end(f"b8{selector.to_bytes(4, 'little').hex()}", f"8e{modrm}")
            assert (loaded is None) is goes_on, f"{selector:#x}"
    assert (
        programs.end("6a33 488d0503000000 50 48cb") in returned
    )  # push 0x33; lea rax, [rip + 3]; push rax; retf
    # A null selector can be loaded to a data segment, and nothing else.
    assert programs.end("31c0 8ed8 8ec0 8ee0 8ee8") is None  # xor eax, eax; mov ds, eax; es; fs; gs
    for code in ("31c0 8ed0", "66b80800 8ed8", "66b81b00 8ed8"):  # ss of 0; ds of 8 and 0x1b
        assert programs.run_shared(code) == Shutdown(13)


def selectors_known(programs: Programs) -> tuple[int, ...]:
    """Return the selectors, of all, that VERR knows: those that a data segment may have."""
    with make_machine(programs.service, programs.engine) as machine:
        # xor ecx, ecx; 1: verr cx; setz [rbx + rcx]; inc ecx; cmp ecx, 65536; jne 1b
        code = "31c9 0f00e1 0f94040b ffc1 81f900000100 75ef"
        assert isinstance(machine.start("bb00000010", code, CALL), Hypercall)  # mov ebx, SHARED
        return tuple(
            selector for selector, is_known in enumerate(machine.window[: 1 << 16]) if is_known
        )


def test_descriptor_tables(programs: Programs) -> None:
    control, limits, known = programs.expect("descriptor-tables")
    for code, expected in (
        ("480f01e7 0f00ce", control),  # smsw rdi; str esi
        (
            "0f0103 0f014b10 0fb73b 0fb77310",
            limits,
        ),  # sgdt [rbx]; sidt [rbx + 16]; movzx edi, [rbx]; esi, [rbx + 16]
    ):
        assert (programs.end(code) or programs.said(code)) in expected
    for selector, wanted in zip((0x08, 0x23, 0x28), known, strict=True):
        # mov ecx, selector; lsl eax, ecx; setz dil
        assert programs.said(f"b9{selector:02x}000000 0f03c1 400f94c7")[0] in wanted


def test_x87_and_sse_at_the_start(programs: Programs) -> None:
    """As the ABI has it: long double has 64 bits, and nothing is raised."""
    assert programs.said("d93b 0fae5b08 0fb73b 8b7308") == (
        0x37F,
        0x1F80,
    )  # fnstcw [rbx]; stmxcsr [rbx + 8]; load both
    # fld1; mov dword [rbx], 3; fidiv dword [rbx]; fstp tbyte [rbx]; mov rdi, [rbx]
    assert programs.said("d9e8 c70303000000 da33 db3b 488b3b")[0] == 0xAAAA_AAAA_AAAA_AAAB
    # fldcw of 0x37b; fld1; fldz; fdivp; fwait
    assert programs.end("c7037b030000 d92b d9e8 d9ee def9 9b") == Shutdown(16)


def test_sse_and_x87(programs: Programs) -> None:
    raised, reserved, upper = programs.expect("sse-and-x87")
    # ldmxcsr of 0x1d80; xorps xmm0, xmm0; mov eax, 1; cvtsi2ss xmm1, eax; divss xmm1, xmm0
    assert programs.end("c703801d0000 0fae13 0f57c0 b801000000 f30f2ac8 f30f5ec8") in raised
    assert programs.end("c703ffffffff 0fae13") in reserved  # ldmxcsr of 0xffffffff
    assert programs.said("d933 0fb77b02")[0] == upper  # fnstenv [rbx]; movzx edi, word [rbx + 2]


def test_the_processor(programs: Programs) -> None:
    """Each feature that CPUID shows works, and no other does.

    The remaining bits are the machine's.
    """
    assert programs.end("f30fc7f8") in programs.expect("processor")[0]  # rdpid rax
    if programs.engine == "software":
        # mov eax, 7; xor ecx, ecx; cpuid; mov edi, ebx; after that rbx is nobody's
        features, _ = programs.said("b807000000 31c9 0fa2 89df")
        for bit, code in (
            (19, "660f38f6c0"),
            (5, "c5fc58c0"),
            (23, "660fae3b"),
            (24, "660fae33"),
        ):  # adcx, vaddps, clflushopt, clwb
            assert (features >> bit & 1, programs.end(code)) == (0, Shutdown(6))


def test_the_upper_half_of_cmpxchg(programs: Programs) -> None:
    equal, unequal = programs.expect("cmpxchg-upper-half")
    setup = (
        "48b805000000ffffffff 48be2222222211111111 b909000000"  # mov rax, …; mov rsi, …; mov ecx, 9
    )
    assert (
        programs.said(setup, "c70305000000 0fb10b 4889c7")[0] == equal
    )  # mov dword [rbx], 5; cmpxchg [rbx], ecx; mov rdi, rax
    assert programs.said(setup, "0fb1ce")[1] == unequal  # cmpxchg esi, ecx


def test_bit_scan_of_zero(programs: Programs) -> None:
    (expected,) = programs.expect("bit-scan-of-zero")
    for opcode in ("0fbc", "0fbd"):  # bsf edi, esi; bsr edi, esi
        assert programs.said("48c7c7ffffffff", f"{opcode}fe")[0] == expected


@pytest.mark.parametrize(
    "code", ["f08903", "f0d123", "f00f9203", "f0480fba2301", "f0f70301000000", "f087c1", "f050"]
)
def test_lock_on_what_cannot_be_locked(programs: Programs, code: str) -> None:
    """A store, a shift, SETcc, BT, TEST, XCHG of registers, PUSH."""
    assert programs.end(code) == programs.expect("invalid-lock")[0]


@pytest.mark.parametrize("code", ["f001c1", "f03903"])  # lock add ecx, eax; lock cmp [rbx], eax
def test_lock_is_refused(programs: Programs, code: str) -> None:
    assert programs.end(code) == Shutdown(6)


@pytest.mark.parametrize(("code", "index"), [("8fd0", 0), ("f6c801", 1)])
def test_opcodes_that_are_not_defined(programs: Programs, code: str, index: int) -> None:
    """Two of these opcodes are 8F /2 and TEST /1."""
    assert programs.end(code) == programs.expect("undefined-opcodes")[index]


@pytest.mark.parametrize(("code", "index"), [("660f78c00101", 0), ("0f0dc0", 1)])
def test_opcodes_of_one_vendor(programs: Programs, code: str, index: int) -> None:
    """EXTRQ of SSE4a, which is AMD's; PREFETCHW of a register, which Intel's processors ignore."""
    assert programs.end(code) == programs.expect("opcodes-of-one-vendor")[index]


def test_int1_and_rdpmc(programs: Programs) -> None:
    assert programs.run_shared("f1") == Shutdown(1)
    assert programs.run_shared("0f33") == Shutdown(13)


def test_alignment(programs: Programs) -> None:
    aligned, checked = programs.expect("alignment")
    for code in (
        "0f284301",
        "660f7f4301",
        "660fe74308",
        "660ffe4304",
    ):  # movaps, movdqa, movntdq, paddd
        assert programs.end(code) in aligned
    # pushf; or dword [rsp], AC; popf; mov rax, [rbx + 1]
    assert programs.end("9c 810c2400000400 9d 488b4301") in checked


def test_rotate_in_read_only_memory(programs: Programs) -> None:
    """RCL of 1, with CF set, is 3.

    On the software engine CF is lost when the store turns out to be MMIO.
    """
    with (
        make_machine(programs.service, programs.engine) as machine,
        shared_memory(PAGE) as (fd, mapping),
    ):
        mapping[0] = 1
        machine.vm.set_user_memory_region(
            slot=2, guest_phys_addr=SHARED + MIB, memory_size=PAGE, shared_fd=fd, readonly=True
        )
        machine.vm.convert(SHARED + MIB, PAGE, private=False)
        exit_ = machine.start(
            "bb00001010", "f9", "d113"
        )  # mov ebx, SHARED + MIB; stc; rcl dword [rbx], 1
        assert exit_ == programs.expect("rotate-read-only")[0]


@pytest.mark.parametrize(
    ("store", "key"), [("488943fc", None), ("0f1143f8", "partial-stores")]
)  # mov [rbx - 4], rax; movups
def test_a_store_across_two_pages(programs: Programs, store: str, key: str | None) -> None:
    """The second page is missing, and the test reads the first page.

    Of a store of 8 bytes, no engine has stored any.
    """
    with make_machine(programs.service, programs.engine, debug=True) as machine:
        page = PRIVATE + 4 * MIB
        missing = missing_page(machine, page, b"")
        # mov ebx, page; mov rax, -1; pcmpeqd xmm0, xmm0
        assert (
            machine.start(
                f"bb{page.to_bytes(4, 'little').hex()}", "48c7c0ffffffff", "660f76c0", store, CALL
            )
            == missing
        )
        there = machine.vm.read_memory(page - 8, 8)
        assert there == (programs.expect(key)[0] if key else bytes(8))
        machine.vm.convert(page, PAGE, private=True)
        assert isinstance(machine.vcpu.run(), Hypercall)
        assert machine.vm.read_memory(page - 4, 8) == b"\xff" * 8
