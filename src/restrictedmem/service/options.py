"""The options of a service, and the process that it is started for."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from errno import EINVAL
from math import inf
from types import NoneType
from typing import Any, Final, Self, cast

from restrictedmem.failure import failed
from restrictedmem.mm import designs
from restrictedmem.mm.notifier import Api

#: The consumer that is a VM's engine.
VM: Final = "kvm"
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,9}")


def _is(*kinds: type) -> Callable[[Any], bool]:
    """Return a check that a value is exactly of one of some types.

    A number must also be finite and not negative.
    """
    return lambda value: (
        type(value) in kinds and (type(value) not in (int, float) or 0 <= value < inf)
    )


def _is_pair(kind: type, value: Any) -> bool:
    return type(value) is tuple and [type(each) for each in cast("tuple[object, ...]", value)] == [
        kind,
        kind,
    ]


#: Checks of the values of ``Options``, which come over a command line.
_FITS: Final[dict[str, Callable[[Any], bool]]] = {
    "api": lambda value: value in [api.value for api in Api],
    "design": _is(str, NoneType),
    "memory_max": _is(int, NoneType),
    "backing": _is(str),
    "pin": _is(bool),
    "consumers": lambda value: all(_is_pair(str, each) for each in value),
    "max_consumers": _is(int, NoneType),
    "usage": _is(bool),
    "deadline": _is(float, int),
    "become": lambda value: value is None or _is_pair(int, value),
    "signing_key": _is(str, NoneType),
    "guest_memfd": _is(bool),
}


@dataclass(frozen=True, slots=True)
class Options:
    """The options that an owner may give to the service that it starts."""

    api: str = "v10"
    #: Design, which decides what consumers hear (``mm.designs.NAMES``); None for the posting's own.
    design: str | None = None
    memory_max: int | None = None
    #: Where pages lie (``mm.backing``): memfd, thp, hugetlb-2m or hugetlb-1g.
    backing: str = "memfd"
    #: Whether consumers pin the pages that they take.
    pin: bool = False
    #: Consumers beside the library's own: name and path of the program.
    consumers: tuple[tuple[str, str], ...] = ()
    #: Most consumers at the same time; None for no limit. Ended consumers that have left a process
    #: count, too.
    max_consumers: int | None = None
    #: Whether to count what owners do, for STATUS.
    usage: bool = False
    #: Seconds that a consumer may take to answer an invalidation.
    deadline: float = 5.0
    #: User to become once the mount is made (``serve``); None for no change.
    become: tuple[int, int] | None = None
    #: File with the key that signs reports; None makes a key when it is needed.
    signing_key: str | None = None
    #: Whether owners can make a guest_memfd, whose pages are converted in place.
    guest_memfd: bool = False

    def dump(self) -> str:
        """Return the options as one argument of a command line."""
        return json.dumps(asdict(self))

    def check(self) -> None:
        """Check the options, as far as that needs no file and no consumer.

        Raises:
            OSError: EINVAL for an invalid value, design, or name of a consumer.
        """
        for name, fits in _FITS.items():
            if not fits(value := getattr(self, name)):
                raise OSError(EINVAL, f"start options: {name}: {value!r}")
        designs.make(self.design or self.api)
        _check_names(self.consumers)

    @classmethod
    def load(cls, text: str) -> Self:
        """Read what ``dump`` wrote.

        Raises:
            OSError: EINVAL for anything else.
        """
        try:
            fields = json.loads(text)
            if fields["become"] is not None:
                fields["become"] = tuple(fields["become"])
            fields["consumers"] = tuple(tuple(pair) for pair in fields.get("consumers", ()))
            return cls(**fields)
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise OSError(EINVAL, f"start options: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Origin:
    """The process that a service was started for."""

    pid: int
    uid: int


def _check_names(named: Iterable[tuple[str, str]]) -> None:
    """Check the names of some programs, which are given as name and path.

    Each name must be unique and fit into a process's name (``rmem-NAME``).

    Raises:
        OSError: EINVAL.
    """
    taken = {VM}
    for name, _ in named:
        if not _NAME.fullmatch(name) or name in taken:
            raise failed(
                f"consumer {name!r}",
                EINVAL,
                "the name is taken, or not 1 to 10 of a-z, 0-9 and - with a letter first",
            )
        taken.add(name)
