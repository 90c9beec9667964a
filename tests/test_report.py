"""A guest's report: its layout, its signer and key, and that the owner has no part in it."""

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

import restrictedmem
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service import signing
from restrictedmem.service.client import Service
from restrictedmem.service.consumer_process import ConsumerProcess
from restrictedmem.service.options import Options
from restrictedmem.service.report import REPORT_BYTES, Report, signed_by_its_key
from restrictedmem.service.signing import Signer
from restrictedmem.vmm.vm import Vcpu, Vm

EPERM, EACCES, EINVAL, ENOSYS, EBADMSG, ENOENT = 1, 13, 22, 38, 74, 2
GPA = 0x4000_0000
STACK = GPA + 0x8000
MIB = 1 << 20
PAGE = 4096

# lea message(%rip), %rsi; mov $0x101000, %edi; mov $8, %ecx; rep movsq; mov $3, %eax; mov
# $0x100000, %ecx; call *%rcx mov %rax, %rbx; mov %rax, %rdi; mov $0, %eax; mov $0x100000, %ecx;
# call *%rcx: tells the length mov $0x101000, %esi; again: lodsb; out %al, $0x42; dec %rbx; jg
# again; hlt
ASK = (
    "488d3545000000 bf00101000 b908000000 f348a5 b803000000 b900001000 ffd1"
    "4889c3 4889c7 b800000000 b900001000 ffd1"
    "be00101000 ac e642 48ffcb 7ff8 f4"
)


def errno_of(call: Callable[..., object], *args: object, **kwargs: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno is not None
    return caught.value.errno


def a_report(key: Ed25519PrivateKey, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "policy": 2,
        "measurement": bytes(range(48)),
        "data": b"\xd5" * 64,
        "vm": b"\x16" * 16,
        "engine": "software",
        "api": "v10",
        "software": "0.1.0",
        "public_key": key.public_key().public_bytes_raw(),
        **changes,
    }
    body = Report(**fields).pack()  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    return body + key.sign(body)


# The layout.


def test_the_layout_is_as_documented() -> None:
    key = Ed25519PrivateKey.generate()
    data = a_report(key)
    assert len(data) == REPORT_BYTES == 288
    assert data[:8] == b"RMEMREPT"
    assert struct.unpack_from("<II", data, 8) == (1, 2)
    assert data[16:64] == bytes(range(48))
    assert data[64:128] == b"\xd5" * 64
    assert data[128:144] == b"\x16" * 16
    assert data[144:160] == b"software".ljust(16, b"\0")
    assert data[160:176] == b"v10".ljust(16, b"\0")
    assert data[176:192] == b"0.1.0".ljust(16, b"\0")
    Ed25519PublicKey.from_public_bytes(data[192:224]).verify(data[224:], data[:224])


_TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=16)


