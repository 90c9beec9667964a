"""The C client: what it makes of refusals, and its VMM running the guests."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator
from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    ECONNRESET,
    EEXIST,
    EFAULT,
    EINVAL,
    ENAMETOOLONG,
    ENOENT,
    ENOSYS,
    ENOTCONN,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
    EPROTO,
)
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest

from c_programs import PATIENCE, ROOT, SOURCE, compile_c, run
from restrictedmem import guests
from restrictedmem.abi import kvm
from restrictedmem.protocol import guest_abi
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Vmm
from strangers import listening
from users import ORDINARY

pytestmark = pytest.mark.requires("cc")

ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options of the memory and undefined-behaviour sanitizers, if installed."""
    directory = tmp_path_factory.mktemp("sanitizers")
    (directory / "empty.c").write_text("int main(void) { return 0; }\n")
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return (
        options
        if compile_c(directory / "empty.c", directory / "empty", *options).returncode == 0
        else []
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, sanitizers: list[str]) -> Path:
    """Build the client's programs and return where they are."""
    directory = tmp_path_factory.mktemp("clients")
    for name in ("vmm", "check"):
        built = compile_c(SOURCE / f"{name}.c", directory / name, *sanitizers)
        assert built.returncode == 0, built.stderr
    return directory


def answers(program: Path, *arguments: str) -> dict[str, tuple[int, str]]:
    """Run a program that prints attempts; return the errno of each (0 for success) and its text."""
    done = run(program, *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [line.split("|") for line in done.stdout.decode().splitlines()]
    assert len({what for what, _, _ in rows}) == len(rows)
    return {what: (-int(result), words) for what, result, words in rows}


# Its handling of refusals and of nonsense.


def test_peers_that_answer_nonsense(programs: Path) -> None:
    assert answers(programs / "check", "peer") == {
        "a reply": (0, ""),
        "a descriptor nobody asked for": (0, ""),
        "a short reply": (EPROTO, "TOKEN: reply is too short"),
        "a long reply": (EPROTO, "TOKEN: reply is too long"),
        "a reply cut off": (EPROTO, "TOKEN: message of another length"),
        "an error": (EPERM, "TOKEN: some words"),
        "an error of many words": (EPERM, "TOKEN: some words"),
        "an error that is none": (EPROTO, "TOKEN: some words"),
        "a late reply": (EAGAIN, "STATISTICS: recvmsg"),
        "a call after it": (EBADF, "STATISTICS: sendmsg"),
        "less than a message": (EPROTO, "STATISTICS: message of another length"),
        "no room for a string": (EPROTO, "STATISTICS: reply is too long"),
        "a descriptor missing": (EPROTO, "KVM_CREATE_VCPU: reply without its descriptor"),
        "a peer that is gone": (ENOTCONN, "STATISTICS: the other end is gone"),
        "a closed handle": (EBADF, "STATISTICS: sendmsg"),
        "not ready": (EACCES, "start: /dev/fuse"),
        "ready without its mount": (EPROTO, 'start: {"api": "v10"}'),
        "ready without its key": (EPROTO, "start: no key"),
        "ready without its witness": (EPROTO, 'start: {"api": "v9"}'),
        "ready, and gone": (ENOTCONN, "CONNECT: the service is gone"),
        "ready, and a stranger has its name": (ENOTCONN, "CONNECT: the service is gone"),
        "what the stranger got": (0, ""),
        "descriptors left": (0, ""),
    }


#: Refusals of a service and a VM: the errno, and the call that the text names.
REFUSED = {
    "no socket": (ENOENT, "connect"),
    "a long name": (ENAMETOOLONG, "connect"),
    "no python": (ECONNRESET, "start"),
    "token of nothing": (EBADF, "TOKEN"),
    "token of another file": (ENOTTY, "TOKEN"),
    "token of another service": (EACCES, "TOKEN"),
    "its first call": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a token of no descriptor": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a shared half that is no memfd": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a shared half too short": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "unaligned": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a token used twice": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a slot over it": (EEXIST, "KVM_SET_USER_MEMORY_REGION"),
    "no slot to delete": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "an unknown attribute": (EINVAL, "KVM_SET_MEMORY_ATTRIBUTES"),
    "v9's call to make private": (EOPNOTSUPP, "KVM_MEMORY_ENCRYPT_REG_REGION"),
    "v9's call to make shared": (EOPNOTSUPP, "KVM_MEMORY_ENCRYPT_UNREG_REGION"),
    "no such call": (EPROTO, "NONE"),
    "another register": (EINVAL, "KVM_SET_REGS"),
    "content for nowhere": (EFAULT, "LAUNCH_UPDATE"),
    "content too long for the slot": (EFAULT, "LAUNCH_UPDATE"),
    "content of half a page": (EINVAL, "LAUNCH_UPDATE"),
    "late registers": (EPERM, "KVM_SET_REGS"),
    "late content": (EPERM, "LAUNCH_UPDATE"),
    "a late vCPU": (EPERM, "KVM_CREATE_VCPU"),
    "what the guest did not ask for": (EPERM, "KVM_SET_MEMORY_ATTRIBUTES"),
    "no vCPU to stop": (EINVAL, "INTERRUPT"),
    "a range of one byte": (EINVAL, "KVM_PRE_FAULT_MEMORY"),
    "a run without an engine": (ENOTCONN, "KVM_RUN"),
    "a VM without an engine": (ENOTCONN, "STATISTICS"),
}


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_service_and_a_vm(programs: Path, engine: str) -> None:
    found = answers(programs / "check", sys.executable, engine)
    number, _ = found.pop("a signing key")
    assert number == (0 if find_spec("cryptography") else ENOSYS)
    # An engine says what it cannot do.
    can_prefault = found.pop("KVM_CAP_PRE_FAULT_MEMORY")[1] == "1"
    expected = (
        REFUSED if can_prefault else REFUSED | {"a range": (EOPNOTSUPP, "KVM_PRE_FAULT_MEMORY")}
    )
    refused = {
        what: (number, words.partition(": ")) for what, (number, words) in found.items() if number
    }
    assert {what: (number, words[0]) for what, (number, words) in refused.items()} == expected
    assert all(words[2] for _, words in refused.values()), "each says why"
    granted = {what: words for what, (number, words) in found.items() if not number and words}
    assert granted == {
        "its api": "v9",
        "what is left": "0x40010000 0",
        "its exit": "3 0: 1(5, 6)",
        "its reason": str(kvm.ExitReason.INTR.value),
        "KVM_CAP_MEMORY_ATTRIBUTES": str(kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE),
        "KVM_MEMORY_ATTRIBUTE_PRIVATE": str(kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE),
        "what is left of it": "0x40010000 0" if can_prefault else "0x40000000 65536",
    }


# The VMM.


@pytest.fixture
def server() -> Generator[str, None, None]:
    """Run ``serve`` and return its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        command = [
            sys.executable,
            "-m",
            "restrictedmem",
            "serve",
            "--socket",
            path,
            "--user",
            "nobody",
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == f"listening on {path}\n"
            yield path
            process.terminate()


@pytest.fixture(params=["private", pytest.param("served", marks=pytest.mark.requires("root"))])
def way(request: pytest.FixtureRequest) -> list[str]:
    """Return the VMM's options for each of the two ways to get a service."""
    return (
        ["-p", sys.executable]
        if request.param == "private"
        else ["-s", request.getfixturevalue("server")]
    )


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
def test_guests_run(programs: Path, way: list[str], engine: str) -> None:
    vmm, options = programs / "vmm", (*way, "-e", engine)
    data = os.urandom(3 << 20)
    done = run(vmm, *options, "-m", "2", guests.path("sha256"), data=data)
    assert (done.returncode, done.stdout) == (0, f"{sha256(data).hexdigest()}  -\n".encode()), (
        done.stderr
    )
    done = run(vmm, *options, guests.path("spin"), "exit", "nonsense")
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"measurement [0-9a-f]{96}\nusage: .*\n", done.stderr), done.stderr


