"""What a command raises for the person who typed it."""


class CommandError(Exception):
    """A message, with a hint when there is one; exit status 1."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
