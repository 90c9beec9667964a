"""The results as a stream of TAP 14, the Test Anything Protocol."""

import json
from collections.abc import Iterator
from typing import Final

from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.text import plain

#: The last line of a run that did not end by itself.
ABORTED: Final = "Bail out! the run was ended"
_SKIPPED: Final = (Verdict.NOT_APPLICABLE, Verdict.UNSUPPORTED)


def head(count: int) -> str:
    """Return the lines before the results."""
    return f"TAP version 14\n1..{count}"


def lines(number: int, result: Result) -> Iterator[str]:
    """Yield the lines of a result, which is the stream's ``number``-th."""
    word = "not ok" if result.verdict is Verdict.FAIL else "ok"
    name = _escaped(f"{result.column}: {result.case}")
    if result.verdict in _SKIPPED:
        yield f"{word} {number} - {name} # SKIP {_escaped(f'{result.verdict.value}: {result.why}')}"
        return
    yield f"{word} {number} - {name}"
    if result.verdict is not Verdict.PASS:
        # Each value of JSON is one of YAML, too.
        yield "  ---"
        for field in ("verdict", "expected", "seen", "why", "steps"):
            yield f"  {field}: {json.dumps(result.dump()[field])}"
        yield "  ..."


def _escaped(text: str) -> str:
    return plain(text).replace("\\", "\\\\").replace("#", "\\#")
