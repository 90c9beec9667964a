"""The doctor's probes in their child, and all together.

The tests try the findings, what follows from them, and how they are shown.
"""

import argparse
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from outcomes import Errno, outcome
from outcomes import in_child as apart
from planting import always, stub
from processes import children
from restrictedmem.abi import memory
from restrictedmem.cli import doctor
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.machine import examination, finding
from restrictedmem.machine.examination import Conclusion, Examination, Group, conclude
from restrictedmem.machine.finding import Finding, State
from restrictedmem.probe import in_child
from restrictedmem.protocol import exits
from restrictedmem.service import client
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vmm import Ended, Vmm


def do_nothing(*_: object) -> None:
    """Take anything, and do nothing."""


# A probe in a child.


def test_in_child_returns_what_the_probe_returns() -> None:
    assert in_child(lambda: (os.getppid(), {"a": 1})) == (os.getpid(), {"a": 1})


def test_in_child_raises_what_the_probe_raises() -> None:
    def probe() -> None:
        raise OSError(errno.EXDEV, "name: said")

    with pytest.raises(OSError) as caught:
        in_child(probe)
    assert (caught.value.errno, caught.value.strerror) == (errno.EXDEV, "name: said")


def test_in_child_says_which_signal_ended_the_probe() -> None:
    with pytest.raises(OSError, match="SIGKILL") as caught:
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert caught.value.errno == errno.ECHILD


def test_in_child_does_not_wait_for_a_probe_that_hangs() -> None:
    def body() -> tuple[object, bool, int]:
        began = time.monotonic()
        came = outcome(lambda: in_child(signal.pause, deadline=0.1))
        return came, time.monotonic() - began < 5, os.waitpid(-1, 0)[1]

    # This child has to be the only one.
    assert apart(body) == repr((Errno(errno.ETIMEDOUT), True, 9))


def test_in_child_does_not_wait_for_a_child_that_hangs_once_it_has_answered() -> None:
    def probe() -> str:
        os._exit = lambda status: signal.pause()  # type: ignore[assignment,return-value]
        return "answer"

    came = apart(lambda: (outcome(lambda: in_child(probe, deadline=0.1)), os.waitpid(-1, 0)[1]))
    assert came == repr((Errno(errno.ETIMEDOUT), 9))


