"""The part of CONTRIBUTING.md's Language rules that a program can check.

It finds long sentences, headless clauses and fragments. ``python tests/prose.py FILE…`` prints them
for pages (.md) and for the docstrings of modules (.py).
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
#: Words that a sentence may have.
MOST_WORDS: Final = 30
#: Columns of a line, but in tables, code and addresses.
MOST_COLUMNS: Final = 100

#: The beginning of a sentence whose subject is a clause.
_HEADLESS: Final = re.compile(r"(?:What|Who|Whoever|Whatever|Whose|Whom)\b(?!.*\?$)")
_AUXILIARIES: Final = frozenset(
    {
        "am",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "has",
        "have",
        "had",
        "do",
        "does",
        "did",
        "can",
        "cannot",
        "could",
        "may",
        "might",
        "must",
        "shall",
        "should",
        "will",
        "would",
        "isn't",
        "aren't",
    }
)
#: First words of docstrings that are no imperative, and verbs that are nearly always nouns here.
_NO_VERBS: Final = frozenset(
    {
        "a",
        "all",
        "an",
        "as",
        "at",
        "both",
        "bytes",
        "each",
        "for",
        "how",
        "in",
        "it",
        "nothing",
        "of",
        "on",
        "one",
        "only",
        "that",
        "the",
        "they",
        "this",
        "what",
        "whether",
        "which",
        "who",
        "file",
        "page",
        "pages",
        "range",
    }
)
#: Verbs that no docstring need begin with.
_MORE_VERBS: Final = frozenset(
    {"bound", "come", "differ", "forward", "list", "see", "serve", "support", "travel"}
)
#: Where one sentence ends and another begins.
_END: Final = re.compile(r"(?<=[.!?])[)\"”]*\s+(?=[(\"“`*\[]*[A-Z0-9`/])")
_ABBREVIATIONS: Final = re.compile(r"\b(?:e\.g|i\.e|cf|no|vs|etc|resp)\.(?=\s)", re.IGNORECASE)
_SECTION: Final = re.compile(r"^\s*(?:Args|Attributes|Raises|Returns|Yields|Shapes):\s*$")
_IGNORABLE: Final = re.compile(r"^(?:```|\||#|>|<!--|\s*$)")


@dataclass(frozen=True)
class Prose:
    """A piece of text: where it stands, and whether each of its sentences needs a verb."""

    place: str
    text: str
    whole_sentences: bool


def sentences(text: str) -> list[str]:
    """Return the sentences of a text without markup; what stands in code marks is one word."""
    text = re.sub(r"``?[^`]+``?", "`code`", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = _ABBREVIATIONS.sub(lambda found: found[0][:-1], " ".join(text.split()))
    return [sentence for sentence in _END.split(text) if sentence]


@cache
def imperatives() -> frozenset[str]:
    """Return the verbs that docstrings of functions begin with."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node):
                found |= {word.lower() for word in (ast.get_docstring(node) or "").split()[:1]}
    return frozenset(found - _NO_VERBS | _MORE_VERBS)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _stems(word: str) -> Iterator[str]:
    for ending, instead in (("ies", "y"), ("es", ""), ("s", ""), ("ied", "y"), ("ed", "")):
        if word.endswith(ending):
            yield word.removesuffix(ending) + instead
    if word.endswith("d"):
        yield word[:-1]


def has_verb(sentence: str) -> bool:
    """Say whether a sentence has a verb, judged by the words that docstrings begin with."""
    words = re.findall(r"[A-Za-z']+", sentence.lower())
    return any(word in _AUXILIARIES or word in _FINITE for word in words) or any(
        stem in imperatives() for word in words for stem in (word, *_stems(word))
    )


