"""The small VMM and the guests of the package, on each engine and for both postings.

The tests try what a guest says, and what its owner could see.
"""

import os
import re
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from package_guests import Done, engine, load, run, service, talk
from restrictedmem.abi import memory
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.client import Service
from restrictedmem.vmm import boot, elf
from restrictedmem.vmm.vmm import Ended, Vmm
from waiting import wait_until

__all__ = ["engine", "service"]

pytestmark = pytest.mark.requires("fuse")

MIB: Final = 1 << 20
PAGE: Final = 4096
E2BIG, ENOEXEC, EFAULT, EINVAL = 7, 8, 14, 22


# seal.


def test_seal_signs_and_verifies(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        guest = talk(load(vmm, "seal"))
        tags = {
            data: guest.ask(f"sign {data}")
            for data in ("", "a", "b", "x" * 63, "x" * 64, "x" * 5000)
        }
        assert all(re.fullmatch("[0-9a-f]{64}", tag) for tag in tags.values())
        assert len(set(tags.values())) == len(tags)
        for data, tag in tags.items():
            assert guest.ask(f"sign {data}") == tag
            assert guest.ask(f"verify {tag} {data}") == "ok"
            assert guest.ask(f"verify {tag} {data}!") == "bad"
            assert guest.ask(f"verify {tag[:-1]}{'1' if tag[-1] == '0' else '0'} {data}") == "bad"
        assert guest.ask(f"verify {tags['']}") == "ok"
        assert guest.end() == Ended(0)


def test_seal_has_a_new_key_each_time(service: Service, engine: str) -> None:
    tags: set[bytes] = set()
    for _ in range(3):
        with Vmm(MIB, service, engine=engine) as vmm:
            tags.add(run(load(vmm, "seal"), b"sign abc\n").out)
    assert len(tags) == 3


def test_what_seal_takes_for_a_line(service: Service, engine: str) -> None:
    # Long lines, NUL bytes, a last line without an end; and all of it, not what comes first, is
    # what gets signed.
    long = b"y" * (65536 - len("sign "))
    requests = [
        b"sign " + long,
        b"sign " + long[:-1] + b"z",
        b"sign y" + long,
        b"",
        b"sign a\0b",
        b"sign a\0c",
        b"signal",
        b"sign " + long,
    ]
    with Vmm(MIB, service, engine=engine) as vmm:
        done = run(load(vmm, "seal"), b"\n".join(requests))
    answers = done.out.decode().splitlines()
    tag = re.compile("[0-9a-f]{64}")
    assert [bool(tag.fullmatch(answer)) for answer in answers] == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
    ]
    assert answers[2] == "error: a line has at most 65536 bytes"
    assert answers[0] == answers[7]
    assert len({answers[0], answers[1], answers[4], answers[5]}) == 4
    assert done.ended == Ended(0)


