"""Unicorn 2.1 through its C interface: the numbers and calls of <unicorn/unicorn.h>, and ``Uc``, one emulated x86-64.

The package's own binding is left alone: importing it takes five times as long (75 ms, not 15), and
a TLB fill through it twice as long.
"""

import ctypes
import functools
import importlib.util
import mmap
import os
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOMEM
from typing import Final, final

from restrictedmem.units import PAGE_SIZE

_ARCH_X86: Final = 4
_MODE_64: Final = 8

#: For translated code, which is dropped and translated again when it does not fit; and more than an
#: emulator takes beside it. Bytes. By itself Unicorn takes 1 GiB (DEFAULT_CODE_GEN_BUFFER_SIZE),
#: which a guest could have filled on each vCPU.
CODE_BUFFER: Final = 32 << 20
_OTHER_MEMORY: Final = 64 << 20
_MAP_NORESERVE: Final = 0x4000

# uc_mem_type, as a TLB fill names the access; 1 << (access - MEM_READ) is the right it needs.
MEM_READ: Final = 16
MEM_WRITE: Final = 17
MEM_FETCH: Final = 18

PROT_ALL: Final = 7

# uc_err, as far as it is told apart here.
ERR_INSN_INVALID: Final = 10

# uc_x86_reg
RAX: Final = 35
RDI: Final = 39
RBX: Final = 37
RDX: Final = 40
RIP: Final = 41
RSI: Final = 43
RSP: Final = 44
RBP: Final = 36
RCX: Final = 38
DR0: Final = 66
R8: Final = 106
R9: Final = 107
R10: Final = 108
CS: Final = 11
DS: Final = 17
ES: Final = 28
FS: Final = 32
GS: Final = 33
SS: Final = 49
CR0: Final = 50
CR2: Final = 52
CR3: Final = 53
CR4: Final = 54
GDTR: Final = 243
FS_BASE: Final = 250
GS_BASE: Final = 251
RFLAGS: Final = 253

# uc_hook_type and uc_x86_insn
_HOOK_INTR: Final = 1 << 0
_HOOK_INSN: Final = 1 << 1
_HOOK_CODE: Final = 1 << 2
_HOOK_BLOCK: Final = 1 << 3
_HOOK_MEM_READ_UNMAPPED: Final = 1 << 4
_HOOK_TLB_FILL: Final = 1 << 17
_INS_IN: Final = 218
_INS_OUT: Final = 500
_INS_SYSCALL: Final = 699
_INS_SYSENTER: Final = 700
_INS_CPUID: Final = 113

# uc_ctl: number, count of arguments, direction (1: write).
_CTL_USE_EXITS: Final = 4 | 1 << 26 | 1 << 30
_CTL_REMOVE_CACHE: Final = 9 | 2 << 26 | 1 << 30
_CTL_FLUSH_TB: Final = 10 | 1 << 30
_CTL_FLUSH_TLB: Final = 11 | 1 << 30
_CTL_TCG_BUFFER_SIZE: Final = 13 | 1 << 26 | 1 << 30
_CTL_TLB_TYPE: Final = 12 | 1 << 26 | 1 << 30
_TLB_VIRTUAL: Final = 1

#: Bytes of ``struct uc_context`` before the registers.
_CONTEXT_HEAD: Final = 40
#: Bytes of ``struct uc_struct`` to search, which has more; and of those between
#: qemu_real_host_page_size and hook_insert (2.1.3, 2.1.4).
_UC_STRUCT_HEAD: Final = 8192
_WORDS_BEFORE_FLAGS: Final = 24

# The hooks' prototypes, as cheap as ctypes converts them: the handle, which nobody needs, as an
# int, and the trailing user_data left out.
_TlbFill = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t
)
_Interrupt = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint32)
_In = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_int)
_Out = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32)
_Instruction = ctypes.CFUNCTYPE(None, ctypes.c_int)
_Cpuid = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
_Code = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32)
_Unmapped = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64
)
_IoRead = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint)
_IoWrite = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64)


