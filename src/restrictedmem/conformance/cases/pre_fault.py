"""KVM_PRE_FAULT_MEMORY: guest memory that its owner has mapped before the guest touches it."""

import signal
import threading
from collections.abc import Callable, Mapping
from errno import EAGAIN, EFAULT, EINTR, EINVAL, ENOENT, EOPNOTSUPP
from types import MappingProxyType
from typing import Final

from restrictedmem.abi.kvm import Cap
from restrictedmem.conformance.case import Case, Family, NotApplicable, Since, UnsupportedError
from restrictedmem.conformance.facts import ENDLESS_PRE_FAULT
from restrictedmem.conformance.machines import DATA, Machine
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
MB: Final = 1 << 20
_SIZE: Final = 2 * MB + P
_BAD: Final = Errno(EINVAL)
_NONE: Final = Errno(ENOENT)
#: Answers while there is no slot, which for a private page is EFAULT, or while it goes.
_BESIDE: Final = (_NONE, Errno(EFAULT), Errno(EAGAIN), Errno(EINTR))
#: How often the slot is deleted and made again beside the call.
_ROUNDS: Final = 20
#: Seconds after which a call is said to have no end, and gets a signal.
_PATIENCE: Final = 5.0
_ENDLESS: Final = "a call had no end"


def _slot(m: Machine, private: bool) -> int:
    fd = m.private_file(_SIZE)
    m.set_region(size=_SIZE, shared=0, private=fd)
    (m.make_private if private else m.make_shared)(DATA, _SIZE)
    return fd


def _to_the_end(m: Machine, gpa: int, size: int) -> tuple[int, object]:
    """Call until nothing is left or the call fails; return the bytes left, and the errno."""
    while size:
        left = outcome(lambda: m.pre_fault(gpa, size))  # noqa: B023  it is called here
        if not isinstance(left, int):
            return size, left
        gpa, size = gpa + size - left, left
    return 0, None


def _whole(private: bool) -> Callable[[Machine], object]:
    """Do what the selftest does with ranges in the slot and over its end."""

    def does(m: Machine) -> object:
        _slot(m, private)
        found = [
            _to_the_end(m, DATA + start, size)
            for start, size in ((0, 2 * MB), (2 * MB, 2 * P), (_SIZE, P))
        ]
        return *found, m.touch(DATA, _SIZE)

    return does


def _pages(m: Machine) -> object:
    """Map private pages; return how many the file then has, and what the guest finds in them."""
    fd = _slot(m, True)
    _to_the_end(m, DATA, 8 * P)
    return m.held(fd), m.sees(DATA, 8 * P)


def _content(m: Machine) -> object:
    """Map pages that have content, of either half."""
    _slot(m, True)
    m.fill(DATA, P, 7)
    m.host_fill(P, P, 9)
    m.make_shared(DATA + P, P)
    return _to_the_end(m, DATA, 2 * P), m.sees(DATA, P), m.sees(DATA + P, P)


def _refused(gpa: int, size: int, flags: int = 0) -> Callable[[Machine], object]:
    def does(m: Machine) -> object:
        _slot(m, False)
        return outcome(lambda: m.pre_fault(gpa, size, flags))

    return does


def _private_without_file(m: Machine) -> object:
    m.set_region(size=P, shared=0)
    m.set_attributes(DATA, P)
    return outcome(lambda: m.pre_fault(DATA, P))


def _interrupt(_number: int, _frame: object) -> None:
    """End a system call with EINTR."""


