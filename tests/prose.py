"""What a program can check of our English: `make lint` runs `python -m tests.prose`.

It reads the docstrings of every source file and the descriptions of the keys (pydantic `Field`,
`models.section.key`), and reports

- an entry of Args, Attributes, Returns, Yields or Raises, or a description, that begins with a
  preposition or a relative word ("of", "where", "whose" ...) and so cannot stand alone,
- an entry of Args that names no parameter,
- a sentence of more than `MAX_WORDS` words,
- a docstring whose first sentence takes more than a line,
- words that make the reader guess (`RIDDLES`).

CONTRIBUTING.md says how an entry reads instead.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "models", "data", "convert", "launchers", "benchmarks", "tests/faults")
MAX_WORDS = 40
FRAGMENT = re.compile(
    r"(of|for|as|by|where|whose|likewise|at most|in how|"
    r"(with|in|of|to|from|at|by|on|for|among) (which|whose|whom))\b",
    re.IGNORECASE,
)
RIDDLES = re.compile(r"\b(likewise|whoever|whomever)\b", re.IGNORECASE)
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")
SHAPE = re.compile(r"\([^)]*\)( (u?int|b?float)\d+| bool)?(, each)?[,:.] *")  # "(N, E) float32, "


class Entry(NamedTuple):
    """One entry of a docstring's section.

    Attributes:
        section: "Args", "Returns" ...
        names: names that the entry explains; none under Returns and Yields.
        text: the explanation, on one line.
    """

    section: str
    names: tuple[str, ...]
    text: str


class Finding(NamedTuple):
    """One sentence to rewrite, and the reason."""

    path: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}: {self.text[:90]}"


def entries(docstring: str) -> Iterator[Entry]:
    """Every entry of a Google-style docstring, as `ast.get_docstring` returns it."""
    section, lines = "", list[str]()
    for line in [*docstring.splitlines(), "end"]:
        indent = len(line) - len(line.lstrip())
        # The next entry, section or paragraph ends an entry; deeper lines continue it.
        if lines and line.strip() and indent <= 4 and not (_runs_on(section) and indent == 4):
            yield _entry(section, " ".join(lines))
            lines = []
        if heading := SECTION.fullmatch(line):
            section = heading[1]
        elif line.strip() and indent == 0:
            section = ""
        elif line.strip() and section:
            lines.append(line.strip())


def _runs_on(section: str) -> bool:
    return section in ("Returns", "Yields")  # one entry, whose lines are not indented further


def _entry(section: str, text: str) -> Entry:
    if _runs_on(section):
        return Entry(section, (), text)
    names, _, explanation = text.partition(":")
    return Entry(section, tuple(name.strip(" *") for name in names.split(",")), explanation.strip())


def sentences(docstring: str) -> Iterator[str]:
    """Every sentence of a docstring, without code, tables of files and the legend of letters."""
    docstring = "\n\n".join(
        paragraph
        for paragraph in docstring.split("\n\n")
        if not paragraph.startswith(("    ", "Letters", "magnetar ", "runs/"))
    )
    paragraphs = re.split(r"\n\s*(?:\n|(?=[-*|] |\d\. |\w[\w, ]*:\s|\S+ {2,}\S))", docstring)
    for paragraph in paragraphs:
        yield from re.split(r"(?<=[.;:!?])\s+", " ".join(paragraph.split()))


def _reasons(text: str) -> Iterator[str]:
    """What is wrong with one entry or description."""
    if not text:
        yield "says nothing"
    elif found := FRAGMENT.match(SHAPE.sub("", text, count=1) or text):
        yield f"begins with {found[0]!r}"


def findings(path: Path, root: Path = ROOT) -> list[Finding]:
    """Everything to rewrite in one file.

    Args:
        path: the Python file.
        root: the folder that reported paths are relative to.
    """
    name = path.relative_to(root).as_posix()
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            line = getattr(node, "lineno", 1)
            found += [Finding(name, line, *rest) for rest in _docstring_findings(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Field", "key"):
            for text in _descriptions(node):
                found += [Finding(name, node.lineno, why, text) for why in _reasons(text)]
    return sorted(found)


def _docstring_findings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node) or ""
    if "\n" in (first := docstring.partition("\n\n")[0].strip()):
        yield "the first sentence takes more than a line", first
    for entry in entries(docstring):
        about = f"{', '.join(entry.names) or entry.section}: {entry.text}"
        for reason in _reasons(entry.text):
            yield reason, about
        if entry.section == "Args" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for unknown in sorted({*entry.names} - _parameters(node)):
                yield f"{unknown!r} is no parameter", about
    for sentence in sentences(docstring):
        if (words := len(sentence.split())) > MAX_WORDS:
            yield f"a sentence of {words} words", sentence
        if riddle := RIDDLES.search(sentence):
            yield f"{riddle[0]!r} makes the reader guess", sentence


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    of = node.args
    every = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
    return {parameter.arg for parameter in every if parameter is not None}


def _descriptions(call: ast.Call) -> Iterator[str]:
    second = call.args[1:2] if ast.unparse(call.func) == "key" else []
    yield from (str(each.value) for each in second if isinstance(each, ast.Constant))
    for keyword in call.keywords:
        if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
            yield str(keyword.value.value)


def sources() -> list[Path]:
    """Every source file."""
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def main() -> int:
    """Print what is to be rewritten.

    Returns:
        Exit status: 1 if there is something.
    """
    paths = sources()
    found = [finding for path in paths for finding in findings(path)]
    for finding in found:
        print(finding)
    print(f"{len(found)} to rewrite in {len(paths)} files" if found else f"{len(paths)} files read")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
