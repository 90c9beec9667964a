"""The page of a report, in a real browser and as text."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import browser
from conformance_reports import EVIL, a_report, evil, many_columns
from restrictedmem.conformance import page
from restrictedmem.conformance.suite_report import SuiteReport
from restrictedmem.text import plain

needs_browser = pytest.mark.requires("chromium")
#: Cases that are seen.
SEEN = (
    "[...page.document.querySelectorAll('.case')].filter(one => one.checkVisibility())"
    ".map(one => one.id)"
)
HEADS = (
    "[...page.document.querySelectorAll('.head > span')].filter(one => one.checkVisibility())"
    ".map(one => one.textContent)"
)
COUNT = "page.document.querySelector('output').textContent"


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    return write(tmp_path, a_report())


def write(place: Path, report: SuiteReport) -> Path:
    path = place / "page.html"
    path.write_text(page.of(report), encoding="utf-8")
    return path


class _Text(HTMLParser):
    """The elements of a page, and its text without style and script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.add(tag)
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.text += data


def read(report: SuiteReport) -> _Text:
    found = _Text()
    found.feed(page.of(report))
    return found


def test_everything_is_in_the_page_without_a_script() -> None:
    report, text = a_report(), read(a_report()).text
    assert "Linux 6.18, 2026-11-30 08:00 UTC, restrictedmem 0.1.0: 2 cases on 3 columns" in text
    for result in report.results:
        for part in (result.case, result.column, result.expected, result.seen, *result.steps):
            assert part in text
    for part in ("there is none", "it has no slots", "no guest runs", "Linux 6.8 to 7.1"):
        assert part in text


def test_text_of_others_is_no_element() -> None:
    clean, found = read(a_report()), read(evil(a_report()))
    assert found.tags == clean.tags
    assert found.text.count(plain(EVIL)) > 30
    assert page.of(evil(a_report())).encode().decode().replace("\n", "").isprintable()


def test_the_page_names_nothing_outside_it() -> None:
    text = page.of(a_report())
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=", text.replace("// ", ""))


@needs_browser
def test_the_page_in_a_browser(shown: Path) -> None:
    assert browser.evaluate(shown, f"[{SEEN}, {HEADS}, {COUNT}]") == [
        ["case-read", "case-bind-again"],
        ["", "one", "two/a", "two/b"],
        "2 of 2 cases",
    ]
    # A case with a failure is open, so that it is printed as well.
    opened = "[...page.document.querySelectorAll('.case[open]')].map(one => one.id)"
    assert browser.evaluate(shown, opened) == ["case-read"]


NAMES = ["one", "two/a", "two/b"]
#: The cases and the columns that each fragment leaves.
FRAGMENTS: dict[str, tuple[list[str], list[str]]] = {
    "#text=GM-RW": (["case-read"], NAMES),
    "#text=slots": (["case-bind-again"], NAMES),
    "#text=nonesuch": ([], NAMES),
    "#verdict=known": (["case-bind-again"], NAMES),
    "#verdict=fail&column=two/a": (["case-read"], ["two/a"]),
    "#verdict=fail&column=one": ([], ["one"]),
    "#column=nonesuch&verdict=nonesuch": (["case-read", "case-bind-again"], NAMES),
    "#case-bind-again": (["case-read", "case-bind-again"], NAMES),
    "#%": (["case-read", "case-bind-again"], NAMES),
}


@needs_browser
def test_the_fragment_is_a_filter(shown: Path) -> None:
    frames = [(fragment, 1200) for fragment in FRAGMENTS]
    found = browser.evaluate_in(shown, f"[{SEEN}, {HEADS}, {COUNT}]", frames)
    assert dict(zip(FRAGMENTS, found, strict=True)) == {
        fragment: [cases, ["", *heads], f"{len(cases)} of 2 cases"]
        for fragment, (cases, heads) in FRAGMENTS.items()
    }


@needs_browser
def test_a_link_to_a_case_opens_it(shown: Path) -> None:
    is_open = "page.document.getElementById('case-bind-again').open"
    frames = [("#case-bind-again", 1200), ("", 1200)]
    assert browser.evaluate_in(shown, is_open, frames) == [True, False]


