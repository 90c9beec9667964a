"""``verify`` and ``measure``: the checks, the checks they say they skipped, and the exit status."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from restrictedmem import guests
from restrictedmem.cli import guest_arguments
from restrictedmem.cli.main import main
from restrictedmem.service.report import Report
from restrictedmem.vmm import elf
from restrictedmem.vmm.boot import expected_measurement

MIB = 1 << 20
KEY = Ed25519PrivateKey.generate()
RAW = KEY.public_key().public_bytes_raw()
NONCE = b"nonce".ljust(64, b"\0")


def measured(*arguments: str, memory: int = 64 * MIB, vcpus: int = 1, policy: int = 2) -> bytes:
    image = elf.parse(guests.path("seal").read_bytes())
    return expected_measurement(image, arguments, private_size=memory, vcpus=vcpus, policy=policy)


def report(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "policy": 2,
        "measurement": measured(),
        "data": NONCE,
        "vm": bytes(16),
        "engine": "software",
        "api": "v10",
        "software": "0.1.0",
        "public_key": RAW,
        **changes,
    }
    body = Report(**fields).pack()
    return body + KEY.sign(body)


Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Return what ``verify`` does with a report: its status, stdout and stderr."""

    def run(data: bytes, *arguments: str) -> tuple[int, str, str]:
        path = tmp_path / "report"
        path.write_bytes(data)
        status = main(["verify", str(path), *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def states(text: str) -> dict[str, str]:
    found = json.loads(text)
    return {check["name"]: check["state"] for check in found["checks"]}


ALL = ("--key", RAW.hex(), "--data", b"nonce".hex(), "--guest", "seal")


def test_a_report_that_is_as_expected(verify: Verify) -> None:
    status, out, _ = verify(report(), *ALL)
    assert status == 0
    assert out.splitlines()[-1] == "verified"
    assert [line.split()[1] for line in out.splitlines()[:-1]] == ["good"] * 5


def test_what_was_not_checked_is_said(verify: Verify) -> None:
    status, out, _ = verify(report())
    assert status == 0
    assert out.splitlines()[-1] == "verified, except for: key, measurement, data"
    assert f"nobody vouched for {RAW.hex()}" in out
    assert "any program may have sent it" in out
    assert "it may be an old report" in out


@pytest.mark.parametrize(
    ("changes", "arguments", "bad"),
    [
        ({"measurement": bytes(48)}, ALL, "measurement"),
        ({"data": bytes(64)}, ALL, "data"),
        ({"policy": 0}, ALL, "policy"),
        ({"policy": 3}, ALL, "policy"),
        ({"policy": 6}, ALL, "policy"),
        ({}, ("--key", bytes(32).hex()), "key"),
        ({}, ("--measurement", bytes(48).hex()), "measurement"),
        ({}, ("--data", "00"), "data"),
        ({}, ("--debug",), "policy"),
        ({}, ("--guest", "sha256"), "measurement"),
        ({}, ("--guest", "seal", "argument"), "measurement"),
        ({}, ("--memory", "32M", "--guest", "seal"), "measurement"),
        ({}, ("--vcpus", "2", "--guest", "seal"), "measurement"),
    ],
)
def test_what_is_not_as_expected(
    verify: Verify, changes: dict[str, Any], arguments: tuple[str, ...], bad: str
) -> None:
    status, out, _ = verify(report(**changes), *arguments)
    assert status == 1
    assert out.splitlines()[-1] == f"not verified: {bad}"
    status, out, _ = verify(report(**changes), "--json", *arguments)
    assert status == 1
    assert json.loads(out)["verified"] is False
    assert [name for name, state in states(out).items() if state == "bad"] == [bad]


def test_a_wrong_signature(verify: Verify) -> None:
    data = report()
    status, out, _ = verify(data[:-1] + bytes([data[-1] ^ 1]), *ALL)
    assert status == 1
    assert out.splitlines()[-1] == "not verified: signature"


def test_a_report_of_another_key_in_its_place(verify: Verify) -> None:
    """Anyone can sign a report with some key, so the key itself is compared."""
    other = Ed25519PrivateKey.generate()
    body = Report.unpack(report())
    forged = Report(
        body.policy,
        body.measurement,
        body.data,
        body.vm,
        body.engine,
        body.api,
        body.software,
        other.public_key().public_bytes_raw(),
    ).pack()
    status, out, _ = verify(forged + other.sign(forged), *ALL)
    assert status == 1
    assert out.splitlines()[-1] == "not verified: key"
    status, out, _ = verify(forged + other.sign(forged))
    assert status == 0
    assert "except for: key" in out.splitlines()[-1]
    status, out, _ = verify(forged + KEY.sign(forged))
    assert out.splitlines()[-1] == "not verified: signature"


def test_as_json(verify: Verify) -> None:
    status, out, _ = verify(report(engine="kernel"), "--json", *ALL[:4])
    assert status == 0
    found = json.loads(out)
    assert found["verified"] is True
    assert states(out) == {
        "signature": "good",
        "key": "good",
        "measurement": "not checked",
        "policy": "good",
        "data": "good",
    }
    assert found["report"] == {
        "policy": 2,
        "measurement": measured().hex(),
        "data": NONCE.hex(),
        "vm": bytes(16).hex(),
        "engine": "kernel",
        "api": "v10",
        "software": "0.1.0",
        "public_key": RAW.hex(),
    }


def test_a_guest_that_may_be_debugged(verify: Verify) -> None:
    debugged = report(policy=3, measurement=measured(policy=3))
    assert verify(debugged, "--debug", "--guest", "seal")[0] == 0
    status, out, _ = verify(debugged, "--guest", "seal")
    assert status == 1
    assert out.splitlines()[-1] == "not verified: measurement, policy"
    assert "the owner can look into the guest" in out


FORMS: dict[str, Callable[[bytes], str]] = {
    "digits": lambda data: data.hex(),
    "lines": lambda data: data.hex("\n", 16).upper() + "\n",
    "bytes": lambda data: f"  {data.hex(' ')}",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_report_in_hexadecimal(verify: Verify, form: Callable[[bytes], str]) -> None:
    assert verify(form(report()).encode(), *ALL)[0] == 0


def test_a_report_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (report(), report().hex().encode() + b"\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["verify", "-", *ALL]) == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a report has 288 bytes, this has 0"),
        (b"abcd", "a report has 288 bytes, this has 2"),
        (b"abc", "odd number"),
        (bytes(288), "not of version 1"),
        (b"error: this engine signs no reports\n", "a report has 288 bytes"),
    ],
)
def test_what_is_no_report(verify: Verify, data: bytes, words: str) -> None:
    status, out, err = verify(data)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize("arguments", [("verify",), ("measure",)])
def test_what_never_ends_is_not_read_to_its_end(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in "/dev/zero", "/dev/urandom":
        assert main([*arguments, path]) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_a_guest_of_a_terabyte_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_arguments, "_LARGEST", MIB)
    path = tmp_path / "guest"
    path.write_bytes(b"\x7fELF")
    os.truncate(path, 1 << 40)
    assert main(["measure", str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: read: File too large\n"


def test_keys_in_files(verify: Verify, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert verify(report(), "--key", str(path))[0] == 0
    path.write_text("nothing")
    status, _, err = verify(report(), "--key", str(path))
    assert status == 1
    assert err == f"error: {path}: key: Invalid argument (no public key in PEM)\n"
    assert verify(report(), "--key", str(tmp_path / "missing"))[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--measurement", "00"),
        ("--measurement", "x" * 96),
        ("--data", "0"),
        ("--data", "00" * 65),
        ("--memory", "1"),
        ("--measurement", "00" * 48, "--guest", "seal"),
        ("--guest",),
    ],
)
def test_wrong_command_lines(verify: Verify, arguments: tuple[str, ...]) -> None:
    status, out, err = verify(report(), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")


def test_a_guest_that_cannot_be_had(verify: Verify) -> None:
    for arguments in (
        ("--guest", "nobody"),
        ("--guest", "./nowhere.elf"),
        ("--memory", "1M", "--guest", "seal", "x" * 70000),
    ):
        status, out, err = verify(report(), *arguments)
        assert (status, out) == (1, ""), arguments
        assert err.startswith("error: ")


def test_measure(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["seal"], measured()),
        (["seal", "an", "--argument"], measured("an", "--argument")),
        (
            ["--memory", "2M", "--vcpus", "3", "--debug", "seal"],
            measured(memory=2 * MIB, vcpus=3, policy=3),
        ),
        ([str(guests.path("seal"))], measured()),
    ):
        assert main(["measure", *arguments]) == 0
        assert capsys.readouterr().out == expected.hex() + "\n"


@pytest.mark.requires("fuse")
def test_from_a_guest_to_a_verdict() -> None:
    """The whole way passes through three processes."""
    nonce = os.urandom(16).hex()
    command = [sys.executable, "-m", "restrictedmem"]
    ran = subprocess.run(
        [*command, "run", "--quiet", "seal"],
        input=f"report {nonce}\n".encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    for data, status in ((nonce.encode().hex(), 0), ("00", 1)):
        asked = [*command, "verify", "-", "--data", data, "--guest", "seal"]
        done = subprocess.run(asked, input=ran.stdout, capture_output=True, timeout=60, check=False)
        assert done.returncode == status, done.stdout
