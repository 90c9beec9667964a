"""``Uc``: one emulated x86-64, by the calls of ``unicorn``; hooks and register copies."""

import ctypes
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, final

from restrictedmem.kvm.software import unicorn

#: Bytes of ``struct uc_context`` before the registers.
_CONTEXT_HEAD: Final = 40


@final
class Uc:
    """One emulator.

    Any thread may call ``kick``. All other methods are called outside ``start`` or by a hook, and
    by one thread at a time. Every method raises RuntimeError with the name of Unicorn's call when
    that call fails.
    """

    def __init__(self) -> None:
        """Open an emulator in long mode.

        Once ``hook_tlb_fill`` was called, its hook answers every TLB miss.

        Raises:
            OSError: ENOMEM.
        """
        self._library = unicorn.library()
        unicorn.try_memory()
        handle = ctypes.c_void_p()
        unicorn.check(
            "uc_open",
            self._library.uc_open(unicorn.ARCH_X86, unicorn.MODE_64, ctypes.byref(handle)),
        )
        self._handle = handle
        self._callbacks: list[object] = []
        self._word = ctypes.c_uint64()
        # This comes first: the next call makes the buffer.
        self._ctl(unicorn.CTL_TCG_BUFFER_SIZE, ctypes.c_uint32(unicorn.CODE_BUFFER))
        self._ctl(unicorn.CTL_TLB_TYPE, ctypes.c_int(unicorn.TLB_VIRTUAL))
        #: Unicorn's own flag, meant for Arm's IT blocks. Without it, a run may end after any memory
        #: access of a block. Then an instruction that has read, changed and written memory would be
        #: executed again. With it, runs end where a block begins.
        self._no_exit_request = ctypes.c_bool.from_address(
            unicorn.no_exit_request(handle.value or 0)
        )
        self._no_exit_request.value = True
        # From here on uc_emu_start's ``until`` does not count. No exits are set, so no address ends
        # a run by itself.
        self._ctl(unicorn.CTL_USE_EXITS, ctypes.c_int(1))
        self._until = 0
        self._kicked = ctypes.c_ubyte()

    def stop_inside_blocks(self) -> None:
        """Let a code hook's ``stop`` take effect before its instruction, from now on.

        All code then runs at half the speed.
        """
        if self._no_exit_request.value:
            self._no_exit_request.value = False
            self._hook(
                unicorn.HOOK_BLOCK,
                ctypes.c_void_p(unicorn.machine_code()[1]),
                user_data=ctypes.addressof(self._kicked),
            )
            self.flush_code()

    def close(self) -> None:
        """Free the emulator; the caller keeps the host's memory that was mapped."""
        if self._handle:
            unicorn.check("uc_close", self._library.uc_close(self._handle))
            self._handle = ctypes.c_void_p()
            self._callbacks.clear()

    # Physical memory.

    def map(self, address: int, size: int, host: int) -> None:
        """Show ``size`` bytes of this process at ``host`` as physical memory.

        It has every right, because the fill hook decides on rights.
        """
        unicorn.check(
            "uc_mem_map_ptr",
            self._library.uc_mem_map_ptr(self._handle, address, size, unicorn.PROT_ALL, host),
        )

    def unmap(self, address: int, size: int) -> None:
        """Remove physical memory.

        Unicorn asks the fill hook to translate ``address`` to itself, for a fetch.
        """
        unicorn.check("uc_mem_unmap", self._library.uc_mem_unmap(self._handle, address, size))

    def map_device(
        self,
        address: int,
        size: int,
        read: Callable[[int, int, int], int],
        write: Callable[[int, int, int, int], None],
    ) -> None:
        """Let two functions stand for physical memory.

        They are ``read(uc, offset, bytes)`` and ``write(uc, offset, bytes, value)``.
        """
        on_read, on_write = unicorn.IoRead(read), unicorn.IoWrite(write)
        self._callbacks += (on_read, on_write)
        unicorn.check(
            "uc_mmio_map",
            self._library.uc_mmio_map(self._handle, address, size, on_read, None, on_write, None),
        )

    # Hooks. An exception in a hook ends the engine (``sealing.end_when_lost``). Otherwise ctypes
    # would drop it, and the guest would go on.

    def hook_tlb_fill(self, hook: Callable[[int, int, int, int], int]) -> None:
        """Call ``hook(uc, page, access, result)`` for each TLB miss.

        The hook writes physical address and rights to the two 64-bit words at ``result`` and
        returns 1. Or it returns 0, and the run ends.
        """
        self._hook(unicorn.HOOK_TLB_FILL, unicorn.TlbFillHook(hook))

    def hook_interrupt(self, hook: Callable[[int, int], None]) -> None:
        """Call ``hook(uc, vector)`` for each exception and INT, instead of delivering it."""
        self._hook(unicorn.HOOK_INTR, unicorn.InterruptHook(hook))

    def hook_in(self, hook: Callable[[int, int, int], int]) -> None:
        """Call ``hook(uc, port, size)`` for each IN and INS; the hook returns the value."""
        self._hook(unicorn.HOOK_INSN, unicorn.InHook(hook), instruction=unicorn.INS_IN)

    def hook_out(self, hook: Callable[[int, int, int, int], None]) -> None:
        """Call ``hook(uc, port, size, value)`` for each OUT and OUTS."""
        self._hook(unicorn.HOOK_INSN, unicorn.OutHook(hook), instruction=unicorn.INS_OUT)

    def hook_system_calls(self, hook: Callable[[int], None]) -> None:
        """Call ``hook(uc)`` for SYSCALL and SYSENTER, which do nothing else."""
        for instruction in (unicorn.INS_SYSCALL, unicorn.INS_SYSENTER):
            self._hook(unicorn.HOOK_INSN, unicorn.InstructionHook(hook), instruction=instruction)

    def hook_cpuid(self, hook: Callable[[int], int]) -> None:
        """Call ``hook(uc)`` for each CPUID; it returns 1 when it has set the registers."""
        self._hook(unicorn.HOOK_INSN, unicorn.CpuidHook(hook), instruction=unicorn.INS_CPUID)

    def hook_code(self, address: int, hook: Callable[[int, int, int], None]) -> "Hook":
        """Call ``hook(uc, address, size)`` before the instruction at an address.

        Code that was translated before does not call it.
        """
        return self._hook(unicorn.HOOK_CODE, unicorn.CodeHook(hook), address, address)

    def hook_for_flags(self, first: int, last: int) -> "Hook":
        """Have flags computed into ``cc_src`` before each instruction of a range (23 ns).

        Instructions that are translated already are left out.
        """
        return self._hook(
            unicorn.HOOK_CODE, ctypes.c_void_p(unicorn.machine_code()[2]), first, last
        )

    def unhook(self, hook: "Hook") -> None:
        """Remove a hook.

        Unicorn asks the fill hook to translate, for a fetch, addresses for which the hook was
        called. Where the fill hook refuses, translated code stays as it was.
        """
        unicorn.check("uc_hook_del", self._library.uc_hook_del(self._handle, hook.number))
        self._callbacks.remove(hook.callback)

    def hook_unmapped_read(
        self, begin: int, size: int, hook: Callable[[int, int, int, int, int], bool]
    ) -> None:
        """Call ``hook(uc, type, address, size, value)`` for each load from a hole.

        The hole is in physical memory. If the hook returns False, the run ends before the load.
        """
        self._hook(
            unicorn.HOOK_MEM_READ_UNMAPPED, unicorn.UnmappedHook(hook), begin, begin + size - 1
        )

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
        unicorn.check(
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
        """Return the value of a register."""
        unicorn.check(
            "uc_reg_read",
            self._library.uc_reg_read(self._handle, register, ctypes.byref(self._word)),
        )
        return self._word.value

    def write(self, register: int, value: int) -> None:
        """Set a register."""
        self._word.value = value
        unicorn.check(
            "uc_reg_write",
            self._library.uc_reg_write(self._handle, register, ctypes.byref(self._word)),
        )

    def forget_gdt(self) -> None:
        """Clear the GDTR, so that no selector can be loaded."""
        unicorn.check(
            "uc_reg_write",
            self._library.uc_reg_write(self._handle, unicorn.GDTR, ctypes.byref(unicorn.Segment())),
        )

    def registers(self, *numbers: int) -> "Registers":
        """Return a helper that reads and writes several registers at once."""
        return Registers(self._library, self._handle, numbers)

    def for_context(self) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
        """Return the library and the handle, which ``Context`` needs."""
        return self._library, self._handle

    # Running, and what is cached meanwhile.

    def start(self) -> int:
        """Run from RIP until a hook or ``kick`` ends the run; return the uc_err."""
        self._kicked.value = 0
        error: int = self._library.uc_emu_start(
            self._handle, self.read(unicorn.RIP), self._until, 0, 0
        )
        return error

    @contextmanager
    def stop_at(self, address: int) -> Generator[None]:
        """Let a run end before the instruction at an address, too, if that is not translated.

        At the end of the run Unicorn drops the code that was translated to end there.
        """
        self._ctl(unicorn.CTL_USE_EXITS, ctypes.c_int(0))
        self._until = address
        try:
            yield
        finally:
            self._ctl(unicorn.CTL_USE_EXITS, ctypes.c_int(1))

    def stop(self) -> None:
        """Make ``start`` return; a hook calls this."""
        self._library.uc_emu_stop(self._handle)

    def kick(self) -> None:
        """Make ``start`` return before the next block; any thread may call this.

        A kick is lost if it comes just before ``start`` or outside it.
        """
        if not self._no_exit_request.value:
            self._kicked.value = 1
        elif self._handle:
            self._library.uc_emu_stop(self._handle)

    def flush_tlb(self) -> None:
        """Drop every translation of an address (1 µs)."""
        self._ctl(unicorn.CTL_FLUSH_TLB)

    def flush_code(self) -> None:
        """Drop all translated code (36 µs, and the time to translate it again)."""
        self._ctl(unicorn.CTL_FLUSH_TB)

    def drop_code(self, begin: int, end: int) -> None:
        """Drop the code that was translated from a range.

        Unicorn translates only the address ``begin``, and asks the fill hook for it as a fetch.
        """
        self._ctl(unicorn.CTL_REMOVE_CACHE, ctypes.c_uint64(begin), ctypes.c_uint64(end))

    def _ctl(self, control: int, *arguments: object) -> None:
        unicorn.check(
            "uc_ctl", self._library.uc_ctl(self._handle, ctypes.c_int(control), *arguments)
        )


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
        unicorn.check(
            "uc_reg_read_batch", self._library.uc_reg_read_batch(self._handle, *self._call)
        )
        return tuple(self._values)

    def write(self, values: tuple[int, ...]) -> None:
        """Set the registers."""
        self._values[:] = [*values]
        unicorn.check(
            "uc_reg_write_batch", self._library.uc_reg_write_batch(self._handle, *self._call)
        )


@final
class Context:
    """A copy of all registers of one emulator, those without a number included."""

    __slots__ = ("_content", "_handle", "_library")

    def __init__(self, uc: Uc, more: int = 0) -> None:
        """Make room for a copy, and for ``more`` bytes behind what Unicorn would copy."""
        self._library, self._handle = uc.for_context()
        made = ctypes.c_void_p()
        unicorn.check(
            "uc_context_alloc", self._library.uc_context_alloc(self._handle, ctypes.byref(made))
        )
        assert made.value is not None
        # struct uc_context begins with the size of what follows its head.
        head = bytearray(ctypes.string_at(made.value, _CONTEXT_HEAD))
        (size,) = struct.unpack_from("=Q", head)
        struct.pack_into("=Q", head, 0, size + more)
        self._content = head + bytes(size + more)
        self._library.uc_context_free(made)

    def _address(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._content)))

    def save(self) -> None:
        """Copy the registers here."""
        unicorn.check(
            "uc_context_save", self._library.uc_context_save(self._handle, self._address())
        )

    def restore(self) -> None:
        """Copy the registers back."""
        unicorn.check(
            "uc_context_restore", self._library.uc_context_restore(self._handle, self._address())
        )

    def find(self, content: bytes) -> int:
        """Return the offset of some bytes in the copy, -1 if they are not there."""
        return self._content.find(content)

    def word(self, at: int) -> int:
        """Return the 64-bit word at an offset of the copy."""
        return int.from_bytes(self._content[at : at + 8], "little")

    def set_word(self, at: int, value: int) -> None:
        """Set the 64-bit word at an offset of the copy."""
        self._content[at : at + 8] = value.to_bytes(8, "little")