class _Segment(ctypes.Structure):
    # uc_x86_mmr
    _fields_ = (
        ("selector", ctypes.c_uint16),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Load the shared library, once.

    Raises:
        RuntimeError: when the package is not installed.
        OSError: when its library cannot be read.
    """
    package = importlib.util.find_spec("unicorn")
    if package is None or package.origin is None:
        raise RuntimeError("the package unicorn is not installed")
    loaded = ctypes.CDLL(os.path.join(os.path.dirname(package.origin), "lib", "libunicorn.so.2"))
    pointer, u64, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
    loaded.uc_open.argtypes = [number, number, ctypes.POINTER(pointer)]
    loaded.uc_close.argtypes = [pointer]
    loaded.uc_mem_map_ptr.argtypes = [pointer, u64, size, ctypes.c_uint32, pointer]
    loaded.uc_mem_unmap.argtypes = [pointer, u64, size]
    loaded.uc_mmio_map.argtypes = [pointer, u64, size, _IoRead, pointer, _IoWrite, pointer]
    loaded.uc_emu_start.argtypes = [pointer, u64, u64, u64, size]
    loaded.uc_emu_stop.argtypes = [pointer]
    loaded.uc_hook_del.argtypes = [pointer, pointer]
    loaded.uc_reg_read.argtypes = loaded.uc_reg_write.argtypes = [pointer, number, pointer]
    loaded.uc_reg_read_batch.argtypes = loaded.uc_reg_write_batch.argtypes = [
        pointer,
        pointer,
        pointer,
        number,
    ]
    loaded.uc_context_alloc.argtypes = [pointer, ctypes.POINTER(pointer)]
    loaded.uc_context_save.argtypes = loaded.uc_context_restore.argtypes = [pointer, pointer]
    loaded.uc_context_free.argtypes = [pointer]
    loaded.uc_strerror.restype = ctypes.c_char_p
    return loaded


@functools.cache
def _machine_code() -> tuple[mmap.mmap, int, int]:
    """Return a page of machine code, and the addresses of two hooks in it.

    The first, for each block, stops the run when the byte at ``user_data`` is set. uc_emu_stop
    itself, called by another thread, may end a run inside a block, in the middle of an
    instruction, which is then executed a second time. Called by the run's own thread before a
    block, it is exact. The second does nothing.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    stop = ctypes.cast(library().uc_emu_stop, ctypes.c_void_p).value or 0
    code = bytes.fromhex("8039007501c348b8") + stop.to_bytes(8, "little") + bytes.fromhex("ffe0")
    #     cmp byte [rcx], 0; jne 1f; 2: ret; 1: mov rax, uc_emu_stop; jmp rax
    page[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return page, address, address + code.index(b"\xc3")


def _try_memory() -> None:
    """See that an emulator's memory can be had: it takes a buffer for code first, and calls exit(3) when there is none.

    Raises:
        OSError: ENOMEM, also where memory may not be writable and executable at once (SELinux,
            PR_SET_MDWE).
    """
    flags, rights = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
        mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
    )
    try:
        mmap.mmap(-1, CODE_BUFFER + _OTHER_MEMORY, flags, rights).close()
    except OSError as error:
        raise OSError(ENOMEM, f"no memory for an emulator's code: {error.strerror}") from None


def error_text(call: str, error: int) -> str:
    """Describe a uc_err as the failure of a call."""
    return f"{call}: {library().uc_strerror(error).decode()}"


def _check(call: str, error: int) -> None:
    if error:
        raise RuntimeError(error_text(call, error))


def _no_exit_request(handle: int) -> int:
    """Return the address of ``uc_struct.no_exit_request``: the third of four flags that lie behind the host's page sizes and some words.

    Raises:
        RuntimeError: when they do not; tests/test_vcpus.py shows that the right one was found.
    """
    content = ctypes.string_at(handle, _UC_STRUCT_HEAD)
    sizes = content.find(struct.pack("=QQ", PAGE_SIZE, PAGE_SIZE))
    # hook_insert, first_tb, no_exit_request, init_done
    flags = content.find(b"\0\0\0\1", sizes + 16 + _WORDS_BEFORE_FLAGS)
    if sizes < 0 or flags != sizes + 16 + _WORDS_BEFORE_FLAGS:
        raise RuntimeError("this version of unicorn has another layout")
    return handle + flags + 2


@final
class Uc:
    """One emulator. Only ``kick`` may be called by another thread, and only by the thread that made it outside ``start`` all the rest.

    Every method raises RuntimeError with the name of Unicorn's call when that fails.
    """

    def __init__(self) -> None:
        """Open an emulator in long mode whose TLB misses, once ``hook_tlb_fill`` was called, are the hook's to answer.

        Raises:
            OSError: ENOMEM.
        """
        self._library = library()
        _try_memory()
        handle = ctypes.c_void_p()
        _check("uc_open", self._library.uc_open(_ARCH_X86, _MODE_64, ctypes.byref(handle)))
        self._handle = handle
        self._callbacks: list[object] = []
        self._word = ctypes.c_uint64()
        # First: the next call makes the buffer.
        self._ctl(_CTL_TCG_BUFFER_SIZE, ctypes.c_uint32(CODE_BUFFER))
        self._ctl(_CTL_TLB_TYPE, ctypes.c_int(_TLB_VIRTUAL))
        #: Unicorn's own flag against ending a run after any memory access of a block: what has
        #: read, changed and written memory would be executed again then. (It is meant for Arm's IT
        #: blocks.) Instead, runs end where a block begins.
        self._no_exit_request = ctypes.c_bool.from_address(_no_exit_request(handle.value or 0))
        self._no_exit_request.value = True
        # uc_emu_start's ``until`` counts no more, and no exits are set: no address ends a run by
        # itself.
        self._ctl(_CTL_USE_EXITS, ctypes.c_int(1))
        self._until = 0
        self._kicked = ctypes.c_ubyte()

    def stop_inside_blocks(self) -> None:
        """Let a code hook's ``stop`` take effect before its instruction, from now on; all code then runs at half the speed."""
        if self._no_exit_request.value:
            self._no_exit_request.value = False
            self._hook(
                _HOOK_BLOCK,
                ctypes.c_void_p(_machine_code()[1]),
                user_data=ctypes.addressof(self._kicked),
            )
            self.flush_code()

    def close(self) -> None:
        """Free the emulator; the host's memory that was mapped stays the caller's."""
        if self._handle:
            _check("uc_close", self._library.uc_close(self._handle))
            self._handle = ctypes.c_void_p()
            self._callbacks.clear()

    # Physical memory.

    def map(self, address: int, size: int, host: int) -> None:
        """Show ``size`` bytes of this process at ``host`` as physical memory, with every right; the fill hook decides on rights."""
        _check(
            "uc_mem_map_ptr",
            self._library.uc_mem_map_ptr(self._handle, address, size, PROT_ALL, host),
        )

    def unmap(self, address: int, size: int) -> None:
        """Remove physical memory; asks the fill hook to translate ``address`` to itself, for a fetch."""
        _check("uc_mem_unmap", self._library.uc_mem_unmap(self._handle, address, size))

    def map_device(
        self,
        address: int,
        size: int,
        read: Callable[[int, int, int], int],
        write: Callable[[int, int, int, int], None],
    ) -> None:
        """Let ``read(uc, offset, bytes)`` and ``write(uc, offset, bytes, value)`` stand for physical memory."""
        on_read, on_write = _IoRead(read), _IoWrite(write)
        self._callbacks += (on_read, on_write)
        _check(
            "uc_mmio_map",
            self._library.uc_mmio_map(self._handle, address, size, on_read, None, on_write, None),
        )

    # Hooks. What one raises ends the engine (``sealing.end_when_lost``): ctypes would drop it, and
    # the guest go on.

    def hook_tlb_fill(self, hook: Callable[[int, int, int, int], int]) -> None:
        """Call ``hook(uc, page, access, result)`` for each TLB miss.

        It writes physical address and rights to the two 64-bit words at ``result`` and returns 1,
        or returns 0 and ends the run.
        """
        self._hook(_HOOK_TLB_FILL, _TlbFill(hook))

    def hook_interrupt(self, hook: Callable[[int, int], None]) -> None:
        """Call ``hook(uc, vector)`` for each exception and software interrupt, instead of delivering it."""
        self._hook(_HOOK_INTR, _Interrupt(hook))

    def hook_in(self, hook: Callable[[int, int, int], int]) -> None:
        """Call ``hook(uc, port, size)`` for each IN and INS; it returns the value."""
        self._hook(_HOOK_INSN, _In(hook), instruction=_INS_IN)

    def hook_out(self, hook: Callable[[int, int, int, int], None]) -> None:
        """Call ``hook(uc, port, size, value)`` for each OUT and OUTS."""
        self._hook(_HOOK_INSN, _Out(hook), instruction=_INS_OUT)

    def hook_system_calls(self, hook: Callable[[int], None]) -> None:
        """Call ``hook(uc)`` for SYSCALL and SYSENTER, which do nothing else."""
        for instruction in (_INS_SYSCALL, _INS_SYSENTER):
            self._hook(_HOOK_INSN, _Instruction(hook), instruction=instruction)

    def hook_cpuid(self, hook: Callable[[int], int]) -> None:
        """Call ``hook(uc)`` for each CPUID; it returns 1 when it has set the registers."""
        self._hook(_HOOK_INSN, _Cpuid(hook), instruction=_INS_CPUID)

    def hook_code(self, address: int, hook: Callable[[int, int, int], None]) -> "Hook":
        """Call ``hook(uc, address, size)`` before the instruction at an address, as far as it is not translated yet."""
        return self._hook(_HOOK_CODE, _Code(hook), address, address)

    def hook_for_flags(self, first: int, last: int) -> "Hook":
        """Have flags computed into ``cc_src`` before each instruction of a range (23 ns).

        That is, before those that are not translated yet.
        """
        return self._hook(_HOOK_CODE, ctypes.c_void_p(_machine_code()[2]), first, last)

    def unhook(self, hook: "Hook") -> None:
        """Remove a hook.

        Asks the fill hook to translate, for a fetch, addresses that it was called for. Where that
        is refused, translated code stays as it was.
        """
        _check("uc_hook_del", self._library.uc_hook_del(self._handle, hook.number))
        self._callbacks.remove(hook.callback)

    def hook_unmapped_read(
        self, begin: int, size: int, hook: Callable[[int, int, int, int, int], bool]
    ) -> None:
        """Call ``hook(uc, type, address, size, value)`` for each load from a hole in physical memory; False ends the run before it."""
        self._hook(_HOOK_MEM_READ_UNMAPPED, _Unmapped(hook), begin, begin + size - 1)

    def _hook(
        self,
        kind: int,
        callback: object,
        begin: int = 1,
        end: int = 0,
        instruction: int | None = None,
        user_data: int | None = None,
    ) -> "Hook":
        self._callbacks.append(callback)
        variadic = () if instruction is None else (ctypes.c_int(instruction),)
        span = ctypes.c_uint64(begin), ctypes.c_uint64(end)
        number = ctypes.c_void_p()
        hook = ctypes.byref(number)
        _check(
            "uc_hook_add",
            self._library.uc_hook_add(
                self._handle,
                hook,
                ctypes.c_int(kind),
                callback,
                ctypes.c_void_p(user_data),
                *span,
                *variadic,
            ),
        )
        return Hook(number, callback)

    # Registers.

    def read(self, register: int) -> int:
        """Return a register."""
        _check(
            "uc_reg_read",
            self._library.uc_reg_read(self._handle, register, ctypes.byref(self._word)),
        )
        return self._word.value

    def write(self, register: int, value: int) -> None:
        """Set a register."""
        self._word.value = value
        _check(
            "uc_reg_write",
            self._library.uc_reg_write(self._handle, register, ctypes.byref(self._word)),
        )

    def forget_gdt(self) -> None:
        """Set the GDTR to nothing, so that no selector can be loaded."""
        _check(
            "uc_reg_write", self._library.uc_reg_write(self._handle, GDTR, ctypes.byref(_Segment()))
        )

    def registers(self, *numbers: int) -> "Registers":
        """Prepare reading and writing several registers at once."""
        return Registers(self._library, self._handle, numbers)

    def for_context(self) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
        """Return what ``Context`` needs."""
        return self._library, self._handle

    # Running, and what is cached meanwhile.

    def start(self) -> int:
        """Run from RIP until a hook or ``kick`` ends it; returns the uc_err."""
        self._kicked.value = 0
        error: int = self._library.uc_emu_start(self._handle, self.read(RIP), self._until, 0, 0)
        return error

    @contextmanager
    def stop_at(self, address: int) -> Generator[None]:
        """Let a run end before the instruction at an address, too, if that is not translated yet.

        At the run's end Unicorn forgets what was translated to end there.
        """
        self._ctl(_CTL_USE_EXITS, ctypes.c_int(0))
        self._until = address
        try:
            yield
        finally:
            self._ctl(_CTL_USE_EXITS, ctypes.c_int(1))

    def stop(self) -> None:
        """Make ``start`` return; called by a hook."""
        self._library.uc_emu_stop(self._handle)

    def kick(self) -> None:
        """Make ``start`` return before the next block, from any thread; forgotten when it comes just before ``start`` or outside it."""
        if not self._no_exit_request.value:
            self._kicked.value = 1
        elif self._handle:
            self._library.uc_emu_stop(self._handle)

    def flush_tlb(self) -> None:
        """Forget every translation of an address (1 µs)."""
        self._ctl(_CTL_FLUSH_TLB)

    def flush_code(self) -> None:
        """Forget all translated code (36 µs, and what it costs to translate again)."""
        self._ctl(_CTL_FLUSH_TB)

    def drop_code(self, begin: int, end: int) -> None:
        """Forget the code translated from a range; only ``begin`` is translated, by asking the fill hook for a fetch."""
        self._ctl(_CTL_REMOVE_CACHE, ctypes.c_uint64(begin), ctypes.c_uint64(end))

    def _ctl(self, control: int, *arguments: object) -> None:
        _check("uc_ctl", self._library.uc_ctl(self._handle, ctypes.c_int(control), *arguments))


@dataclass(frozen=True, slots=True)
class Hook:
    """A hook as Unicorn knows it, and the function it calls, which must live as long."""

    number: ctypes.c_void_p
    callback: object


@final
class Registers:
    """Several registers of one emulator, read or written by one call."""

    __slots__ = ("_call", "_handle", "_library", "_values")

    def __init__(
        self, library: ctypes.CDLL, handle: ctypes.c_void_p, numbers: tuple[int, ...]
    ) -> None:
        count = len(numbers)
        self._library = library
        self._handle = handle
        self._values = (ctypes.c_uint64 * count)()
        first = ctypes.addressof(self._values)
        addresses = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        self._call = (ctypes.c_int * count)(*numbers), addresses, count

    def read(self) -> tuple[int, ...]:
        """Return the registers."""
        _check("uc_reg_read_batch", self._library.uc_reg_read_batch(self._handle, *self._call))
        return tuple(self._values)

    def write(self, values: tuple[int, ...]) -> None:
        """Set the registers."""
        self._values[:] = [*values]
        _check("uc_reg_write_batch", self._library.uc_reg_write_batch(self._handle, *self._call))


@final
class Context:
    """A copy of every register of one emulator, those without a number included."""

    __slots__ = ("_content", "_handle", "_library")

    def __init__(self, uc: Uc, more: int = 0) -> None:
        """Make room for a copy, with so many bytes behind what Unicorn would copy."""
        self._library, self._handle = uc.for_context()
        made = ctypes.c_void_p()
        _check("uc_context_alloc", self._library.uc_context_alloc(self._handle, ctypes.byref(made)))
        assert made.value is not None
        # struct uc_context: the size of what follows the head comes first.
        head = bytearray(ctypes.string_at(made.value, _CONTEXT_HEAD))
        (size,) = struct.unpack_from("=Q", head)
        struct.pack_into("=Q", head, 0, size + more)
        self._content = head + bytes(size + more)
        self._library.uc_context_free(made)

    def _address(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._content)))

    def save(self) -> None:
        """Copy the registers here."""
        _check("uc_context_save", self._library.uc_context_save(self._handle, self._address()))

    def restore(self) -> None:
        """Copy the registers back."""
        _check(
            "uc_context_restore", self._library.uc_context_restore(self._handle, self._address())
        )

    def find(self, content: bytes) -> int:
        """Return where some bytes are in the copy, -1 when they are not."""
        return self._content.find(content)

    def word(self, at: int) -> int:
        """Return the 64-bit word at a place of the copy."""
        return int.from_bytes(self._content[at : at + 8], "little")

    def set_word(self, at: int, value: int) -> None:
        """Set the 64-bit word at a place of the copy."""
        self._content[at : at + 8] = value.to_bytes(8, "little")
