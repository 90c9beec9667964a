"""The target of system calls whose arguments the supervisor reads from registers and memory."""

import ctypes
import io
import marshal
import mmap
import os
from contextlib import ExitStack
from errno import EINVAL, ENODEV
from functools import cache, partial
from typing import Any, Final, cast
from unittest import mock

from fuzz.source import Source
from restrictedmem.abi import process
from restrictedmem.abi.memory import RMFD_HUGEPAGE
from restrictedmem.abi.seccomp import SECCOMP_USER_NOTIF_FLAG_CONTINUE, seccomp_data, seccomp_notif
from restrictedmem.abi.stat import device
from restrictedmem.fd import OwnedFd
from restrictedmem.syscall import scout, supervisor
from restrictedmem.syscall.filter import MAP_ANONYMOUS, MAP_PRIVATE, MAP_TYPE, TABLES
from restrictedmem.syscall.scout import Question
from restrictedmem.units import MAX_FILE_BYTES

_TABLES: Final = TABLES["x86_64"]
_NUMBER: Final = 451
_U32: Final = 0xFFFF_FFFF
_MAP_32BIT: Final = 0x40
_MAP_HUGETLB: Final = 0x4_0000
#: MAP_FIXED, MAP_FIXED_NOREPLACE.
_FIXED: Final = 0x10_0010
#: struct statfs, by architecture and number: its size, and the bytes of f_type.
_STATFS: Final = {(0, 138): (120, 8), (1, 100): (64, 4), (1, 269): (84, 4)}
_MAGIC: Final = 0x5245_534D
_CONTINUE: Final = -1


