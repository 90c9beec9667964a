"""In a user namespace a uid may be anybody's; then it opens nothing."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from errno import EACCES, ELOOP
from pathlib import Path
from typing import NoReturn, cast

import pytest

from field import knock
from outcomes import Errno, outcome
from restrictedmem import paths
from restrictedmem.abi.process import CLONE_NEWUSER, unshare
from restrictedmem.fd import OwnedFd
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.client_services import _whose
from restrictedmem.syscall.porter import _Work
from restrictedmem.users import is_known, is_own
from users import ORDINARY, as_user, enter_user_namespace

pytestmark = pytest.mark.requires("root")

#: The overflow uid, and two ordinary ones.
NOBODY, OTHER, THIRD = 65534, 1000, 1001


def test_where_all_are_mapped_every_uid_is_somebodys() -> None:
    assert all(map(is_known, (0, OTHER, NOBODY)))
    assert as_user(lambda: (is_own(ORDINARY), is_own(0)), ORDINARY) == (True, False)


@pytest.mark.parametrize(
    ("inside", "known"), [(None, False), (NOBODY, False), (OTHER, True), (0, True)]
)
def test_where_few_are_mapped_the_overflow_uid_is_nobodys(inside: int | None, known: bool) -> None:
    def body() -> tuple[object, ...]:
        enter_user_namespace(inside)
        return os.geteuid(), is_own(os.geteuid()), is_known(NOBODY), _whose(NOBODY)

    assert as_user(body, OTHER) == (
        NOBODY if inside is None else inside,
        known,
        False,
        "an unknown uid",
    )


def test_a_namespace_may_map_all() -> None:
    begun, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            unshare(CLONE_NEWUSER)
            os.write(begun[1], b".")
            os.read(go[0], 1)
            os._exit(int(is_known(NOBODY)))
        finally:
            os._exit(9)
    os.read(begun[0], 1)
    Path(f"/proc/{child}/uid_map").write_text("0 0 4294967295", encoding="ascii")
    os.write(go[1], b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    for end in (*begun, *go):
        os.close(end)


def test_without_proc_only_the_overflow_uid_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> NoReturn:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    found = [is_known(uid) for uid in (0, OTHER, NOBODY)]
    monkeypatch.undo()
    assert found == [True, True, False]


# Users that it lets in: here the user itself, who looks like a stranger.

_BY_UID = pytest.mark.parametrize(
    ("inside", "let_in"), [(OTHER, True), (NOBODY, False), (None, False)]
)


@_BY_UID
def test_execs_door(inside: int | None, let_in: bool) -> None:
    asked: list[bool] = []

    def start() -> Service:
        asked.append(True)
        raise PermissionError

    def body() -> bool:
        enter_user_namespace(inside)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
        ):
            door.bind("\0restrictedmem-test/" + os.urandom(8).hex())
            door.listen()
            sock.connect(door.getsockname())
            unused = cast(OwnedFd, None)
            _Work(unused, unused, door, start, memoryview(bytearray(8)).cast("Q"))._let_in()
            return bool(asked)

    assert as_user(body, OTHER) is let_in


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(("inside", "answer"), [(OTHER, 0), (NOBODY, Errno(EACCES))])
def test_a_services_state(inside: int, answer: object) -> None:
    def body() -> object:
        enter_user_namespace(inside)
        with Service.start() as service, closing(knock(service)) as channel:
            return outcome(lambda: len(channel.call(wire.STATUS)[1]))

    assert as_user(body, OTHER) == answer


# Files in a directory. Root's files look like a stranger's.


@pytest.fixture
def place() -> Iterator[Path]:
    """Make a directory that others can reach.

    Anybody may put files in ``open``, only root in ``closed``. Both lead to ``file``.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "file").touch()
        os.chown(place / "file", OTHER, OTHER)
        for room, mode in (("open", 0o1777), ("closed", 0o755)):
            (place / room).mkdir()
            (place / room).chmod(mode)
            (place / room / "link").symlink_to(place / "file")
            os.mkfifo(place / room / "fifo")
            (place / room / "fifo").chmod(0o666)
        for planted in ("link", "fifo"):
            os.chown(place / "open" / planted, THIRD, THIRD, follow_symlinks=False)
        yield place


@pytest.mark.parametrize("inside", [OTHER, NOBODY, None])
def test_what_stands_where_strangers_may_put_it(place: Path, inside: int | None) -> None:
    def create(*names: str) -> object:
        return outcome(lambda: paths.create(str(place.joinpath(*names))).close())

    def body() -> list[object]:
        enter_user_namespace(inside)
        # So that to open one waits for nobody.
        with (
            OwnedFd(os.open(place / "closed" / "fifo", os.O_RDWR)),
            OwnedFd(os.open(place / "open" / "fifo", os.O_RDWR)),
        ):
            return [
                create(*names)
                for names in (
                    ("closed", "link"),
                    ("closed", "fifo"),
                    ("/dev/null",),
                    ("open", "link"),
                    ("open", "fifo"),
                )
            ]

    assert as_user(body, OTHER) == [None, None, None, Errno(ELOOP), Errno(EACCES)]


def test_a_strangers_directory_vouches_for_nothing() -> None:
    def body() -> list[bool]:
        enter_user_namespace(NOBODY)
        found = os.stat_result((0o100644, *[0] * 3, NOBODY, *[0] * 5))
        return [
            paths._is_trusted(found, os.stat_result((0o40755, *[0] * 3, uid, *[0] * 5)))
            for uid in (NOBODY, 0, THIRD)
        ]

    assert as_user(body, OTHER) == [True, True, False]


def test_who_may_change_a_path_is_said_of_directories_that_may_be_strangers(place: Path) -> None:
    def body() -> list[str]:
        enter_user_namespace(OTHER)
        with OwnedFd(os.open(place, os.O_PATH)) as directory:
            return list(paths.dangers(directory))

    # Neither /tmp nor / is named: root alone has made them.
    assert as_user(body, OTHER) == [f"{place} belongs to uid {NOBODY}"]
