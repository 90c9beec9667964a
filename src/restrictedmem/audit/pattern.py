"""Recognising the guest's memory: the words that ``spin hold`` puts into it, and a search that is not found by itself."""

from typing import Final, final

from restrictedmem.units import U64_MAX

Buffer = bytes | bytearray | memoryview

_WORD: Final = 8
#: At most this many places of the guest's memory are looked for, but at least one in each page.
_PLACES: Final = 1 << 14
_PAGE: Final = 4096
_GAMMA: Final = 0x9E37_79B9_7F4A_7C15


def word(seed: int, address: int) -> int:
    """Return the word that the guest keeps at an address (guests/hold.h): output number ``address / 8`` of SplitMix64."""
    z = (seed + address // _WORD * _GAMMA) & U64_MAX
    z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & U64_MAX
    z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & U64_MAX
    return z ^ z >> 31


def content(seed: int, start: int, size: int) -> bytes:
    """Return what the guest keeps from an address on; bytes, whole words."""
    return b"".join(
        word(seed, address).to_bytes(_WORD, "little")
        for address in range(start, start + size, _WORD)
    )


@final
class Pattern:
    """Words of the guest's memory, at every distance from a word's boundary, to look for in what was got.

    They are kept as Python integers, in pieces of 30 bits, beside hashes: so the table has to stay
    in the searching process, and another's memory is what it may search.
    """

    def __init__(self, seed: int, start: int, end: int) -> None:
        """Take samples of the heap that the guest holds from ``start`` to ``end``, as evenly as their number allows; addresses."""
        stride = min(max((end - start) // _PLACES & -_WORD, 2 * _WORD), _PAGE)
        self._addresses = range(start, end - _WORD, stride)
        self._words: dict[int, int] = {}
        for address in self._addresses:
            pair = word(seed, address) | word(seed, address + _WORD) << 64
            for shift in range(_WORD):
                self._words[pair >> 8 * shift & U64_MAX] = address

    def find(self, data: Buffer) -> int | None:
        """Return the guest address of something in ``data`` that the guest keeps private, None when there is nothing.

        A whole page is found however it lies; of less, one sample and the word after it must be
        there.
        """
        view = memoryview(data).cast("B")
        with view[: len(view) & -_WORD].cast("Q") as words:
            if self._words.keys().isdisjoint(words):
                return None
            return next(self._words[found] for found in words if found in self._words)