@pytest.mark.requires("fuse")
def test_it_launches_what_the_vmm_in_python_launches(programs: Path) -> None:
    guest = guests.path("spin")
    with Vmm(guest_abi.PRIVATE_SIZE_DEFAULT, engine="software") as vmm:
        vmm.load(elf.parse(guest.read_bytes()), ["exit", "7"])
        measurement = vmm.vm.launch_finish().hex()
    for argument, same in (("7", True), ("8", False)):
        done = run(
            programs / "vmm", "-p", sys.executable, "-e", "software", guest, "exit", argument
        )
        assert done.returncode == int(argument)
        assert (done.stderr.decode() == f"measurement {measurement}\n") is same


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
def test_convert_finds_what_both_sides_must_see(programs: Path, engine: str) -> None:
    done = run(
        programs / "vmm", "-p", sys.executable, "-e", engine, "-m", "8", guests.path("convert")
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    lines = done.stdout.decode().splitlines()
    assert len(lines) >= 7
    assert all(line.endswith("ok") for line in lines), lines


@pytest.mark.requires("fuse")
def test_what_is_no_guest_is_said(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n" * 100)
    for path, words in (
        (tmp_path / "text", b"not a static x86-64 ELF"),
        (tmp_path / "none", b"No such file or directory"),
    ):
        done = run(programs / "vmm", "-p", sys.executable, path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert words in done.stderr


@pytest.mark.requires("root")
def test_another_users_name_is_not_taken_for_execs(programs: Path) -> None:
    name = f"restrictedmem-test/{os.getpid()}/{os.urandom(4).hex()}"
    with listening(name, ORDINARY) as heard:
        done = run(programs / "vmm", "-s", "@" + name, guests.path("sha256"))
    assert (done.returncode, heard) == (1, [b""])
    assert b"connect: another user's name" in done.stderr


# Another language, from the document alone.


@pytest.mark.requires("fuse", "root", "rust")
def test_a_client_in_rust(tmp_path: Path, server: str) -> None:
    program = tmp_path / "first_exit"
    source = ROOT / "clients" / "rust" / "first_exit.rs"
    built = subprocess.run(
        ["rustc", "--edition", "2021", "-D", "warnings", "-o", program, source],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = run(program, server)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0x42 1 42\n", b"")
