"""Paths through directories of others: whatever they put there, and whenever, root's files stay."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EACCES, EADDRINUSE, EAGAIN, EEXIST, EINVAL, EISDIR, ELOOP, EMLINK, ENOENT
from functools import partial
from pathlib import Path

import pytest

from outcomes import Errno, outcome
from restrictedmem import paths
from restrictedmem.fd import OwnedFd
from restrictedmem.service import listener, signing
from users import ORDINARY
from waiting import wait_until

pytestmark = pytest.mark.requires("root")

SECRET = "root:x:0:0"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Make a file that is root's alone."""
    file = tmp_path / "victim"
    file.write_text(SECRET, encoding="ascii")
    file.chmod(0o600)
    return file


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Make a directory of another user."""
    place = tmp_path / "theirs"
    place.mkdir()
    os.chown(place, ORDINARY, ORDINARY)
    return place


def plant(link: Path, target: Path, uid: int = ORDINARY) -> None:
    """Put a symbolic link of another user's into the place of whatever has the name."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.chown(link, uid, uid, follow_symlinks=False)


def intact(victim: Path) -> bool:
    found = victim.stat()
    kept = (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    return kept and victim.read_text(encoding="ascii") == SECRET


def close(fd: OwnedFd) -> str:
    with fd:
        return os.readlink(f"/proc/self/fd/{fd.fileno()}")


# Files that are written.


def test_a_file_is_made_or_emptied(tmp_path: Path) -> None:
    file = tmp_path / "new"
    for content in ("first", "2"):
        with open(paths.create(str(file)).detach(), "w", encoding="ascii") as opened:
            opened.write(content)
        assert file.read_text(encoding="ascii") == content
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_relative_path_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert close(paths.create("a/..//./a/file")) == str(tmp_path / "a/file")
    assert outcome(lambda: paths.create("")) == Errno(EISDIR)
    assert outcome(lambda: paths.create("missing/file")) == Errno(ENOENT)
    assert outcome(lambda: paths.create("a")) == Errno(EISDIR)


def test_links_of_ones_own_are_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    (tmp_path / "there/link").symlink_to(tmp_path / "here/file")
    assert close(paths.create(str(tmp_path / "here/link"))) == str(tmp_path / "there/file")
    (tmp_path / "loop").symlink_to("loop")
    assert outcome(lambda: paths.create(str(tmp_path / "loop"))) == Errno(ELOOP)


def test_links_of_the_kernel_are_followed() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as output:
        with open(writer, "wb"), paths.create(f"/dev/fd/{writer}") as again:
            os.write(again.fileno(), b"through")
        assert output.read() == b"through"
    assert close(paths.create("/dev/null")) == "/dev/null"


def test_a_planted_link_is_not_followed(theirs: Path, victim: Path) -> None:
    plant(theirs / "file", victim)
    plant(theirs / "directory", victim.parent)
    for path in "file", "directory/victim", "directory/new":
        assert outcome(lambda: paths.create(str(theirs / path))) == Errno(ELOOP)  # noqa: B023
    assert intact(victim)
    assert not (victim.parent / "new").exists()


def test_a_second_name_of_a_file_is_not_emptied(theirs: Path, victim: Path) -> None:
    (theirs / "file").hardlink_to(victim)
    assert outcome(lambda: paths.create(str(theirs / "file"))) == Errno(EMLINK)
    assert intact(victim)


def test_another_users_fifo_is_not_waited_for(theirs: Path) -> None:
    os.mkfifo(theirs / "file")
    os.chown(theirs / "file", ORDINARY, ORDINARY)
    assert outcome(lambda: paths.create(str(theirs / "file"))) == Errno(EACCES)


@pytest.mark.parametrize("mode", [0o1777, 0o1770])
def test_another_users_file_is_not_written_where_all_may_put_theirs(
    tmp_path: Path, mode: int
) -> None:
    """The kernel's fs.protected_regular covers only O_CREAT, so it does not prevent this."""
    tmp_path.chmod(mode)
    for uid, right in ((ORDINARY, Errno(EACCES)), (0, None)):
        file = tmp_path / str(uid)
        file.write_text("old", encoding="ascii")
        os.chown(file, uid, uid)
        assert outcome(lambda: paths.create(str(file)).close()) == right  # noqa: B023
        assert file.read_text(encoding="ascii") == ("" if right is None else "old")


@pytest.mark.parametrize("mode", [0o1755, 0o777])
def test_another_users_file_is_written_elsewhere(theirs: Path, mode: int) -> None:
    """Where nobody else may put files, or everybody may take them away."""
    theirs.chmod(mode)
    file = theirs / "file"
    file.write_text("old", encoding="ascii")
    os.chown(file, ORDINARY, ORDINARY)
    with paths.create(str(file)) as opened:
        assert os.get_blocking(opened.fileno())
    assert file.read_text(encoding="ascii") == ""


@contextmanager
def leased(file: Path, uid: int) -> Generator[None]:
    """Have a process of a user hold a lease on a file of its, and not give it back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fd = os.open(file, os.O_RDWR)
            os.setresuid(uid, uid, uid)
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(writer, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert pipe.read(1) == b".", "no lease is to be had here"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_users_lease_is_not_waited_for(theirs: Path) -> None:
    file = theirs / "file"
    file.write_text("old", encoding="ascii")
    os.chown(file, ORDINARY, ORDINARY)
    with leased(file, ORDINARY):
        for act in (paths.create, paths.open_regular):
            assert outcome(partial(act, str(file))) == Errno(EAGAIN)
    assert file.read_text(encoding="ascii") == "old"


def test_a_lease_of_ones_own_is_waited_for(tmp_path: Path) -> None:
    """A file server holds such, and gives them back when it is asked to."""
    file = tmp_path / "file"
    file.write_text("old", encoding="ascii")
    done: list[object] = []
    thread = threading.Thread(
        target=lambda: done.append(outcome(lambda: paths.create(str(file)).close()))
    )
    with leased(file, 0):
        thread.start()
        wait_until(lambda: _is_waited_for(thread), "the file to be waited for")
    thread.join(10)
    assert done == [None]


def _is_waited_for(thread: threading.Thread) -> bool:
    with open(f"/proc/self/task/{thread.native_id}/wchan", encoding="ascii") as file:
        return "break_lease" in file.read()


def racing(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, deed: Callable[[], None]
) -> None:
    """Do something once, right after the first call of a function."""
    honest, todo = getattr(module, name), [deed]

    def call(*arguments: object, **options: object) -> object:
        result = honest(*arguments, **options)
        if todo:
            todo.pop()()
        return result

    monkeypatch.setattr(module, name, call)


def test_a_link_that_comes_after_the_look(
    monkeypatch: pytest.MonkeyPatch, theirs: Path, victim: Path
) -> None:
    (theirs / "file").write_text("old", encoding="ascii")
    swap = lambda: plant(theirs / "file", victim)  # noqa: E731
    racing(monkeypatch, paths, "_check_target", swap)
    # The file that was checked is the file that is opened.
    assert close(paths.create(str(theirs / "file"))).startswith(str(theirs))
    assert intact(victim)


@pytest.mark.parametrize("there", [False, True], ids=["no file", "a file"])
def test_a_link_that_comes_after_the_walk(
    monkeypatch: pytest.MonkeyPatch, theirs: Path, victim: Path, *, there: bool
) -> None:
    if there:
        (theirs / "file").write_text("old", encoding="ascii")
    swap = lambda: plant(theirs / "file", victim)  # noqa: E731
    racing(monkeypatch, paths, "resolve", swap)
    assert outcome(lambda: paths.create(str(theirs / "file"))) == Errno(ELOOP)
    assert intact(victim)


def test_a_directory_that_is_exchanged(
    monkeypatch: pytest.MonkeyPatch, theirs: Path, victim: Path
) -> None:
    room = theirs / "room"
    room.mkdir()

    def swap() -> None:
        room.rename(theirs / "old")
        plant(room, victim.parent)

    racing(monkeypatch, paths, "resolve", swap)
    assert close(paths.create(str(room / "victim"))) == str(theirs / "old/victim")
    assert intact(victim)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["exec", "--json", "FILE", "true"], marks=pytest.mark.requires("seccomp")),
        pytest.param(["run", "--trace", "FILE", "probe"], marks=pytest.mark.requires("fuse")),
        ["trace", "to-perfetto", "TRACE", "FILE"],
    ],
    ids=["exec --json", "run --trace", "trace to-perfetto"],
)
def test_no_command_writes_through_a_planted_link(
    tmp_path: Path, theirs: Path, victim: Path, command: list[str]
) -> None:
    plant(theirs / "file", victim)
    trace = tmp_path / "trace"
    event = '{"ts": 1, "pid": 1, "tid": 1, "event": "trace", "version": 1}\n'
    trace.write_text(event, encoding="ascii")
    places = {"FILE": str(theirs / "file"), "TRACE": str(trace)}
    done = subprocess.run(
        [sys.executable, "-m", "restrictedmem", *(places.get(word, word) for word in command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert intact(victim)
    words = (
        f"open: {os.strerror(ELOOP)} (file is a symbolic link of uid {ORDINARY}, "
        f"which is not followed)"
    )
    assert (done.returncode, done.stderr) == (1, f"error: {theirs}/file: {words}\n")


# Keys that are read.


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory", "socket"])
def test_a_key_is_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key"
    match kind:
        case "FIFO":
            os.mkfifo(path, 0o600)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case _:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
    assert outcome(lambda: signing.Signer.load(str(path))) == Errno(EINVAL)


def test_the_key_that_was_looked_at_is_read(
    monkeypatch: pytest.MonkeyPatch, theirs: Path, victim: Path
) -> None:
    path = theirs / "key"
    path.write_text("no key", encoding="ascii")
    path.chmod(0o600)
    os.chown(path, ORDINARY, ORDINARY)
    swap = lambda: plant(path, victim)  # noqa: E731
    racing(monkeypatch, paths, "open_regular", swap)
    assert outcome(lambda: signing.Signer.load(str(path))) == Errno(EACCES)


def test_a_huge_key_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    os.truncate(path, 1 << 40)
    assert outcome(lambda: signing.Signer.load(str(path))) == Errno(EINVAL)


# Sockets.


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Return what others do right before and right after bind(2)."""
    deeds: list[Callable[[], None]] = [lambda: None, lambda: None]

    class Racing(socket.socket):
        def bind(self, address: object) -> None:
            deeds[0]()
            super().bind(address)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            deeds[1]()

    monkeypatch.setattr(socket, "socket", Racing)
    return deeds


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_socket_is_born_with_its_permissions(
    tmp_path: Path, bound: list[Callable[[], None]]
) -> None:
    path, seen = tmp_path / "socket", list[int]()
    bound[1] = lambda: seen.append(mode(path))
    before = os.umask(0o077)
    try:
        for wanted in 0o600, 0o666, 0o777, 0o000:
            with listener.listen(str(path), wanted):
                assert seen.pop() == mode(path) == wanted
            assert not path.exists()
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)


