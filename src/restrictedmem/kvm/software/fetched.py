"""The code that a vCPU has fetched, and the hooks on it that flags need (``flags``)."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

from restrictedmem.kvm.decode import LONGEST, PREFIXES, Instruction, decode
from restrictedmem.kvm.half import Half
from restrictedmem.kvm.software.uc import Hook, Uc
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

#: SETcc with an operand in memory.
_SETCC: Final = re.compile(rb"\x0f[\x90-\x9f][\x00-\xbf]")
#: With more SETcc on one page, a single hook serves the whole page. Each hook makes all translation
#: slower, and that single hook makes all code of the page slower.
_MANY: Final = 16
#: With more hooks altogether, all are removed. They come back where code is still executed.
_MOST: Final = 512


@final
class _Page:
    """Where a page lay when it was last fetched from, its content then, and its hooks."""

    __slots__ = ("half", "hash", "hooks", "offset")

    def __init__(self, half: Half, offset: int) -> None:
        self.half = half
        self.offset = offset
        self.hash = 0
        #: By first and last address. Hooks of instructions that only end on this page are included.
        self.hooks: dict[tuple[int, int], Hook] = {}

    def read(self, start: int, end: int) -> bytes:
        return bytes(self.half.mapping.memory[self.offset + start : self.offset + end])


@final
class FetchedCode:
    """The pages that one emulator translated code from, and the hooks on them.

    Nothing shows whether a byte begins an instruction. A hook on a byte that does not is never
    called, and costs a little where code is translated.
    """

    def __init__(self, uc: Uc) -> None:
        self._uc = uc
        self._pages: dict[int, _Page] = {}
        #: The pages that show the shared half.
        self._shared: dict[int, _Page] = {}
        self._hooks = 0
        self._looking = False

    @property
    def crowded(self) -> bool:
        """Whether there are so many hooks that everything should be dropped."""
        return self._hooks > _MOST

    def fetched(self, address: int, half: Half, offset: int, *, shared: bool) -> bool:
        """Note that code of a guest page, at ``offset`` of a half, is going to be translated.

        Return whether the translation has to begin again. It has to when an instruction got a hook
        for which Unicorn had already looked: Unicorn looks for hooks before it fetches an
        instruction.
        """
        known = address in self._pages
        page = self._pages.setdefault(address, _Page(half, offset))
        page.half, page.offset = half, offset
        self._shared.pop(address, None)
        if shared:
            self._shared[address] = page
        content = page.read(0, PAGE_SIZE)
        if page.hash == hash(content):
            return False
        page.hash = hash(content)
        first = self._hook(address, content)
        return first <= address or (self._looking and not known)

    def _hook(self, address: int, content: bytes) -> int:
        """Put hooks on a page and across its borders; return the first new one's address."""
        hooks = self._pages[address].hooks
        before = self._read(address - PAGE_SIZE, PAGE_SIZE - LONGEST, PAGE_SIZE)
        code = before + content + self._read(address + PAGE_SIZE, 0, LONGEST)
        inside = range(len(before), len(before) + PAGE_SIZE)
        base = address - len(before)
        wanted = [
            (base + _first_prefix(code, match.start()), base + match.start())
            for match in _SETCC.finditer(code)
            if match.end() > inside.start and match.start() < inside.stop
        ]
        if len(wanted) > _MANY:
            wanted = [(wanted[0][0], wanted[-1][1])]
        new = [span for span in wanted if span not in hooks]
        for span in new:
            hooks[span] = self._uc.hook_for_flags(*span)
        self._hooks += len(new)
        return min((first for first, _ in new), default=base + len(code))

    def _read(self, address: int, start: int, end: int) -> bytes:
        page = self._pages.get(address)
        return b"" if page is None else page.read(start, end)

    def rewritten(self) -> list[int]:
        """Return the shared pages whose content has changed.

        The owner stores to shared pages, and nobody tells the engine.
        """
        return [
            address
            for address, page in self._shared.items()
            if hash(page.read(0, PAGE_SIZE)) != page.hash
        ]

    @contextmanager
    def looking(self) -> Generator[None]:
        """Let translation begin anew after each page that is fetched for the first time."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False

    def has_hook(self, address: int) -> bool:
        """Say whether the instruction at an address has a hook."""
        pages = (self._pages.get((address & ~PAGE_MASK) + later) for later in (0, PAGE_SIZE))
        hooks = [hook for page in pages if page for hook in page.hooks]
        return any(first <= address <= last for first, last in hooks)

    def instruction(self, address: int) -> Instruction | None:
        """Return the instruction at an address; None if it was not fetched since a drop."""
        return decode(self.code(address))

    def code(self, address: int) -> bytes:
        """Return the fetched code at an address, as much as an instruction may take.

        Code that was fetched before a drop does not count.
        """
        code, end = b"", address + LONGEST
        while address < end and (page := self._pages.get(address & ~PAGE_MASK)) is not None:
            inside = address & PAGE_MASK
            piece = min(end - address, PAGE_SIZE - inside)
            code += page.read(inside, inside + piece)
            address += piece
        return code

    def drop(self, start: int, end: int) -> None:
        """Forget a range of guest addresses, whose translated code is dropped, too.

        Unicorn asks the fill hook for some of these addresses, and the hook must refuse
        (``PhysicalMemory.maintenance``).
        """
        every = end - start >> PAGE_SHIFT > len(self._pages)
        for address in [*self._pages] if every else range(start, end, PAGE_SIZE):
            if start <= address < end and (page := self._pages.pop(address, None)) is not None:
                for hook in page.hooks.values():
                    self._uc.unhook(hook)
                self._hooks -= len(page.hooks)
                self._shared.pop(address, None)


def _first_prefix(code: bytes, opcode: int) -> int:
    first = opcode
    while first and code[first - 1] in PREFIXES and opcode - first < LONGEST:
        first -= 1
    return first
