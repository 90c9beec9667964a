"""A headless Chromium that shows a page to a test."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

#: Evaluates an expression beside a frame, where ``page`` is the frame's window.
_FRAME: Final = """<pre></pre>
<iframe src="{page}" style="width: {width}px; height: 800px; border: 0" {sandbox}
  onload='const page = this.contentWindow;
    this.previousElementSibling.textContent = JSON.stringify({expression})'></iframe>
"""
#: A frame in which no script runs.
_NO_SCRIPTS: Final = 'sandbox="allow-same-origin"'


def missing() -> str:
    return "" if shutil.which("chromium") else "chromium is not installed (package chromium)"


def evaluate(
    page: Path, expression: str, *, scripts: bool = True, options: tuple[str, ...] = ()
) -> Any:
    """Return the value of an expression of JavaScript in a page.

    Without ``scripts``, those of the page do not run.
    """
    return evaluate_in(page, expression, [("", 1200)], scripts=scripts, options=options)[0]


def evaluate_in(
    page: Path,
    expression: str,
    frames: Sequence[tuple[str, int]],
    *,
    scripts: bool = True,
    options: tuple[str, ...] = (),
) -> list[Any]:
    """Return the values of an expression in frames: each has a fragment (``#…``) and a width."""
    harness = page.with_name("harness.html")
    text = "".join(
        _FRAME.format(
            page=f"{page.name}{html.escape(fragment)}",
            width=width,
            sandbox="" if scripts else _NO_SCRIPTS,
            expression=html.escape(expression),
        )
        for fragment, width in frames
    )
    harness.write_text(f'<!doctype html><meta charset="utf-8">{text}', encoding="utf-8")
    shown = run(page.parent, "--disable-web-security", "--dump-dom", *options, harness.as_uri())
    found = re.findall("<pre>(.*?)</pre>", shown, re.DOTALL)
    assert len(found) == len(frames)
    assert all(found), f"the browser could not evaluate {expression}: {shown[:2000]}"
    return [json.loads(html.unescape(each)) for each in found]


def run(place: Path, *arguments: str) -> str:
    """Run the browser, whose files lie in a directory; return its stdout."""
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={place / 'profile'}",
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout
