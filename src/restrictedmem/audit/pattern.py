"""The pattern of the guest's memory: the words of ``spin hold``, and a search for them."""

from typing import Final, final

from restrictedmem.units import U64_MAX

Buffer = bytes | bytearray | memoryview

_WORD: Final = 8
#: The search looks for at most this many places of the guest's memory, but for at least one in each
#: page.
_PLACES: Final = 1 << 14
_PAGE: Final = 4096
_GAMMA: Final = 0x9E37_79B9_7F4A_7C15


def word(seed: int, address: int) -> int:
    """Return the word that the guest keeps at an address (guests/hold.h).

    It is output number ``address / 8`` of SplitMix64.
    """
    z = (seed + address // _WORD * _GAMMA) & U64_MAX
    z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & U64_MAX
    z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & U64_MAX
    return z ^ z >> 31


def content(seed: int, start: int, size: int) -> bytes:
    """Return the words that the guest keeps from an address on; ``size`` is in bytes."""
    return b"".join(
        word(seed, address).to_bytes(_WORD, "little")
        for address in range(start, start + size, _WORD)
    )


@final
class Pattern:
    """Words of the guest's memory to look for in data, at any distance from a word's boundary.

    Python keeps them as integers, in pieces of 30 bits, with hashes beside them; a hash may equal
    its word. So a search of the own process would find this table. The table must stay in the
    searching process, and this process may search only the memory of others.
    """

    def __init__(self, seed: int, start: int, end: int) -> None:
        """Take samples of the guest's heap from address ``start`` to address ``end``.

        The samples lie as evenly as their number allows.
        """
        stride = min(max((end - start) // _PLACES & -_WORD, 2 * _WORD), _PAGE)
        self._words: dict[int, int] = {}
        for address in range(start, end - _WORD, stride):
            pair = word(seed, address) | word(seed, address + _WORD) << 64
            for shift in range(_WORD):
                self._words[pair >> 8 * shift & U64_MAX] = address

    def find(self, data: Buffer) -> int | None:
        """Return the guest address of a private word that is in ``data``, or None.

        A whole page of the guest is found at any alignment. A smaller part is found if it has a
        sample and the word after it.
        """
        view = memoryview(data).cast("B")
        with view[: len(view) & -_WORD].cast("Q") as words:
            if self._words.keys().isdisjoint(words):
                return None
            return next(self._words[found] for found in words if found in self._words)