def test_requests_that_come_in_pieces(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        guest = talk(load(vmm, "seal"))
        whole = guest.ask("sign hello")
        for piece in (b"si", b"gn", b" he", b"llo\nsign hello", b"\n"):
            guest.say.write(piece)
        assert [guest.hear.readline().decode().rstrip() for _ in range(2)] == [whole, whole]
        assert guest.end() == Ended(0)


def test_seal_hands_out_the_engines_report(service: Service, engine: str) -> None:
    pytest.importorskip("cryptography", reason="nothing to sign with")
    with Vmm(MIB, service, engine=engine) as vmm:
        load(vmm, "seal")
        measurement = vmm.launch_finish()
        done = run(vmm, b"report hello\nreport " + b"x" * 65 + b"\nreport \n")
    hello, too_long, empty = done.out.decode().splitlines()
    assert measurement in bytes.fromhex(hello)
    assert b"hello".ljust(64, b"\0") in bytes.fromhex(hello)
    assert len(hello) == len(empty)
    assert too_long == "error: a report is over at most 64 bytes"
    assert done.ended == Ended(0)


# convert.


def test_convert_on_both_sides(service: Service, engine: str) -> None:
    with Vmm(7 * MIB, service, engine=engine) as vmm:
        done = run(load(vmm, "convert"))
        found = vmm.statistics()
    assert done.ended == Ended(0), done.out.decode()
    counts = dict(line.rsplit(": ", 1) for line in done.out.decode().splitlines())
    assert counts["4 KiB, one by one"] == counts["4 KiB, odd and even"] == "512 ok"
    assert counts["2 MiB, one by one"] == counts["2 MiB, odd and even"] == "2 ok"
    assert len(counts) == 8
    assert all(count.endswith(" ok") for count in counts.values())
    # Each range was punched, and what had been there was freed.
    assert found["invalidations"] > 512
    assert found["pages_freed"] > 7 * MIB // PAGE


def _ignore(*_arguments: object, **_words: object) -> int:
    return 0


@pytest.mark.parametrize(
    ("lie", "finding"),
    [
        ("_check", "a shared page is not the owner's"),
        ("_map_gpa_range", "a range that is none was taken"),
        # The engine does not let it be told that they are.
        ("convert", "cannot be shared"),
    ],
)
def test_convert_finds_an_owner_that_does_nothing(
    service: Service, engine: str, monkeypatch: pytest.MonkeyPatch, lie: str, finding: str
) -> None:
    with Vmm(2 * MIB, service, engine=engine) as vmm:
        load(vmm, "convert")
        monkeypatch.setattr(vmm.vm if lie == "convert" else vmm, lie, _ignore)
        done = run(vmm)
    assert done.ended == Ended(1)
    assert finding in done.out.decode().splitlines()[-1]


@pytest.mark.parametrize(
    ("kept", "finding"),
    [("restricted_fd", "private content came back"), ("_half_fd", "shared content was kept")],
)
def test_convert_finds_what_was_not_punched(
    service: Service, engine: str, monkeypatch: pytest.MonkeyPatch, kept: str, finding: str
) -> None:
    punch = memory.fallocate
    with Vmm(2 * MIB, service, engine=engine) as vmm:
        load(vmm, "convert")

        def punch_the_other(fd: int, mode: int, offset: int, length: int) -> None:
            if fd != getattr(vmm, kept):
                punch(fd, mode, offset, length)

        monkeypatch.setattr(memory, "fallocate", punch_the_other)
        done = run(vmm)
    assert done.ended == Ended(1)
    assert finding in done.out.decode().splitlines()[-1]


def test_convert_finds_private_content_in_the_shared_half(
    service: Service, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Vmm(2 * MIB, service, engine=engine) as vmm:
        load(vmm, "convert")
        honest = vmm._check

        def find_the_secret(gpa: int, length: int, old: int, new: int) -> int:
            vmm._half[gpa - guest_abi.PRIVATE_BASE + length - 1] = 0x11
            return honest(gpa, length, old, new)

        monkeypatch.setattr(vmm, "_check", find_the_secret)
        done = run(vmm)
    assert done.ended == Ended(1)
    assert "the owner sees a private page" in done.out.decode().splitlines()[-1]


def test_convert_steps_converts_all_of_the_heap_twice(service: Service, engine: str) -> None:
    with Vmm(9 * MIB, service, engine=engine) as vmm:
        done = run(load(vmm, "spin", "convert-steps", "1"))
        found = vmm.statistics()
    assert (done.ended, done.out) == (Ended(0), b"touched\nshared\nprivate\n")
    # Three whole steps lie in the heap: six conversions, three lines, and the end.
    assert found["exits"] == {"Hypercall": 10}
    assert found["invalidations"] == 3


# probe.


@pytest.mark.parametrize(
    ("mode", "ended"),
    [
        ("punched", Ended(0)),
        ("divide", Ended(1, exits.Shutdown(0))),
    ],
)
def test_an_offence_and_what_comes_of_it(
    service: Service, engine: str, mode: str, ended: Ended
) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        assert run(load(vmm, "probe", mode)) == Done(ended, b"", b"")


def test_an_address_without_memory(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        ended = run(load(vmm, "probe", "unbacked")).ended
    # A guest at CPL 3 cannot have its accesses to private memory emulated by KVM, and so no MMIO
    # (docs/reference/engines.md).
    fatal = (
        exits.MmioRead(0x3000_0000, 8)
        if engine == "software"
        else exits.MemoryFault(0, 0x3000_0000, PAGE, EFAULT)
    )
    assert ended == Ended(1, fatal)


def test_a_page_whose_attribute_names_no_half(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        ended = run(load(vmm, "probe", "attribute")).ended
    # The guest is told that it cannot be, and stores nothing there.
    assert ended == Ended(1)


def test_an_endless_loop_ends_when_it_is_stopped(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine) as vmm:
        guest = talk(load(vmm, "probe", "loop"))
        wait_until(lambda: bool(vmm._driven), "the guest to run")
        vmm.stop()
        ended = guest.end()
    assert ended == Ended(1, exits.Interrupted())
    assert ended.interrupted


# hold.


def test_hold_keeps_what_it_was_told_to(service: Service, engine: str) -> None:
    with Vmm(2 * MIB, service, engine=engine) as vmm:
        guest = talk(load(vmm, "spin", "hold", "0123456789abcdef"))
        word, start, end = guest.hear.readline().decode().split()
        assert word == "ready"
        size = int(end, 16) - int(start, 16)
        assert size > MIB
        first = int(start, 16)
        assert guest.ask(f"check {start} {size:#x}") == "intact"
        assert guest.ask(f"share {first + PAGE:x} {2 * PAGE:x}") == "shared"
        assert guest.ask(f"check {first:x} {size:x}") == f"broken {first + PAGE:#x}"
        # The owner sees zeroes there, and the guest what the owner writes.
        offset = first + PAGE - guest_abi.PRIVATE_BASE
        assert vmm._half[offset : offset + 2 * PAGE] == bytes(2 * PAGE)
        assert (
            guest.ask(f"check {first:x} 1000")
            == guest.ask(f"check {first + 3 * PAGE:x} {size - 3 * PAGE:x}")
            == "intact"
        )
        assert guest.ask(f"hide {first + PAGE:x} {2 * PAGE:x}") == "hidden"
        assert guest.ask(f"share {first + 1:x} {PAGE:x}").startswith("error")
        assert guest.ask(f"check {first:x} {size + 8:x}").startswith("error")
        assert guest.ask("check x 1").startswith("error")
        assert guest.ask("nonsense").startswith("error")
        guest.say.write(b"exit\n")
        assert guest.wait() == Ended(0)
        guest.say.close()


# Launch.


def test_errnos_before_the_launch(service: Service, engine: str) -> None:
    def errno_of(call: Callable[[], object]) -> int | None:
        with pytest.raises(OSError) as caught:
            call()
        return caught.value.errno

    assert errno_of(lambda: Vmm(MIB - PAGE, service, engine=engine)) == EINVAL
    assert errno_of(lambda: Vmm(MIB + 1, service, engine=engine)) == EINVAL
    with Vmm(MIB, service, engine=engine) as vmm:
        assert errno_of(lambda: load(vmm, "spin", "x" * guest_abi.BOOT_SIZE)) == E2BIG
        beyond = elf.Segment(guest_abi.PRIVATE_BASE + MIB - guest_abi.STACK_SIZE, b"", 1)
        assert errno_of(lambda: vmm.load(elf.Image(0, (beyond,)))) == ENOEXEC
        before = elf.Segment(guest_abi.IMAGE_BASE - 1, b"x", 1)
        assert errno_of(lambda: vmm.load(elf.Image(0, (before,)))) == ENOEXEC


def test_nothing_is_left_of_a_vm_that_could_not_be_made(service: Service) -> None:
    left: list[int] = []
    for _ in range(2):
        with pytest.raises(OSError, match="nonesuch") as caught:
            Vmm(MIB, service, engine="nonesuch")
        assert caught.value.errno == EINVAL
        left.append(len(os.listdir("/proc/self/fd")))
    # The first one connected this process to the service.
    assert left[0] == left[1]


def test_a_guest_and_its_arguments_are_measured(service: Service, engine: str) -> None:
    def measurement(*arguments: str, vcpus: int = 1) -> bytes:
        with Vmm(MIB, service, engine=engine, vcpus=vcpus) as vmm:
            return load(vmm, *arguments).launch_finish()

    same = measurement("spin", "exit", "1")
    assert len(same) == 48
    assert measurement("spin", "exit", "1") == same
    others = {
        measurement("spin", "exit", "2"),
        measurement("probe", "exit", "1"),
        measurement("spin", "exit", "1", vcpus=2),
    }
    assert len(others - {same}) == 3


PIECE: Final = st.tuples(
    st.integers(0, 6 * PAGE), st.binary(max_size=2 * PAGE) | st.binary(max_size=8)
)


@given(st.lists(PIECE, max_size=5))
def test_pieces_of_content_become_whole_pages(pieces: list[tuple[int, bytes]]) -> None:
    found = list(boot._whole_pages(pieces))
    expected: dict[int, int] = {}
    for start, data in sorted(pieces):
        expected.update(zip(range(start, start + len(data)), data, strict=True))
    pages = sorted({address // PAGE for address in expected})
    assert [
        page
        for start, content in found
        for page in range(start // PAGE, (start + len(content)) // PAGE)
    ] == pages
    assert all(start % PAGE == len(content) % PAGE == 0 for start, content in found)
    for start, content in found:
        assert content == bytes(
            expected.get(address, 0) for address in range(start, start + len(content))
        )