def test_a_link_planted_after_bind_opens_no_file(
    theirs: Path, victim: Path, bound: list[Callable[[], None]]
) -> None:
    path = theirs / "socket"
    bound[1] = lambda: plant(path, victim)
    assert outcome(lambda: listener.listen(str(path), 0o666).__enter__()) == Errno(EEXIST)
    assert intact(victim)
    # It is not ours to remove.
    assert path.is_symlink()


def test_a_directory_exchanged_before_bind_gets_no_socket(
    theirs: Path, victim: Path, bound: list[Callable[[], None]]
) -> None:
    room = theirs / "room"
    room.mkdir()

    def swap() -> None:
        room.rename(theirs / "old")
        plant(room, victim.parent)

    bound[0] = swap
    with listener.listen(str(room / "socket"), 0o666):
        assert not (victim.parent / "socket").exists()
        assert stat.S_ISSOCK((theirs / "old/socket").stat().st_mode)
    assert not (theirs / "old/socket").exists()


def test_a_link_in_the_way_is_not_followed(theirs: Path, victim: Path) -> None:
    plant(theirs / "socket", victim)
    assert outcome(lambda: listener.listen(str(theirs / "socket"), 0o666).__enter__()) == Errno(
        EADDRINUSE
    )
    plant(theirs / "room", victim.parent)
    path = str(theirs / "room/socket")
    assert outcome(lambda: listener.listen(path, 0o666).__enter__()) == Errno(ELOOP)
    assert intact(victim)


