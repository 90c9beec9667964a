"""Unicorn 2.1 through its C interface: numbers, prototypes and library of <unicorn/unicorn.h>.

The emulator itself is in ``uc``. The package's own binding is not used: it takes five times as long
to import (75 ms, not 15), and a TLB fill through it takes twice as long.
"""

import ctypes
import functools
import importlib.util
import mmap
import os
import struct
from errno import ENOMEM
from typing import Final

from restrictedmem.units import PAGE_SIZE

ARCH_X86: Final = 4
MODE_64: Final = 8

#: Bytes for translated code. Code that does not fit is dropped and translated again. By itself
#: Unicorn takes 1 GiB (DEFAULT_CODE_GEN_BUFFER_SIZE), which a guest could fill on each vCPU.
#: ``_OTHER_MEMORY`` is more than an emulator takes beside this buffer; bytes.
CODE_BUFFER: Final = 32 << 20
_OTHER_MEMORY: Final = 64 << 20
_MAP_NORESERVE: Final = 0x4000

# uc_mem_type: the kind of access of a TLB fill. It needs the right 1 << (access - MEM_READ).
MEM_READ: Final = 16
MEM_WRITE: Final = 17
MEM_FETCH: Final = 18

PROT_ALL: Final = 7

# uc_err, as far as the engine distinguishes it.
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
HOOK_INTR: Final = 1 << 0
HOOK_INSN: Final = 1 << 1
HOOK_CODE: Final = 1 << 2
HOOK_BLOCK: Final = 1 << 3
HOOK_MEM_READ_UNMAPPED: Final = 1 << 4
HOOK_TLB_FILL: Final = 1 << 17
INS_IN: Final = 218
INS_OUT: Final = 500
INS_SYSCALL: Final = 699
INS_SYSENTER: Final = 700
INS_CPUID: Final = 113

# uc_ctl: number, count of arguments, direction (1: write).
CTL_USE_EXITS: Final = 4 | 1 << 26 | 1 << 30
CTL_REMOVE_CACHE: Final = 9 | 2 << 26 | 1 << 30
CTL_FLUSH_TB: Final = 10 | 1 << 30
CTL_FLUSH_TLB: Final = 11 | 1 << 30
CTL_TCG_BUFFER_SIZE: Final = 13 | 1 << 26 | 1 << 30
CTL_TLB_TYPE: Final = 12 | 1 << 26 | 1 << 30
TLB_VIRTUAL: Final = 1

#: Bytes of ``struct uc_struct`` to search, which has more; and bytes between its fields
#: qemu_real_host_page_size and hook_insert (2.1.3, 2.1.4).
_UC_STRUCT_HEAD: Final = 8192
_WORDS_BEFORE_FLAGS: Final = 24

# The hooks' prototypes, which ctypes converts at the lowest cost. The handle is an int, because
# nobody needs it, and the trailing user_data is left out.
TlbFillHook = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t
)
InterruptHook = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint32)
InHook = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_int)
OutHook = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32)
InstructionHook = ctypes.CFUNCTYPE(None, ctypes.c_int)
CpuidHook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
CodeHook = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32)
UnmappedHook = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64
)
IoRead = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint)
IoWrite = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64)


class Segment(ctypes.Structure):
    """``uc_x86_mmr``."""

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
    loaded.uc_mmio_map.argtypes = [pointer, u64, size, IoRead, pointer, IoWrite, pointer]
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
def machine_code() -> tuple[mmap.mmap, int, int]:
    """Return a page of machine code, and the addresses of two hooks in it.

    The first hook is for each block. It stops the run when the byte at ``user_data`` is set. If
    another thread calls uc_emu_stop, a run may end inside a block, in the middle of an instruction.
    That instruction is then executed a second time. A call by the run's own thread before a block
    is exact. The second hook does nothing.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    stop = ctypes.cast(library().uc_emu_stop, ctypes.c_void_p).value or 0
    code = bytes.fromhex("8039007501c348b8") + stop.to_bytes(8, "little") + bytes.fromhex("ffe0")
    #     cmp byte [rcx], 0; jne 1f; 2: ret; 1: mov rax, uc_emu_stop; jmp rax
    page[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return page, address, address + code.index(b"\xc3")


def try_memory() -> None:
    """Check that there is memory for an emulator.

    An emulator first takes a buffer for code, and calls exit(3) when there is none.

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


def check(call: str, error: int) -> None:
    """Raise RuntimeError with the name of a call if its uc_err is not 0."""
    if error:
        raise RuntimeError(error_text(call, error))


def no_exit_request(handle: int) -> int:
    """Return the address of ``uc_struct.no_exit_request``.

    It is the third of four flags, which lie behind the host's page sizes and some words.

    Raises:
        RuntimeError: when they lie elsewhere; tests/test_vcpus.py shows that the right flag was
            found.
    """
    content = ctypes.string_at(handle, _UC_STRUCT_HEAD)
    sizes = content.find(struct.pack("=QQ", PAGE_SIZE, PAGE_SIZE))
    # hook_insert, first_tb, no_exit_request, init_done
    flags = content.find(b"\0\0\0\1", sizes + 16 + _WORDS_BEFORE_FLAGS)
    if sizes < 0 or flags != sizes + 16 + _WORDS_BEFORE_FLAGS:
        raise RuntimeError("this version of unicorn has another layout")
    return handle + flags + 2
