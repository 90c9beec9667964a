"""C structs declared once: the annotations are the layout.

``@c_struct(size=…)`` turns a class with annotated fields into a ``ctypes.Structure``. Both type
checkers can see its keyword arguments. A layout is refused if its size is not that of the kernel's
header.
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

#: The default of an optional struct or array field: zeroes.
ZERO: Final[Any] = 0

S = TypeVar("S", bound=ctypes.Structure | ctypes.Union)


def _ctype(annotation: Any) -> Any:
    return get_args(annotation)[1] if get_origin(annotation) is Annotated else annotation


@dataclass_transform(kw_only_default=True)
def c_struct(*, size: int) -> Callable[[type[S]], type[S]]:
    """Give a ``ctypes.Structure`` or ``Union`` the fields that its annotations name, in order.

    ``size`` is ``sizeof`` in C, in bytes. A field with a default of 0 in the class body is
    optional.

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
    """Return the ``struct.Struct`` of a layout of plain integers, where ctypes is too slow.

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
