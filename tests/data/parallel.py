"""Small parallel texts and folders of prepared pairs."""

import json
import random
from pathlib import Path

from magnetar.data.pairs.folder import PreparedPairs, open_pairs
from magnetar.data.pairs.prepare import PreparePairsConfig, TableConfig, prepare_pairs

LANGUAGES = ("en", "de", "pt-br")
WORDS = {
    "en": ["the", "ship", "sails", "north", "sea", "wind", "old", "harbour", "blue"],
    "de": ["das", "Schiff", "segelt", "nach", "Norden", "See", "Wind", "alt", "Häfen"],
    "pt-br": ["o", "navio", "navega", "norte", "mar", "vento", "velho", "porto", "azul"],
}


def verses(num_rows: int, seed: int = 0, longest: int = 12) -> list[dict[str, str]]:
    """Rows in three languages, of one word to `longest`, each unlike any other; deterministic."""
    draw = random.Random(seed)
    return [
        {
            language: f"{seed} {i} " + " ".join(draw.choices(words, k=draw.randint(1, longest)))
            for language, words in WORDS.items()
        }
        for i in range(num_rows)
    ]


def write_tsv(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = LANGUAGES) -> Path:
    """An n-way table with an id."""
    lines = ["\t".join(["id", *columns])]
    lines += ["\t".join([str(i), *(row[c] for c in columns)]) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def long_rows(rows: list[dict[str, str]], source: str, target: str) -> list[dict[str, str]]:
    """Rows of one direction of a long table."""
    return [
        {
            "source_language": source,
            "target_language": target,
            "source": row[source],
            "target": row[target],
        }
        for row in rows
    ]


def prepared_verses(folder: Path, num_train: int, num_valid: int = 7) -> PreparedPairs:
    """An n-way table and one direction of a smaller long one, prepared."""
    tables = (
        TableConfig(
            "verses",
            str(write_tsv(folder / "train.tsv", verses(num_train))),
            str(write_tsv(folder / "valid.tsv", verses(num_valid, seed=1))) if num_valid else "",
        ),
        TableConfig(
            "help",
            str(
                write_jsonl(
                    folder / "help.jsonl", long_rows(verses(num_train // 5, seed=2), "en", "de")
                )
            ),
            weight=2.0,
        ),
    )
    out = folder / "prepared"
    prepare_pairs(PreparePairsConfig(out, tables, vocab_size=320))
    return open_pairs(out)