@given(
    st.builds(
        Report,
        st.integers(0, (1 << 32) - 1),
        *[st.binary(min_size=size, max_size=size) for size in (48, 64, 16)],
        *[_TEXTS] * 3,
        st.binary(min_size=32, max_size=32),
    )
)
def test_what_is_packed_is_unpacked(report: Report) -> None:
    assert Report.unpack(report.pack() + bytes(64)) == report


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "another magic": lambda data: b"x" + data[1:],
    "another version": lambda data: data[:8] + b"\2" + data[9:],
    "no text": lambda data: data[:144] + b"\xff" + data[145:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_report(damage: Callable[[bytes], bytes]) -> None:
    data = damage(a_report(Ed25519PrivateKey.generate()))
    assert errno_of(Report.unpack, data) == EBADMSG
    assert errno_of(signed_by_its_key, data) == EBADMSG


def test_a_signature_is_over_every_bit() -> None:
    data = a_report(Ed25519PrivateKey.generate())
    assert signed_by_its_key(data)
    for at in (*range(12, 144), *range(192, REPORT_BYTES)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        assert not signed_by_its_key(bytes(changed)), at
    for at in (144, 160, 176):
        changed = bytearray(data)
        changed[at] ^= 1
        assert not signed_by_its_key(bytes(changed)), at


# The key.


def write_key(path: Path, key: bytes, mode: int = 0o600) -> str:
    path.write_bytes(key)
    path.chmod(mode)
    return str(path)


def pem(key: Ed25519PrivateKey | X25519PrivateKey, passphrase: bytes | None = None) -> bytes:
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def test_a_key_is_made_when_it_is_needed() -> None:
    assert Signer().public_key is None
    signer = Signer()
    made = signer.make_key()
    assert signer.make_key() == made == signer.public_key
    Ed25519PublicKey.from_public_bytes(made).verify(signer.sign(b"words"), b"words")
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(made).verify(signer.sign(b"words"), b"others")
    assert Signer().make_key() != made


def test_a_key_from_a_file(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    signer = Signer.load(write_key(tmp_path / "key", pem(key)))
    assert signer.public_key == signer.make_key() == key.public_key().public_bytes_raw()
    assert signer.sign(b"words") == key.sign(b"words")


def test_which_key_files_are_refused(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    for mode in (0o640, 0o604, 0o620, 0o610):
        assert errno_of(Signer.load, write_key(tmp_path / "key", pem(key), mode)) == EACCES, oct(
            mode
        )
    assert (
        errno_of(Signer.load, write_key(tmp_path / "other", pem(X25519PrivateKey.generate())))
        == EINVAL
    )
    assert errno_of(Signer.load, write_key(tmp_path / "locked", pem(key, b"passphrase"))) == EINVAL
    assert errno_of(Signer.load, write_key(tmp_path / "text", b"no key")) == EINVAL
    assert errno_of(Signer.load, str(tmp_path)) in (EINVAL, 21)
    assert errno_of(Signer.load, str(tmp_path / "missing")) == ENOENT
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert errno_of(Signer.load, str(tmp_path / "fifo")) == EINVAL


@pytest.mark.requires("root")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write_key(tmp_path / "key", pem(Ed25519PrivateKey.generate()))
    os.chown(path, 65534, -1)
    assert errno_of(Signer.load, path) == EACCES


def test_public_keys_from_files(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes_raw()
    for content in (
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        raw.hex().encode() + b"\n",
    ):
        assert signing.read_public_key(write_key(tmp_path / "key", content)) == raw
    other = (
        X25519PrivateKey.generate()
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    for content in (other, b"abcd", b"no key", pem(key)):
        assert errno_of(signing.read_public_key, write_key(tmp_path / "key", content)) == EINVAL


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = a_report(key := Ed25519PrivateKey.generate())
    path = write_key(tmp_path / "key", pem(key))
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    signing.preload()
    assert errno_of(Signer().make_key) == ENOSYS
    assert errno_of(Signer.load, path) == ENOSYS
    assert errno_of(signing.read_public_key, path) == ENOSYS
    assert errno_of(signed_by_its_key, data) == ENOSYS


# A service's statements on an engine.


@pytest.fixture
def consumer() -> Iterator[ConsumerProcess]:
    found = ConsumerProcess("kvm", 1, 1.0, lambda _consumer, _reason: None)
    yield found
    found.close()
    for sock in found.give_sockets():
        sock.close()


def test_a_guest_is_launched_once(consumer: ConsumerProcess) -> None:
    assert errno_of(consumer.report_over, bytes(64), "v10", bytes(32)) == EPERM
    consumer.launched(2, b"software".ljust(16, b"\0"), b"m" * 48)
    assert errno_of(consumer.launched, 0, b"kernel", b"n" * 48) == EPERM
    report = consumer.report_over(b"d" * 64, "v10", b"k" * 32)
    assert report == Report(
        2, b"m" * 48, b"d" * 64, report.vm, "software", "v10", restrictedmem.__version__, b"k" * 32
    )
    assert len(report.vm) == 16
    for size in (0, 63, 65):
        assert errno_of(consumer.report_over, bytes(size), "v10", bytes(32)) == EINVAL


# In an engine.


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def engine(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def content(asked: str, data: bytes) -> bytes:
    found = bytearray(PAGE)
    found[: len(bytes.fromhex(asked))] = bytes.fromhex(asked)
    # Where the first instruction says: 7 bytes, and 0x45 after it.
    found[7 + 0x45 : 7 + 0x45 + len(data)] = data
    return bytes(found)


@contextmanager
def guest(
    service: Service, engine: str, page: bytes, *, debug: bool = False
) -> Generator[tuple[Vm, Vcpu], None, None]:
    fd = service.memfd_restricted()
    os.ftruncate(fd, MIB)
    try:
        with Vm(service, engine=engine, debug=debug, explicit=True) as vm:
            vm.set_user_memory_region(
                slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd
            )
            vm.set_memory_attributes(GPA, MIB, private=True)
            vm.launch_update(GPA, page)
            with vm.create_vcpu() as vcpu:
                vcpu.set_regs(rip=GPA, rsp=STACK)
                yield vm, vcpu
    finally:
        os.close(fd)


def length_of(exit_: exits.Exit) -> int:
    assert isinstance(exit_, exits.Hypercall), exit_
    assert exit_.number == guest_abi.EXIT
    length = exit_.arguments[0]
    return length - (1 << 64 if length >> 63 else 0)


def told(vcpu: Vcpu, length: int) -> bytes:
    """Collect what the guest tells through a port, byte by byte."""
    found = bytearray()
    for _ in range(length):
        exit_ = vcpu.run()
        assert isinstance(exit_, exits.PortOut)
        found.append(exit_.data)
    return bytes(found)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("debug", [False, True])
def test_a_guest_gets_a_report(service: Service, debug: bool) -> None:
    data = os.urandom(64)
    with guest(service, "software", content(ASK, data), debug=debug) as (vm, vcpu):
        measurement = vm.launch_finish()
        # The first that the owner hears of is what comes after it.
        assert length_of(vcpu.run()) == REPORT_BYTES
        assert vm.statistics()["exits"] == {"Hypercall": 1}
        found = told(vcpu, REPORT_BYTES)
    assert signed_by_its_key(found)
    report = Report.unpack(found)
    key = service.signing_key()
    assert report == Report(
        2 | debug, measurement, data, report.vm, "software", "v10", restrictedmem.__version__, key
    )
    assert service.status()["signing_key"] == key.hex()


@pytest.mark.requires("fuse")
def test_both_engines_answer_it_themselves(service: Service, engine: str) -> None:
    with guest(service, engine, content(ASK, b"")) as (_, vcpu):
        assert length_of(vcpu.run()) == REPORT_BYTES


@pytest.mark.requires("fuse")
def test_each_vm_has_another_number(service: Service) -> None:
    found: list[Report] = []
    for _ in range(2):
        with guest(service, "software", content(ASK, b"same")) as (_, vcpu):
            length_of(vcpu.run())
            found.append(Report.unpack(told(vcpu, REPORT_BYTES)))
    assert found[0].vm != found[1].vm
    assert found[0].measurement == found[1].measurement


@pytest.mark.requires("fuse")
def test_the_report_page_is_not_code(service: Service, engine: str) -> None:
    # mov $0x101000, %ecx; movb $0xf4, (%rcx); jmp *%rcx
    with guest(service, engine, content("b900101000 c601f4 ffe1", b"")) as (_, vcpu):
        exit_ = vcpu.run()
    assert isinstance(exit_, exits.MemoryFault | exits.Shutdown)
    assert exit_ not in (exits.Shutdown(13), exits.Shutdown(6)), "hlt was executed"


@pytest.mark.requires("fuse")
def test_the_page_is_neither_the_owners_to_cover_nor_to_fill(service: Service, engine: str) -> None:
    with Vm(service, engine=engine) as vm:
        fd = service.memfd_restricted()
        os.ftruncate(fd, MIB)
        try:
            assert (
                errno_of(
                    vm.set_user_memory_region,
                    slot=0,
                    guest_phys_addr=0x10_1000,
                    memory_size=PAGE,
                    restricted_fd=fd,
                )
                == 17
            )
        finally:
            os.close(fd)
        assert errno_of(vm.launch_update, 0x10_1000, bytes(PAGE)) == 14


# The service's key, seen from outside.


@pytest.mark.requires("fuse")
def test_a_service_has_no_key_until_one_is_needed() -> None:
    with Service.start() as service:
        assert service.info["signing_key"] is None
        assert service.status()["signing_key"] is None
        key = service.signing_key()
        assert service.status()["signing_key"] == key.hex()
        assert service.signing_key() == key


@pytest.mark.requires("fuse")
def test_a_service_with_a_lasting_key(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    path = write_key(tmp_path / "key", pem(key))
    with Service.start(Options(signing_key=path)) as service:
        assert service.info["signing_key"] == key.public_key().public_bytes_raw().hex()
        with guest(service, "software", content(ASK, b"")) as (_, vcpu):
            length_of(vcpu.run())
            report = told(vcpu, REPORT_BYTES)
    key.public_key().verify(report[224:], report[:224])
    os.chmod(path, 0o644)
    assert errno_of(Service.start, Options(signing_key=path)) == EACCES


@contextmanager
def serving(directory: Path, *options: str) -> Generator[tuple[str, list[str]], None, None]:
    """Run ``serve``; yields its socket and what it says until it listens."""
    path = str(directory / "socket")
    command = [sys.executable, "-m", "restrictedmem", "serve", "--socket", path, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        while not said or not said[-1].startswith("listening"):
            said.append(process.stderr.readline())
            assert said[-1], said
        try:
            yield path, said
        finally:
            process.terminate()
            process.stderr.read()


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize("lasting", [False, True])
def test_services_of_another_user_sign_too(tmp_path: Path, lasting: bool) -> None:
    tmp_path.chmod(0o700)
    key = Ed25519PrivateKey.generate()
    options = ["--signing-key", write_key(tmp_path / "key", pem(key))] if lasting else []
    found: set[bytes] = set()
    with serving(tmp_path, "--user", "nobody", *options) as (path, said):
        for _ in range(2):
            with (
                Service.connect(path) as service,
                guest(service, "software", content(ASK, b"")) as (_, vcpu),
            ):
                assert length_of(vcpu.run()) == REPORT_BYTES
                report = told(vcpu, REPORT_BYTES)
                assert signed_by_its_key(report)
                found.add(Report.unpack(report).public_key)
    raw = key.public_key().public_bytes_raw()
    if lasting:
        assert found == {raw}
        assert re.fullmatch(rf"reports are signed by {raw.hex()}\n", said[0])
    else:
        assert len(found) == 2


@pytest.mark.requires("fuse")
def test_serve_refuses_a_key_that_others_may_read(tmp_path: Path) -> None:
    path = write_key(tmp_path / "key", pem(Ed25519PrivateKey.generate()), 0o644)
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "serve",
        "--socket",
        str(tmp_path / "socket"),
        "--signing-key",
        path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"error: --signing-key: {path}: open: Permission denied (not private: " in done.stderr
    assert not (tmp_path / "socket").exists()


@pytest.mark.requires("fuse", "root")
def test_the_key_is_in_the_service_alone(tmp_path: Path) -> None:
    """The engine, from which a guest may break out, never had the key.

    It does not even load the library.
    """
    path = write_key(tmp_path / "key", pem(Ed25519PrivateKey.generate()))
    with (
        Service.start(Options(signing_key=path)) as service,
        guest(service, "software", content(ASK, b"")) as (vm, vcpu),
    ):
        length_of(vcpu.run())
        pid = service.info["pid"]
        others = {vm.statistics()["pid"], parent(pid)}
        assert all("_rust" not in name for other in others for name in mapped(other)), "the library"
        assert any("_rust" in name for name in mapped(pid))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def mapped(pid: int) -> set[str]:
    return {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
