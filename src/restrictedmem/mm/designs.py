"""All designs by name."""

from errno import EINVAL
from typing import Final

from restrictedmem.mm.design import TEARDOWN, V9, V10, Bindings, Design, Folio, FolioPoc
from restrictedmem.mm.remembering import Batched, Lazy

_DESIGNS: Final[dict[str, type[Design]]] = {
    design.name: design for design in (V9, V10, Bindings, Folio, FolioPoc, Batched, Lazy)
}
#: The designs by name; each name may have ``TEARDOWN`` appended.
NAMES: Final = tuple(_DESIGNS)


def make(name: str) -> Design:
    """Make a file's design from its name, such as ``v10`` or ``folio+teardown``.

    Raises:
        OSError: EINVAL for a name that is not one of ``NAMES``.
    """
    plain = name.removesuffix(TEARDOWN)
    if plain not in _DESIGNS:
        raise OSError(
            EINVAL, f"no design {name!r}: one of {', '.join(NAMES)}, with or without {TEARDOWN}"
        )
    return _DESIGNS[plain](teardown=plain != name)