class _Area:
    """A page of this process below 4 GiB, the only one that the caller has mapped."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(
            -1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
        )
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def maps(self, rights: str, proc: int, pid: int) -> io.BytesIO:
        """Return /proc/PID/maps."""
        line = (
            f"{self.address:x}-{self.address + mmap.PAGESIZE:x} {rights} 00000000 00:01 1 "
            f"/dev/zero (deleted)\n"
        )
        return io.BytesIO(line.encode())


_area: Final = cache(_Area)


class _Scout:
    """A scout in this process (``Scout``)."""

    pid: Final = 0

    def __init__(self, proc: OwnedFd) -> None:
        self._looks = scout._Looks(proc)
        self._ready = OwnedFd(os.eventfd(0))
        self._answer: bool | OSError = False

    def fileno(self) -> int:
        return self._ready.fileno()

    def ask(self, question: Question) -> None:
        message = marshal.dumps(question)
        assert len(message) <= scout._MESSAGE
        name, arguments = marshal.loads(message)
        try:
            self._answer = getattr(self._looks, name)(*arguments)
        except OSError as error:
            self._answer = error

    def answer(self) -> bool:
        if isinstance(self._answer, OSError):
            raise self._answer
        return self._answer

    def kill(self) -> None:
        self._looks._let_go()
        self._ready.close()


class _Porter:
    """A ``Porter``, which makes descriptors, that records the flags."""

    def __init__(self, number: int) -> None:
        self.device = number
        self.asked: list[int] = []

    def ask(self, call: int, flags: int) -> None:
        self.asked.append(flags)


def _argument(source: Source, restricted: int, other: int) -> int:
    """Make an argument: a descriptor, an address in the area, or any number.

    Perhaps it has upper bits that mean nothing to some calls.
    """
    kind = source.number(1)
    match kind & 7:
        case 0:
            found = source.number(8)
        case 1:
            found = restricted
        case 2:
            found = other
        case 3:
            found = _area().address + source.number(2)
        case _:
            found = source.number(1)
    return found | (0xDEAD << 32 if kind & 0x80 else 0)


def calls(data: bytes) -> None:
    """Answer calls under a filter.

    Each call has one answer. The supervisor decides by the registers alone, and writes to no memory
    of another process.
    """
    source = Source(data)
    kind, area = source.number(1), _area()
    with ExitStack() as undo:
        # Its path is that of a restricted descriptor, and its device what the porter says.
        memory = undo.enter_context(OwnedFd(os.memfd_create("/restrictedmem")))
        other = undo.enter_context(OwnedFd(os.memfd_create("other")))
        porter = _Porter(device(f"/proc/self/fd/{memory.fileno()}") if kind & 1 else 0)
        proc = undo.enter_context(process.proc())
        made = supervisor.Supervisor(
            cast("OwnedFd", None),
            cast("Any", porter),
            proc,
            _TABLES,
            _NUMBER,
            cachestat=bool(kind & 2),
        )
        rights = ("rw-p", "r--p", "-w-p", "---p")[kind >> 2 & 3]
        undo.enter_context(
            mock.patch.object(scout, "_mappings", side_effect=partial(area.maps, rights))
        )
        undo.enter_context(mock.patch.object(supervisor, "Scout", _Scout))
        undo.callback(_end, made)
        for _ in range(4):
            if not source:
                return
            choice = source.number(1)
            table = choice & 1
            numbers = [
                _NUMBER,
                *(
                    n
                    for n in (_TABLES[table].mmap, _TABLES[table].fstatfs, _TABLES[table].fstatfs64)
                    if n
                ),
            ]
            numbers += [number for number in (_TABLES[table].old_mmap,) if number]
            number = numbers[(choice >> 1) % len(numbers)]
            words = [_argument(source, memory.fileno(), other.fileno()) for _ in range(6)]
            area.memory[:] = content = source.take(24).ljust(mmap.PAGESIZE, b"\xa5")
            asked = len(porter.asked)
            given = _ask(made, table, number, words)
            if len(porter.asked) > asked:
                assert number == _NUMBER
                assert porter.asked[-1] == words[0] & _U32 <= RMFD_HUGEPAGE
                assert not given
                continue
            assert len(given) == 1, "one answer"
            _check(
                made,
                table,
                number,
                words,
                content,
                given[0],
                rights,
                memory.fileno() if porter.device else -1,
            )


def _end(made: supervisor.Supervisor) -> None:
    assert not made._calls
    for each in made._idle:
        each.kill()


def _ask(made: supervisor.Supervisor, table: int, number: int, words: list[int]) -> list[int]:
    """Let the supervisor and its scouts answer a call, and return the errnos.

    ``_CONTINUE`` stands for an answer by the kernel.
    """
    given: list[int] = []
    found = seccomp_data(
        nr=number,
        arch=_TABLES[table].arch,
        **{f"arg{index}": word for index, word in enumerate(words)},
    )  # pyright: ignore

    def receive(_: object, notification: seccomp_notif) -> None:
        notification.id, notification.pid, notification.data = 1, os.getpid(), found

    def respond(_: object, call: int, error: int = 0, flags: int = 0) -> None:
        assert call == 1
        given.append(_CONTINUE if flags == SECCOMP_USER_NOTIF_FLAG_CONTINUE else error)

    with (
        mock.patch.object(supervisor, "SECCOMP_IOCTL_NOTIF_RECV", receive),
        mock.patch.object(supervisor, "respond", respond),
        mock.patch.object(supervisor, "check_waiting"),
    ):
        made._hear()
        for _ in range(4):
            for fd in [*made._calls]:
                made._go_on(fd)
    return given


def _is_wrong_anyway(table: int, words: list[int]) -> bool:
    """Say whether an mmap has numbers that no file can be mapped with."""
    address, length, _, flags, _, offset = (word & (_U32 if table else -1) for word in words)
    # An address can be asked for above the usual ones, where page tables have five levels.
    end, top = (address + length, 1 << 56) if flags & _FIXED else (length, 1 << 47)
    wrong = [
        length == 0,
        end > top - mmap.PAGESIZE,
        flags & _MAP_HUGETLB,
        flags & _FIXED and address & 4095,
    ]
    # i386's is in pages.
    wrong += [] if table else [offset & 4095, offset + length > MAX_FILE_BYTES]
    return any(wrong)


def _check(
    made: supervisor.Supervisor,
    table: int,
    number: int,
    words: list[int],
    before: bytes,
    given: int,
    rights: str,
    restricted: int,
) -> None:
    """Check an answer, and the area, against what the call's arguments say."""
    area, size, after = _area(), mmap.PAGESIZE, bytes(_area().memory)
    at = words[2 if number == 269 else 1] & (_U32 if table else -1)
    layout = _STATFS.get((table, number))
    if given == 0:
        assert layout is not None
        offset = at - area.address
        assert 0 <= offset <= size - layout[0]
        assert words[0] & _U32 == restricted
        assert "w" in rights
        assert int.from_bytes(after[offset : offset + layout[1]], "little") == _MAGIC
        before = before[:offset] + after[offset : offset + layout[0]] + before[offset + layout[0] :]
    assert after == before, "memory that is not the result's"
    if number == _TABLES[table].mmap:
        refused = words[4] & _U32 == restricted and not _is_wrong_anyway(table, words)
        assert given == (ENODEV if refused else _CONTINUE)
    elif number == _TABLES[table].old_mmap:
        offset = (words[0] & _U32) - area.address
        struct = before[offset : offset + 24] if 0 <= offset <= size - 24 and "r" in rights else b""
        flags, fd = int.from_bytes(struct[12:16], "little"), int.from_bytes(struct[16:20], "little")
        private = flags & (MAP_TYPE | MAP_ANONYMOUS) == MAP_PRIVATE
        assert given == (ENODEV if struct and private and fd == restricted else _CONTINUE)
    elif number == _NUMBER:
        assert words[0] & _U32 & ~RMFD_HUGEPAGE
        spans = ((words[1], 16), (words[2], 40))
        inside = all(
            not word & 7 and area.address <= word <= area.address + size - length
            for word, length in spans
        )
        opened = os.path.lexists(f"/proc/self/fd/{words[0] & _U32}")
        assert given == (
            _CONTINUE if made._cachestat and inside and opened and not words[3] & _U32 else EINVAL
        )
    elif number == 269 and words[0] & _U32 == restricted:
        assert (given == EINVAL) == (words[1] & _U32 != 84)