#: Forms of verbs that no ending tells.
_FINITE: Final = frozenset(
    {
        "began",
        "came",
        "drew",
        "fell",
        "felt",
        "found",
        "gave",
        "goes",
        "went",
        "got",
        "grew",
        "held",
        "kept",
        "knew",
        "lay",
        "lies",
        "left",
        "lost",
        "made",
        "means",
        "met",
        "needs",
        "put",
        "ran",
        "read",
        "rose",
        "said",
        "saw",
        "sent",
        "set",
        "stood",
        "stands",
        "took",
        "told",
        "wrote",
        "belongs",
        "begins",
        "comes",
        "costs",
        "depends",
        "differs",
        "exists",
        "fails",
        "follows",
        "happens",
        "lacks",
        "lives",
        "looks",
        "matters",
        "occurs",
        "remains",
        "seems",
        "serves",
        "shares",
        "shows",
        "stays",
        "stems",
        "works",
    }
)


def of_page(path: Path) -> Iterator[Prose]:
    """Yield the paragraphs, items of lists and cells of tables of a page in Markdown."""
    block: list[str] = []
    begun, fenced = 0, False
    #: The columns of a table that show how not to write.
    bad: set[int] = set()

    def done() -> Iterator[Prose]:
        if block:
            yield Prose(f"{_name(path)}:{begun}", " ".join(block), whole_sentences=False)
            block.clear()

    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or _IGNORABLE.match(line.lstrip()):
            yield from done()
            if not fenced and line.lstrip().startswith("|"):
                cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
                bad |= {at for at, cell in enumerate(cells) if cell.strip() == "before"}
                for at, cell in enumerate(cells):
                    if at not in bad:
                        yield Prose(f"{_name(path)}:{number}", cell, whole_sentences=False)
            else:
                bad.clear()
            continue
        if re.match(r"\s*(?:[-*]|\d+\.)\s", line):
            yield from done()
        begun = begun if block else number
        block.append(re.sub(r"^(?:[-*]|\d+\.)\s+", "", line.strip()))
    yield from done()


def of_module(path: Path) -> Iterator[Prose]:
    """Yield the docstrings of a module, paragraph by paragraph."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text:
            line = node.body[0].lineno
            yield from _of_docstring(f"{_name(path)}:{line}", text, node)


def _of_docstring(place: str, text: str, node: ast.AST) -> Iterator[Prose]:
    summary, _, rest = text.partition("\n\n")
    # A module and a class are named by a noun; a function is told to do something.
    named = isinstance(node, ast.Module | ast.ClassDef)
    first, *more = sentences(summary) or [""]
    yield Prose(place, first, whole_sentences=not named)
    for sentence in more:
        yield Prose(place, sentence, whole_sentences=True)
    section = False
    for paragraph in rest.split("\n\n"):
        lines = paragraph.splitlines()
        section = bool(lines and (_SECTION.match(lines[0]) or (section and lines[0][:1] == " ")))
        if section:
            for entry in re.split(r"\n    (?=\S)", "\n".join(lines[1:])):
                yield from (Prose(place, part, whole_sentences=False) for part in entry.split("; "))
        elif not any(line.startswith(("    ", ">>>", "|", "$")) for line in lines):
            for item in re.split(r"\n(?=[-*] |\d+\. )", paragraph):
                yield Prose(place, item, whole_sentences=not re.match(r"[-*] |\d+\. ", item))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def faults(prose: Prose) -> Iterator[str]:
    """Yield what is wrong with a piece of text, with its place."""
    for sentence in sentences(prose.text):
        count = len(sentence.split())
        if count > MOST_WORDS:
            yield f"{prose.place}: {count} words: {sentence}"
        if _HEADLESS.match(sentence) and count > 2:
            yield f"{prose.place}: begins with a headless clause: {sentence}"
        if prose.whole_sentences and not has_verb(sentence):
            yield f"{prose.place}: has no verb: {sentence}"


def long_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a page that are too long, but tables, code and addresses."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if len(line) > MOST_COLUMNS and not fenced and not re.search(r"^\s*\||https?://", line):
            yield f"{_name(path)}:{number}: {len(line)} columns"


def of_file(path: Path) -> Iterator[str]:
    """Yield all faults of a page or of a module."""
    page = path.suffix == ".md"
    for prose in of_page(path) if page else of_module(path):
        yield from faults(prose)
    if page:
        yield from long_lines(path)


if __name__ == "__main__":
    found = [fault for name in sys.argv[1:] for fault in of_file(Path(name).resolve())]
    print("\n".join(found))
    sys.exit(1 if found else 0)