def test_the_child_ends_with_who_asked() -> None:
    code = (
        "import os, signal; from restrictedmem.probe import in_child; "
        "in_child(lambda: (print(os.getpid(), flush=True), signal.pause()), 100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as asking:
        assert asking.stdout is not None
        with OwnedFd(os.pidfd_open(int(asking.stdout.readline()))) as child:
            asking.kill()
            assert readable([child], 10), "waited 10 s for the child to end"


def test_a_bug_in_a_probe_stays_in_its_child(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError) as caught:
        in_child(lambda: 1 // 0)
    assert caught.value.errno == errno.ECHILD
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_missing_setting_is_none(tmp_path: Path) -> None:
    (tmp_path / "there").write_text(" 1\n")
    assert (finding.setting(str(tmp_path / "there")), finding.setting(str(tmp_path / "not"))) == (
        "1",
        None,
    )


# All together.


@pytest.fixture(scope="module")
def examined() -> Examination:
    return examination.examine()


def test_names_are_unique_and_what_is_missing_says_what_follows(examined: Examination) -> None:
    findings = [one for group in examined.groups.values() for one in group]
    assert len({one.name for one in findings}) == len(findings)
    assert not [one.name for one in findings if one.state is State.NO and not one.consequence]
    assert {one.name for one in findings if one.state is State.NO and not one.remedy} <= {
        "hardware virtualisation"
    }


def test_an_examination_leaves_nothing_behind() -> None:
    def there_is() -> tuple[object, ...]:
        return (
            sorted(os.listdir("/proc/self/fd")),
            Path("/proc/self/mountinfo").read_text(),
            children(os.getpid()),
        )

    def reaped() -> bool:
        try:
            return os.waitpid(-1, os.WNOHANG)[0] > 0
        except ChildProcessError:
            return False

    # Other tests of this process may have left children.
    while reaped():
        pass
    before = there_is()
    examination.examine()
    assert not reaped()
    assert there_is() == before


@pytest.mark.requires("fuse", "root")
def test_root_makes_a_descriptor_by_its_own_mount(examined: Examination) -> None:
    made = examined.conclusion.descriptor
    assert (made.state, made.detail.endswith("own mount")) == (State.YES, True)
    assert examined.conclusion.usable


def everything(**changed: Finding) -> dict[str, Finding]:
    names = [
        *(
            "/dev/fuse",
            "own mount",
            "user namespace mount",
            "fusermount3",
            "user namespaces",
            "FUSE protocol",
            "descriptors at once",
        ),
        *("Unicorn", "/dev/kvm", "KVM capabilities"),
        *("memory attributes", "guest_memfd", "guest_memfd, MMAP", "answered call"),
    ]
    return {name: Finding(name, State.YES, "there") for name in names} | {
        one.name: one for one in changed.values()
    }


MADE = Finding("descriptor", State.YES, "made")
NOT_MADE = Finding("descriptor", State.NO, "refused")
RAN = {engine: Finding(f"{engine} engine", State.YES, "ran") for engine in ("software", "kernel")}
RAN_NOT = {
    engine: Finding(f"{engine} engine", State.NO, "no guest ran: why")
    for engine in ("software", "kernel")
}


def test_everything_there_is_everything_possible() -> None:
    assert {part.state for part in conclude(everything(), MADE, RAN).parts().values()} == {
        State.YES
    }


def test_no_descriptor_names_the_first_obstacle() -> None:
    closed = Finding("/dev/fuse", State.NO, "closed", "nothing", "open it")
    not_tried = {
        engine: examination.run_guest(engine, NOT_MADE) for engine in ("software", "kernel")
    }
    found = conclude(everything(device=closed), NOT_MADE, not_tried)
    assert (found.descriptor.remedy, found.exec.state, found.usable) == ("open it", State.NO, False)
    assert (found.software_engine.state, found.kernel_engine.state) == (
        State.UNKNOWN,
        State.UNKNOWN,
    )


def test_a_way_that_is_not_needed_is_no_obstacle() -> None:
    ways = {
        name: Finding(name, State.NO, "refused", "", f"mend {name}")
        for name in ("own mount", "user namespace mount", "fusermount3")
    }
    few = Finding("descriptors at once", State.PARTLY, "RLIMIT_NOFILE 12", "few", "raise it")
    assert (
        conclude(
            everything(few=few, missing=ways["fusermount3"]), NOT_MADE, RAN_NOT
        ).descriptor.remedy
        == "raise it"
    )
    assert (
        conclude(everything(few=few, **ways), NOT_MADE, RAN_NOT).descriptor.remedy
        == "mend fusermount3"
    )


def test_an_engine_is_believed_in_after_a_guest_has_run_on_it_and_not_before() -> None:
    found = conclude(everything(), MADE, RAN_NOT)
    for part in (found.software_engine, found.kernel_engine):
        assert (part.state, part.detail, part.consequence) == (
            State.NO,
            "no guest ran: why",
            f"no guest runs on the {part.name}",
        )
    assert not found.usable
    assert conclude(everything(), MADE, {**RAN_NOT, "kernel": RAN["kernel"]}).usable
    assert conclude(everything(), MADE, {**RAN_NOT, "software": RAN["software"]}).usable


@pytest.mark.parametrize("name", ["/dev/kvm", "KVM capabilities", "guest_memfd"])
def test_what_the_kernel_engine_lacks_is_its_remedy(name: str) -> None:
    missing = Finding(name, State.UNKNOWN, "not there", "", f"get {name}")
    found = conclude(everything(missing=missing), MADE, {**RAN, "kernel": RAN_NOT["kernel"]})
    assert (found.kernel_engine.state, found.kernel_engine.remedy, found.usable) == (
        State.NO,
        f"get {name}",
        True,
    )


def test_what_the_software_engine_lacks_is_its_remedy() -> None:
    missing = Finding("Unicorn", State.NO, "not installed", "no guest", "install it")
    found = conclude(everything(unicorn=missing), MADE, {**RAN, "software": RAN_NOT["software"]})
    assert (found.software_engine.state, found.software_engine.remedy, found.usable) == (
        State.NO,
        "install it",
        True,
    )


@pytest.mark.parametrize(
    ("attributes", "mappable", "remedy"),
    [("yes", "no", ""), ("no", "yes", ""), ("no", "no", "get it")],
)
def test_the_kernel_engine_needs_attributes_or_mmap(
    attributes: str, mappable: str, remedy: str
) -> None:
    changed = {
        "attributes": Finding("memory attributes", State(attributes), ""),
        "mappable": Finding("guest_memfd, MMAP", State(mappable), "", remedy="get it"),
    }
    assert conclude(everything(**changed), MADE, RAN_NOT).kernel_engine.remedy == remedy


@pytest.mark.requires("fuse")
def test_a_guest_runs_on_the_software_engine(examined: Examination) -> None:
    found = examined.conclusion.software_engine
    assert (found.state, "digested 256 KiB" in found.detail) == (State.YES, True)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ["software", "kernel"])
def test_a_guest_that_does_not_run_right_is_no_guest_that_ran(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vmm, "load", do_nothing)
    found = examination.run_guest(engine, MADE)
    assert found.state is State.NO
    assert found.detail.startswith("no guest ran: ")


@pytest.mark.parametrize(
    ("ended", "said", "refused"),
    [
        (Ended(0), b"%s  -\n", None),
        (Ended(3), b"%s  -\n", "the guest stopped: status 3"),
        (Ended(0, exits.Shutdown(8)), b"%s  -\n", f"the guest stopped: {exits.Shutdown(8)}"),
        (Ended(0), b"- %s\n", "the guest's digest is wrong"),
        (Ended(0), b"", "the guest's digest is wrong"),
    ],
)
def test_a_guest_ends_well_and_says_the_digest(
    ended: Ended, said: bytes, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(stdin: BinaryIO, stdout: BinaryIO, _: BinaryIO) -> Ended:
        digest = hashlib.sha256(stdin.read()).hexdigest().encode()
        stdout.write(said.replace(b"%s", digest))
        return ended

    @contextmanager
    def made(size: int, *, engine: str) -> Generator[object]:
        assert (size, engine) == (1 << 20, "kernel")
        yield stub(load=do_nothing, run=run)

    monkeypatch.setattr(examination, "Vmm", made)
    before = sorted(os.listdir("/proc/self/fd"))
    if refused is None:
        examination._run_guest("kernel")
    else:
        with pytest.raises(OSError) as caught:
            examination._run_guest("kernel")
        assert (caught.value.errno, caught.value.strerror) == (errno.EIO, refused)
        del caught
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_is_sized_allocated_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory.memfd_create("restricted") as file:
        given = os.dup(file.fileno())
        service = stub(memfd_restricted=lambda: given, info={"way": "own mount"})
        before = memory.fallocate

        def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
            assert os.fstat(fd).st_size == PAGE_SIZE
            before(fd, mode, offset, length)

        monkeypatch.setattr(memory, "fallocate", fallocate)
        monkeypatch.setattr(client, "default_service", lambda: service)
        assert examination._make_descriptor() == "own mount"
        status = os.fstat(file.fileno())
        assert (status.st_size, status.st_blocks) == (PAGE_SIZE, PAGE_SIZE // 512)
    assert outcome(lambda: os.fstat(given)) == Errno(errno.EBADF)


@pytest.mark.requires("fuse")
def test_a_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "sha256", always(hashlib.sha256(b"other")))
    assert (
        examination.run_guest("software", MADE).detail
        == "no guest ran: the guest's digest is wrong"
    )


# Output.


def test_json_has_stable_keys_and_the_exit_status_agrees(
    examined: Examination, capsys: pytest.CaptureFixture[str]
) -> None:
    status = doctor.main(argparse.Namespace(json=True))
    said = capsys.readouterr().out
    assert said.endswith("}\n")
    data = json.loads(said)
    assert list(data) == ["findings", "conclusion"]
    assert {tuple(one) for one in data["findings"]} == {
        ("group", "name", "state", "detail", "consequence", "remedy")
    }
    assert list(data["conclusion"]) == [
        "usable",
        "descriptor",
        "software_engine",
        "kernel_engine",
        "exec",
    ]
    assert {one["state"] for one in data["findings"]} <= {"yes", "no", "partly", "unknown"}
    assert status == (0 if data["conclusion"]["usable"] else 1)
    assert [one["name"] for one in data["findings"]] == [
        one.name for group in examined.groups.values() for one in group
    ]


def made_up() -> Examination:
    missing = Finding("thing", State.NO, "word " * 40, "what follows", "sudo get it")
    return Examination(
        {Group.MEMORY: (missing, Finding("other", State.UNKNOWN, "not tried"))},
        Conclusion(NOT_MADE, Finding("software engine", State.YES, "v"), missing, MADE),
    )


def test_lines_are_aligned_and_fit() -> None:
    lines = list(doctor.as_lines(made_up(), 60, colour=False))
    assert max(map(len, lines)) <= 60
    assert lines[0] == "Memory"
    assert lines[1].startswith("  no      thing")
    column = lines[1].index("word")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[1:3])
    assert "→ what follows" in "\n".join(lines)
    assert "→ sudo get it" in "\n".join(lines)
    assert any(line.startswith("  ?       other") for line in lines)
    assert (
        " ".join(lines[-2:])
        == "No guest can run in restricted memory here: the descriptor will not work."
    )


def test_colour_is_on_marks_and_heads_alone() -> None:
    plain = "\n".join(doctor.as_lines(made_up(), 80, colour=False))
    coloured = "\n".join(doctor.as_lines(made_up(), 80, colour=True))
    assert "\x1b" not in plain
    assert "\x1b[31mno" in coloured
    assert coloured.count("\x1b[0m") == 8


def test_the_command_line_is_light() -> None:
    code = (
        "import sys, restrictedmem.cli.doctor; "
        "print(sorted(name for name in sys.modules if "
        "name.startswith(('unicorn', 'rich', 'restrictedmem.machine'))))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.requires("fuse")
def test_plain_output_when_it_is_not_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "restrictedmem", "doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert [group.value for group in Group] == [
        line for line in done.stdout.splitlines() if line in {group.value for group in Group}
    ]
