"""The guest of a case: a page of code that its owner rewrites before each step.

The guest has no program of its own. Its owner puts the code of a step into memory that both share,
and runs the vCPU until the port ``DONE``. All numbers are part of the code, so that the owner never
sets a register of a guest that has run.

The page begins with the OUT that ends a step. After it come two places for code, of which one step
uses the first and the next step the second. The other place is full of NOPs, and behind the places
is a jump to the first. So a guest that was stopped in the middle of a step, such as at a fault that
it would repeat, slides into the next step.
"""

from typing import Final

from restrictedmem.abi.kvm import KVM_HC_MAP_GPA_RANGE

#: The port that ends a step.
DONE: Final = 0x10
#: Bytes of each place for code.
_PLACE: Final = 112
_NOP: Final = b"\x90"
_OUT_DONE: Final = bytes((0xE6, DONE))
#: Offset in the page at which a vCPU begins its first step.
START: Final = len(_OUT_DONE)
_RAX, _RCX, _RDX, _RBX, _RSP, _, _RSI, _RDI = range(8)


def page(code: bytes, step: int) -> bytes:
    """Return the content of the code page for the step of a number."""
    places = [_NOP * _PLACE, _NOP * _PLACE]
    start = START + step % 2 * _PLACE
    end = code + _jump(start + len(code), 0)
    assert len(end) <= _PLACE
    places[step % 2] = end.ljust(_PLACE, _NOP)
    before = _OUT_DONE + b"".join(places)
    return before + _jump(len(before), START)


def _jump(at: int, to: int) -> bytes:
    """Return JMP, which is at one offset of the page, to another."""
    return b"\xe9" + (to - at - 5).to_bytes(4, "little", signed=True)


def _mov(register: int, value: int) -> bytes:
    """Return MOV of a number to a register, by the register's number."""
    return bytes((0x48, 0xB8 | register)) + (value & (1 << 64) - 1).to_bytes(8, "little")


def _keep(result: int) -> bytes:
    """Return MOV of rax to an address."""
    return bytes.fromhex("48a3") + result.to_bytes(8, "little")


def load(address: int, result: int) -> bytes:
    """Read 8 bytes, and keep them at ``result``."""
    return _mov(_RDI, address) + bytes.fromhex("488b07") + _keep(result)  # mov rax, [rdi]


def store(address: int, value: int) -> bytes:
    """Write 8 bytes."""
    return _mov(_RDI, address) + _mov(_RAX, value) + bytes.fromhex("488907")  # mov [rdi], rax


def fill(address: int, size: int, byte: int) -> bytes:
    """Set each byte of a range, 8 at a time."""
    words = _mov(_RAX, byte * 0x0101_0101_0101_0101)
    # cld; rep stosq
    return _mov(_RDI, address) + _mov(_RCX, size // 8) + words + bytes.fromhex("fc f348ab")


def compare(address: int, size: int, result: int, count: int = 1, stride: int = 0) -> bytes:
    """Compare each word of a range with the first, and keep that word at ``result``.

    Behind it, keep 1 if a word differs, else 0. There may be ``count`` such ranges, ``stride``
    bytes apart, whose words are all compared with the first range's first.
    """
    places = _mov(_RDI, address) + _mov(_RSI, stride - size) + _mov(_RDX, count)
    # repe scasq; jne to the end; add rdi, rsi; dec rdx; jnz to the count of words
    loop = _mov(_RCX, size // 8) + bytes.fromhex("f348af 7508 4801f7 48ffca 75e9")
    # cld; mov rax, [rdi]
    scan = places + bytes.fromhex("fc 488b07") + loop
    # setne al; movzx eax, al
    return scan + _keep(result) + bytes.fromhex("0f95c0 0fb6c0") + _keep(result + 8)


def touch(address: int, count: int, stride: int, result: int) -> bytes:
    """Read 8 bytes at each of some addresses."""
    # mov rax, [rdi]; add rdi, rdx; dec rcx; jnz to the first
    loop = bytes.fromhex("488b07 4801d7 48ffc9 75f5")
    return _mov(_RDI, address) + _mov(_RCX, count) + _mov(_RDX, stride) + loop + _keep(result)


def wait_while(address: int, value: int, result: int) -> bytes:
    """Read 8 bytes until they are no longer ``value``, and keep them at ``result``."""
    # mov rax, [rdi]; cmp rax, rdx; je to the first
    loop = bytes.fromhex("488b07 4839d0 74f8")
    return _mov(_RDI, address) + _mov(_RDX, value) + loop + _keep(result)


def spin() -> bytes:
    """Loop for ever."""
    return bytes.fromhex("ebfe")


def trap() -> bytes:
    """Execute UD2."""
    return bytes.fromhex("0f0b")


def map_gpa_range(gpa: int, pages: int, attributes: int, call: bytes, result: int) -> bytes:
    """Ask the owner for a conversion by hypercall, and keep its answer at ``result``.

    The arguments are in the registers of KVM's hypercalls, and in those of this project's guests.
    """
    arguments = _mov(_RBX, gpa) + _mov(_RDI, gpa) + _mov(_RCX, pages) + _mov(_RSI, pages)
    number = bytes((0xB8, KVM_HC_MAP_GPA_RANGE, 0, 0, 0))
    return arguments + _mov(_RDX, attributes) + number + call + _keep(result)


#: KVM's hypercall, on Intel's processors and on AMD's.
VMCALL: Final = bytes.fromhex("0f01c1")
VMMCALL: Final = bytes.fromhex("0f01d9")


def call_page(address: int, stack: int) -> bytes:
    """Call the hypercall page of this project's engines."""
    # mov ebp, address; call rbp
    return _mov(_RSP, stack) + b"\xbd" + address.to_bytes(4, "little") + bytes.fromhex("ffd5")
