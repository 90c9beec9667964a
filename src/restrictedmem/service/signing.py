"""The key that a service signs reports with: Ed25519 (RFC 8032).

The service holds the key. No process that it forks has it.
"""

import importlib
import os
import stat
from contextlib import suppress
from errno import EACCES, EINVAL, ENOSYS
from typing import TYPE_CHECKING, Final, Self, final

from restrictedmem import paths
from restrictedmem.failure import failed, named

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
#: More bytes than any key file has.
_LARGEST_FILE: Final = 64 << 10
PUBLIC_KEY_BYTES: Final = 32
_MISSING: Final = "reports need the package cryptography"


def preload() -> None:
    """Load all parts of the library that a service uses, before it stops loading."""
    with suppress(ImportError):
        # If the library is missing, the first report says so. Without its exceptions the library
        # aborts.
        for module in ("exceptions", "hazmat.primitives.asymmetric.ed25519"):
            importlib.import_module(f"cryptography.{module}")


@final
class Signer:
    """A signing key, from a file or temporary.

    A temporary key is made when it is first needed, and goes with the process.
    """

    def __init__(self, key: "Ed25519PrivateKey | None" = None) -> None:
        self._key = key

    @classmethod
    def load(cls, path: str) -> Self:
        """Load a key from a file that only its owner may read: PKCS #8 in PEM, no passphrase.

        Raises:
            OSError: EACCES when others may read the file, or it is another user's; EINVAL for
                another kind of key or file; ENOSYS when the package ``cryptography`` is missing; as
                open(2).
        """
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        except ImportError:
            raise failed("sign", ENOSYS, _MISSING) from None
        try:
            key = load_pem_private_key(_read_private(path), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise failed("key", EINVAL, "not a key in PEM, or has a passphrase", path) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise failed("key", EINVAL, "not an Ed25519 key", path)
        return cls(key)

    @property
    def public_key(self) -> bytes | None:
        """The public key, 32 bytes; None while there is no key."""
        return None if self._key is None else self._key.public_key().public_bytes_raw()

    def make_key(self) -> bytes:
        """Make a key unless there is one, and return the public key.

        Raises:
            OSError: ENOSYS when the package ``cryptography`` is missing.
        """
        if self._key is None:
            try:
                from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            except ImportError:
                raise failed("sign", ENOSYS, _MISSING) from None
            self._key = Ed25519PrivateKey.generate()
        return self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """Return the signature over ``data``, 64 bytes.

        Preconditions: there is a key.
        """
        assert self._key is not None
        return self._key.sign(data)


def read_public_key(path: str) -> bytes:
    """Return the public key in a file, 32 bytes.

    The file has it in PEM, or as 64 hexadecimal digits.

    Raises:
        OSError: EINVAL for another kind of key or file; ENOSYS when the package ``cryptography`` is
            missing; as open(2).
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_FILE)
    except OSError as error:
        raise named("open", error, path) from None
    with suppress(ValueError):
        key = bytes.fromhex(text.decode("ascii"))
        if len(key) == PUBLIC_KEY_BYTES:
            return key
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise failed("sign", ENOSYS, _MISSING) from None
    try:
        found = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise failed("key", EINVAL, "no public key in PEM", path) from None
    if not isinstance(found, Ed25519PublicKey):
        raise failed("key", EINVAL, "not an Ed25519 key", path)
    return found.public_bytes_raw()


def _read_private(path: str) -> bytes:
    # Read the same file that is checked.
    with open(paths.open_regular(path).detach(), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & _OTHERS or status.st_uid not in (os.geteuid(), 0):
            raise failed(
                "open",
                EACCES,
                f"not private: chmod 600 {path}, and chown it to the user who reads it",
                path,
            )
        return file.read(_LARGEST_FILE)