def test_what_took_the_sockets_place_stays(theirs: Path, victim: Path) -> None:
    for kind in "socket", "link":
        path = theirs / kind
        with listener.listen(str(path), 0o666), socket.socket(socket.AF_UNIX) as other:
            path.unlink()
            if kind == "socket":
                other.bind(str(path))
            else:
                plant(path, victim)
        assert path.is_symlink() or path.is_socket()
    assert intact(victim)


def test_a_stale_socket_is_replaced_if_it_is_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for owner in 0, ORDINARY:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
            stale.bind(str(path))
        os.chown(path, owner, owner)
        made = path.lstat().st_ino
        if owner:
            assert outcome(lambda: listener.listen(str(path), 0o600).__enter__()) == Errno(
                EADDRINUSE
            )
            assert path.lstat().st_ino == made
        else:
            with (
                listener.listen(str(path), 0o600),
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
            ):
                client.connect(str(path))


def test_a_socket_whose_queue_is_full_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
    with (
        socket.socket(*kind) as busy,
        socket.socket(*kind) as first,
        socket.socket(*kind) as second,
    ):
        busy.bind(str(path))
        busy.listen(0)
        for each in first, second:
            each.setblocking(False)
            each.connect_ex(str(path))
        assert outcome(lambda: listener.listen(str(path), 0o600).__enter__()) == Errno(EADDRINUSE)


def test_who_else_could_exchange_the_socket_is_said(tmp_path: Path, theirs: Path) -> None:
    os.chmod(tmp_path, 0o755)
    room = theirs / "room"
    room.mkdir()
    os.chmod(room, 0o777)
    with listener.listen(str(room / "socket"), 0o666) as (_, dangers):
        assert dangers[:2] == [f"others may write to {room}", f"{theirs} belongs to uid {ORDINARY}"]
    os.chmod(room, 0o1777)
    with listener.listen(str(room / "socket"), 0o666) as (_, dangers):
        assert dangers[0] == f"{theirs} belongs to uid {ORDINARY}"
