"""Tokens: secrets for one use, by which the holder of a descriptor shows it to the service.

No descriptor of the service's own mount ever travels to the service, because it could not be killed
if it held one. Instead its holder asks for a token, presents it on the descriptor by ioctl, and
names it to a consumer.
"""

import secrets
from errno import EACCES
from typing import Final, final

from restrictedmem import sync
from restrictedmem.fs.owner_abi import TOKEN_BYTES
from restrictedmem.mm.restrictedmem import RestrictedFile

#: Most unused tokens of one connection; a further one takes the oldest one's place.
MAX_TOKENS: Final = 64


@final
class Tokens:
    """All unused tokens that were given out, with the file on which each was presented."""

    def __init__(self) -> None:
        self._mutex = sync.mutex()
        # Protected by the mutex. Files are not held, because dropping the last reference would free
        # gigabytes.
        self._files: dict[bytes, tuple[int, RestrictedFile] | None] = {}

    def issue(self, issued: list[bytes]) -> bytes:
        """Make a token for a connection, and append it to its tokens, oldest first."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._mutex:
            issued[:] = [old for old in issued if old in self._files]
            self._files[token] = None
        while len(issued) >= MAX_TOKENS:
            self.drop(issued.pop(0))
        issued.append(token)
        return token

    def prove(self, token: bytes, ino: int, file: RestrictedFile) -> None:
        """Note that the presenter of a token holds a file's descriptor; FUSE calls this.

        Raises:
            OSError: EACCES for an unknown token, or one that was presented before.
        """
        with self._mutex:
            if self._files.get(token, file) is not None:
                raise OSError(EACCES, "prove: not a token of this service, or presented before")
            self._files[token] = ino, file

    def take(self, token: bytes) -> tuple[int, RestrictedFile]:
        """Use up a token; return inode number and file, with a reference for the caller.

        Raises:
            OSError: EACCES for a token that was never presented, or whose file is gone.
        """
        with self._mutex:
            proved = self._files.get(token)
            if proved is None:
                raise OSError(EACCES, "the token was never presented on a descriptor")
            del self._files[token]
        if not proved[1].get_unless_zero():
            raise OSError(EACCES, "the descriptor on which the token was presented was closed")
        return proved

    def drop(self, token: bytes) -> None:
        """Forget a token that nobody will use."""
        with self._mutex:
            self._files.pop(token, None)
