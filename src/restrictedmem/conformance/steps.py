"""The calls that a case makes, one line each, as a person would write them in C."""

import os
import resource
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, TypeVar, final

from restrictedmem.child import fork
from restrictedmem.conformance.outcome import Errno, outcome, spell
from restrictedmem.fd import OwnedFd

_T = TypeVar("_T")
#: Before a line of a child.
_CHILD: Final = "  child: "
_ANSWER: Final = "\0"


@final
class Steps:
    """A record of calls and their answers.

    One process writes it at a time: a child's lines follow those of its parent. ``told`` is called
    with the number and the text of each line that is new or has changed.
    """

    def __init__(self, told: Callable[[int, str], object] = lambda _number, _text: None) -> None:
        self.lines: list[str] = []
        self._told = told
        #: In a child, the pipe to the parent.
        self._pipe = -1
        #: Whether one line stands for the calls that are made now.
        self._sums = False

    def call(self, text: str, act: Callable[[], _T], shows: Callable[[_T], str] = spell) -> _T:
        """Do something; note what it is, and then what it answers, as ``shows`` writes it.

        Raises:
            OSError: that of ``act``.
        """
        if self._sums:
            return act()
        self._begin(text)
        try:
            value = act()
        except OSError as error:
            self._end(f"-1 {Errno(error.errno or 0)}")
            raise
        self._end(shows(value))
        return value

    def note(self, text: str) -> None:
        """Add a line that has no answer."""
        if not self._sums:
            self._begin(text)
            self._end("")

    @contextmanager
    def summed(self, text: str) -> Generator[None]:
        """Note one line in place of the calls of a block, of which there are many."""
        self.note(text)
        before, self._sums = self._sums, True
        try:
            yield
        finally:
            self._sums = before

    def in_child(self, body: Callable[[], object]) -> str:
        """Run a function in a forked child, and return its answer as text.

        The answer is the name of the signal if one killed the child, such as ``SIGBUS``.
        """
        reader, writer = map(OwnedFd, os.pipe())
        with reader, writer:
            pid = fork(lambda: self._speak(body, writer.fileno()), bound=True)
            writer.close()
            with open(reader.detach(), encoding="utf-8") as said:
                lines, _, answer = said.read().partition(_ANSWER)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            answer = signal.Signals(-code).name
            lines += f" = {answer}" if lines and not lines.endswith("\n") else ""
        for line in lines.splitlines():
            self._add(f"{_CHILD}{line}")
        return answer

    def _speak(self, body: Callable[[], object], pipe: int) -> None:
        # A fatal signal may be the right answer; it must not leave a core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._pipe = pipe
        self._write(_ANSWER + spell(outcome(body)))

    def _begin(self, text: str) -> None:
        # A child that is killed in the middle of a call has said which call it was.
        if self._pipe >= 0:
            self._write(text)
        else:
            self._add(text)

    def _end(self, answer: str) -> None:
        text = f" = {answer}" if answer else ""
        if self._pipe >= 0:
            self._write(f"{text}\n")
        else:
            self._add(self.lines.pop() + text)

    def _add(self, line: str) -> None:
        self.lines.append(line)
        self._told(len(self.lines) - 1, line)

    def _write(self, text: str) -> None:
        os.write(self._pipe, text.encode())
