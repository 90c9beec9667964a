"""An attestation report: a service's statement about one of its VMs (docs/use/reports.md).

It is made over 64 bytes of the guest's choice. The layout is fixed and little-endian, so that a
report can be kept, sent and checked elsewhere. Texts are filled up with zero bytes.
"""

import struct
from dataclasses import astuple, dataclass
from errno import EBADMSG, ENOSYS
from typing import Final, Self

from restrictedmem.failure import failed

_MAGIC: Final = b"RMEMREPT"
_VERSION: Final = 1
#: Magic, version, policy, measurement, report data, VM, engine, api, software, public key; the
#: signature over all of it follows.
_BODY: Final = struct.Struct("<8sII48s64s16s16s16s16s32s")
_SIGNATURE_BYTES: Final = 64
#: Bytes of a report, and of the guest's data in it.
REPORT_BYTES: Final = _BODY.size + _SIGNATURE_BYTES
REPORT_DATA_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Report:
    """The signed content: the VM's policy and measurement, the guest's data, the signer."""

    policy: int
    measurement: bytes
    data: bytes
    #: 16 random bytes that the service has given to the VM.
    vm: bytes
    engine: str
    api: str
    #: Version of this package.
    software: str
    #: Public key of the signature (RFC 8032).
    public_key: bytes

    def pack(self) -> bytes:
        """Return the bytes to sign."""
        return _BODY.pack(
            _MAGIC,
            _VERSION,
            *(
                field.encode("ascii") if isinstance(field, str) else field
                for field in astuple(self)
            ),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a signed report, without checking the signature.

        Raises:
            OSError: EBADMSG for anything that is not a report of this version.
        """
        if len(data) != REPORT_BYTES:
            raise failed(
                "report", EBADMSG, f"a report has {REPORT_BYTES} bytes, this has {len(data)}"
            )
        magic, version, policy, measurement, report_data, vm, engine, api, software, public_key = (
            _BODY.unpack_from(data)
        )
        if (magic, version) != (_MAGIC, _VERSION):
            raise failed("report", EBADMSG, f"not of version {_VERSION}")
        try:
            engine, api, software = (
                text.rstrip(b"\0").decode("ascii") for text in (engine, api, software)
            )
        except UnicodeDecodeError:
            raise failed("report", EBADMSG, "a text in it is not ASCII") from None
        return cls(policy, measurement, report_data, vm, engine, api, software, public_key)


def signed_by_its_key(data: bytes) -> bool:
    """Say whether a report's signature is by the public key in it, whosever that key is.

    Raises:
        OSError: EBADMSG as ``Report.unpack``; ENOSYS when the package ``cryptography`` is missing.
    """
    report = Report.unpack(data)
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise failed("report", ENOSYS, "reports need the package cryptography") from None
    try:
        Ed25519PublicKey.from_public_bytes(report.public_key).verify(
            data[_BODY.size :], data[: _BODY.size]
        )
    except (InvalidSignature, ValueError):
        return False
    return True