def _beside_deletions(m: Machine) -> object:
    """Map memory while its slot is deleted and made; each call has done something or fails."""
    fd = m.private_file(_SIZE)
    m.make_private(DATA, _SIZE)
    m.set_region(size=_SIZE, shared=0, private=fd)
    wrong: set[str] = set()
    stop = threading.Event()
    calls = 0

    def map_all() -> None:
        nonlocal calls
        while not stop.is_set():
            left = outcome(lambda: m.pre_fault(DATA, _SIZE))
            calls += 1
            if isinstance(left, int):
                wrong.update({"nothing was done"} if left >= _SIZE else ())
            elif left not in _BESIDE:
                wrong.add(str(left))

    def watch() -> None:
        before = -1
        while before != calls:
            before = calls
            if stop.wait(_PATIENCE):
                return
        wrong.add(_ENDLESS)
        stop.set()
        signal.pthread_kill(mapper.ident or 0, signal.SIGUSR1)

    mapper = threading.Thread(target=map_all)
    # The deletion waits for the call. A channel to an engine would not bear the signal.
    watcher = threading.Thread(target=(lambda: None) if m.by_message else watch)
    handler = signal.signal(signal.SIGUSR1, _interrupt)
    with m.steps.summed(f"KVM_PRE_FAULT_MEMORY beside {_ROUNDS} deletions of the slot"):
        mapper.start()
        watcher.start()
        try:
            for _ in range(_ROUNDS):
                m.delete()
                m.set_region(size=_SIZE, shared=0, private=fd)
        finally:
            stop.set()
            mapper.join()
            watcher.join()
            signal.signal(signal.SIGUSR1, handler)
    return *sorted(wrong), _to_the_end(m, DATA, _SIZE), m.touch(DATA, _SIZE)


def _without_the_capability(m: Machine) -> object:
    if m.check_extension(Cap.PRE_FAULT_MEMORY):
        raise UnsupportedError("this machine has the capability")
    _slot(m, False)
    return outcome(lambda: m.pre_fault(DATA, P))


_TEST: Final = "pre_fault_memory_test.c test_pre_fault_memory"
_API: Final = "Documentation/virt/kvm/api.rst KVM_PRE_FAULT_MEMORY"
_NEEDS: Final = ("pre-fault",)
_ALL: Final = ((0, None), (P, _NONE), (P, _NONE), 0)


def _case(
    id_: str,
    does: Callable[[Machine], object],
    answer: object,
    source: str = _API,
    covers: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    others: Mapping[str, object] = MappingProxyType({}),
) -> Case:
    # No posting has the call; the engines answer as the kernel does.
    expected = {"gmem": answer, "proposal": answer, **others}
    return Case(id_, Family.VM, does, expected, source, covers, (*_NEEDS, *needs))


CASES: Final = (
    *(
        _case(
            f"pre-fault-{'private' if private else 'shared'}",
            _whole(private),
            _ALL,
            _TEST,
            ("PFM-inv", "PFM-1", "PFM-2", "PFM-3", "PFM-4"),
            ("private-memory",) if private else (),
        )
        for private in (False, True)
    ),
    _case(
        "pre-fault-takes-pages",
        _pages,
        (8, "0x0"),
        needs=("private-memory",),
        others={"in-place": (16, "0x0")},
    ),
    _case("pre-fault-keeps-content", _content, ((0, None), "0x7", "0x9"), needs=("halves",)),
    _case("pre-fault-unaligned-gpa", _refused(DATA + 1, P), _BAD),
    _case("pre-fault-unaligned-size", _refused(DATA, P + 1), _BAD),
    _case("pre-fault-empty", _refused(DATA, 0), _BAD),
    _case("pre-fault-flags", _refused(DATA, P, 1), _BAD),
    _case("pre-fault-wrap", _refused((1 << 64) - P, 2 * P), _BAD),
    _case("pre-fault-without-slot", _refused(DATA + 4 * MB, P), _NONE),
    Case(
        "pre-fault-private-without-file",
        Family.VM,
        _private_without_file,
        {"gmem-attributes": Errno(EFAULT), "v10": Errno(EFAULT)},
        _API,
        needs=(*_NEEDS, "attributes"),
    ),
    _case(
        "pre-fault-beside-deletions",
        _beside_deletions,
        ((0, None), 0),
        _TEST,
        ("PFM-inv",),
        ("private-memory",),
        {"gmem": Since(((0, None), 0), (_ENDLESS, (0, None), 0), ENDLESS_PRE_FAULT)},
    ),
    Case(
        "pre-fault-without-capability",
        Family.VM,
        _without_the_capability,
        {
            "gmem": Errno(EOPNOTSUPP),
            "kernel-engine": Errno(EOPNOTSUPP),
            **dict.fromkeys(
                ("software", "in-place"), NotApplicable("the engine has the capability")
            ),
        },
        _API,
        divergence="prefault",
    ),
)
