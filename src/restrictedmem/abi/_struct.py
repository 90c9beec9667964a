"""C structs declared once: the annotations are the layout.

``@c_struct(size=…)`` turns a class of annotated fields into a ``ctypes.Structure`` with keyword
construction that both type checkers see, and refuses a layout whose size is not the one the kernel
header has.
"""

import ctypes
import struct
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    Final,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
u64 = Annotated[int, ctypes.c_uint64]
s32 = Annotated[int, ctypes.c_int32]
s64 = Annotated[int, ctypes.c_int64]

_CODES = {
    ctypes.c_uint8: "B",
    ctypes.c_uint16: "H",
    ctypes.c_uint32: "I",
    ctypes.c_uint64: "Q",
    ctypes.c_int32: "i",
    ctypes.c_int64: "q",
}

#: Default of a field that is a struct or an array and may be left out: zeroes.
ZERO: Final[Any] = 0

S = TypeVar("S", bound=ctypes.Structure | ctypes.Union)


def _ctype(annotation: Any) -> Any:
    return get_args(annotation)[1] if get_origin(annotation) is Annotated else annotation


@dataclass_transform(kw_only_default=True)
def c_struct(*, size: int) -> Callable[[type[S]], type[S]]:
    """Give a subclass of ``ctypes.Structure`` or ``ctypes.Union`` the fields its annotations name, in order.

    ``size`` is ``sizeof`` in C, in bytes. A default of 0 in the class body says that the field may
    be left out.

    Raises:
        TypeError: when the layout has another size.
    """

    def declare(cls: type[S]) -> type[S]:
        hints = get_type_hints(cls, include_extras=True)
        fields = [(name, _ctype(hints[name])) for name in cls.__annotations__]
        for name, _ in fields:
            if name in cls.__dict__:
                delattr(cls, name)
        cls._fields_ = fields
        if ctypes.sizeof(cls) != size:
            raise TypeError(f"{cls.__name__}: {ctypes.sizeof(cls)} bytes, the kernel's has {size}")
        return cls

    return declare


def codec(cls: type[ctypes.Structure]) -> struct.Struct:
    """Return the ``struct.Struct`` of a layout of plain integers, for paths where ctypes is too slow.

    Raises:
        TypeError: when the layout has holes, arrays or nested structs.
    """
    members: list[tuple[str, Any]] = [(field[0], field[1]) for field in cls._fields_]
    if any(kind not in _CODES for _, kind in members):
        raise TypeError(f"{cls.__name__} has fields that are not plain integers")
    found = struct.Struct("=" + "".join(_CODES[kind] for _, kind in members))
    if found.size != ctypes.sizeof(cls):
        raise TypeError(f"{cls.__name__} has padding that is not declared")
    return found