@needs_browser
def test_a_filter_that_is_typed_is_the_fragment(shown: Path) -> None:
    typed = (
        "(form => { form.text.value = 'bind'; form.verdict.value = 'na';"
        " form.text.dispatchEvent(new Event('input', {bubbles: true}));"
        f" return [page.location.hash, {SEEN}]; }})(page.document.querySelector('form'))"
    )
    assert browser.evaluate(shown, typed) == ["#text=bind&verdict=na", ["case-bind-again"]]


@needs_browser
def test_a_column_shows_its_own_answers_alone(shown: Path) -> None:
    names = "[...page.document.querySelectorAll('#case-read .group')].map(one => !one.hidden)"
    assert browser.evaluate_in(shown, names, [("#column=one", 1200)]) == [[False, True]]


@needs_browser
def test_without_scripts_all_is_seen_but_the_filter(shown: Path) -> None:
    form = "page.document.querySelector('form').checkVisibility()"
    opened = "[...page.document.querySelectorAll('.case')].map(one => one.open)"
    found = browser.evaluate(shown, f"[{SEEN}, {HEADS}, {form}, {opened}]", scripts=False)
    assert found == [
        ["case-read", "case-bind-again"],
        ["", "one", "two/a", "two/b"],
        False,
        [True, False],
    ]
    assert browser.evaluate(shown, form) is True


@needs_browser
def test_no_script_but_its_own_runs(tmp_path: Path) -> None:
    path = write(tmp_path, evil(a_report()))
    assert len(browser.evaluate(path, SEEN)) == 2
    # Even if a text were not escaped, the policy of the page would stop it.
    planted = "<script>document.title = 'owned'</script><img src=x onerror='document.title = 1'>"
    path.write_text(path.read_text().replace("<h1>", f"{planted}<h1>"))
    title, cases = browser.evaluate(path, f"[page.document.title, {SEEN}]")
    assert title.startswith("Conformance of private memory, Linux ")
    assert len(cases) == 2


#: Elements that reach beyond the window.
OUTSIDE = (
    "[...page.document.querySelectorAll('main *')].filter(one =>"
    " one.getBoundingClientRect().right > page.innerWidth + 1).map(one => one.outerHTML)"
)


@needs_browser
def test_it_fits_into_the_window(tmp_path: Path) -> None:
    path, widths = write(tmp_path, many_columns()), (320, 390, 700, 1200, 2500)
    found = browser.evaluate_in(
        path, f"[page.innerWidth, {OUTSIDE}]", [("", width) for width in widths]
    )
    assert found == [[width, []] for width in widths]


@needs_browser
def test_the_dark_page_is_dark(shown: Path) -> None:
    back = "page.getComputedStyle(page.document.body).backgroundColor"
    assert browser.evaluate(shown, back) == "rgb(251, 250, 248)"
    dark = ("--blink-settings=preferredColorScheme=0",)
    assert browser.evaluate(shown, back, options=dark) == "rgb(20, 24, 28)"


@needs_browser
def test_it_prints(shown: Path) -> None:
    pdf = shown.with_suffix(".pdf")
    browser.run(shown.parent, f"--print-to-pdf={pdf}", shown.as_uri())
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert b"/Type /Page" in pdf.read_bytes()


def schemes() -> Iterator[dict[str, str]]:
    """Yield the colours of the light page and of the dark one."""
    style = Path(page.__file__).with_name("page.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    found = dict(re.findall(r"--([\w-]+): (#\w+);", light))
    yield found
    yield {**found, **dict(re.findall(r"--([\w-]+): (#\w+);", dark.split("\n}")[0]))}


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    pairs = [each * 2 for each in digits] if len(digits) == 3 else re.findall("..", digits)
    parts = [int(pair, 16) / 255 for pair in pairs]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_can_be_read_in_both_schemes() -> None:
    """The contrast is at least that of WCAG 2.2, level AA."""
    pairs = [(text, back) for text in ("ink", "soft") for back in ("paper", "card", "tint")]
    pairs += [(kind, f"{kind}-back") for kind in ("pass", "fail", "known", "none")]
    pairs += [(kind, "card") for kind in ("pass", "fail", "known", "none")]
    light, dark = schemes()
    assert light != dark
    for scheme in (light, dark):
        for text, back in pairs:
            low, high = sorted((luminance(scheme[text]), luminance(scheme[back])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back, scheme[text], scheme[back])
