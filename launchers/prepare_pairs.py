"""Tokenises parallel text into a folder that translation is trained on.

magnetar prepare-pairs --table own=train.tsv,valid.tsv --vocab-size 8000 \\
    --dedupe --max-length-ratio 3 --out prepared/own

A table has a column a language (en, de, ...), or source_language, target_language, source, target:
docs/translation.md shows both. Stopped runs resume: give the same command again.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any

import rich.table

from magnetar.data.errors import UserError
from magnetar.data.pairs.filters import PairFilter, dropped, in_words
from magnetar.data.pairs.folder import PairsManifest, TableRecord
from magnetar.data.pairs.prepare import PreparePairsConfig, TableConfig, prepare_pairs
from magnetar.data.text.token_files import SPLITS
from magnetar.launchers.terminal.command_line import CommandParser
from magnetar.launchers.terminal.preparing import add_options, prepare_and_print, summary_table
from magnetar.launchers.terminal.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> PreparePairsConfig:
    """The command line as a config.

    Raises:
        UserError: a value is not of its form, or speaks of a table that is not there.
    """
    parser = CommandParser(prog="magnetar prepare-pairs", description=__doc__)
    add = parser.add_argument
    add_many = partial(add, action="append", default=[])
    add_many(
        "--table",
        metavar="NAME=TRAIN[,VALID]",
        help="globs of .tsv or .jsonl [.gz .xz .zst], either may be empty; again for each corpus",
    )
    add_options(parser, "use the vocabulary of other prepared pairs", "DIR")
    add(
        "--vocab-temperature",
        type=float,
        default=PreparePairsConfig.vocab_temperature,
        metavar="T",
        help="a language of n characters gives n^(1/T) of what the vocabulary learns from "
        "(default %(default)s)",
    )
    add_many(
        "--columns",
        metavar="[NAME=]en,de",
        help="languages to read, of every table or of one (default: every column but id)",
    )
    add(
        "--directions",
        default="all",
        metavar="all|en-de,de-en",
        help="all: of an n-way table every one, of a long table those that it lists (default)",
    )
    add_many(
        "--weight",
        metavar="NAME=W",
        help="how many times each pair of a table counts when training draws (default 1)",
    )
    add("--dedupe", action="store_true", help="drop pairs seen before, or in a validation split")
    add("--max-length-ratio", type=float, metavar="R", help="drop pairs of more unequal lengths")
    add("--max-length", type=int, metavar="N", help="drop pairs with more tokens on a side")
    values = vars(parser.parse_args(arguments))
    directions = values.pop("directions")
    return PreparePairsConfig(
        tables=_tables(values.pop("table"), values.pop("columns"), values.pop("weight")),
        directions=None if directions == "all" else _list(directions),
        filter=PairFilter(**{field.name: values.pop(field.name) for field in fields(PairFilter)}),
        **values,
    )


def _tables(
    tables: list[str], all_columns: list[str], all_weights: list[str]
) -> tuple[TableConfig, ...]:
    found: list[TableConfig] = []
    for table in tables:
        name, is_named, files = table.partition("=")
        train, *valid = files.split(",")
        if not is_named or len(valid) > 1:
            raise UserError(
                f"--table {table} is not NAME=TRAIN,VALID: use bible=train.tsv,valid.tsv, say"
            )
        found.append(TableConfig(name, train, "".join(valid)))
    for value in all_columns:
        name, is_named, languages = value.rpartition("=")
        _change(found, name if is_named else None, "--columns", columns=_list(languages))
    for value in all_weights:
        name, _, weight = value.partition("=")
        try:
            number = float(weight)
        except ValueError as error:
            raise UserError(f"--weight {value} is not NAME=NUMBER: use bible=2, say") from error
        _change(found, name, "--weight", weight=number)
    return tuple(found)


def _change(tables: list[TableConfig], name: str | None, option: str, **changes: Any) -> None:
    """Change the table of a name; all tables without one."""
    names = [table.name for table in tables]
    if name is not None and name not in names:
        raise UserError(f"{option} {name}: no --table has this name, only {', '.join(names)}")
    for i, table in enumerate(tables):
        if name in (None, table.name):
            tables[i] = replace(table, **changes)


def _list(values: str) -> tuple[str, ...]:
    return tuple(value for value in values.split(",") if value)


def summary(manifest: PairsManifest) -> tuple[rich.table.Table, list[str]]:
    """What each split of each table holds and what was dropped, and the languages."""
    columns = ("table", "split", "rows", "tokens", "directions", "pairs", "dropped")
    shown = summary_table(columns, texts=("table", "split", "dropped"))
    # A long table is stored as one for each direction, called NAME.DIRECTION.
    names = dict.fromkeys(table.name.partition(".")[0] for table in manifest.tables)
    for name, split in product(names, SPLITS):
        of_name = [one for one in manifest.tables if one.name.partition(".")[0] == name]
        if found := [table for table in of_name if split in table.splits]:
            counts = map(sum, zip(*(_counts(table, split) for table in found), strict=True))
            reasons = in_words(dropped(found, split))
            shown.add_row(name, split, *(f"{count:,}" for count in counts), reasons)
    return shown, [f"languages: {', '.join(manifest.languages)}"]


def _counts(table: TableRecord, split: str) -> tuple[int, int, int, int]:
    """Rows, tokens, directions and pairs."""
    record = table.splits[split]
    num_tokens = sum(column.num_tokens for column in record.columns.values())
    num_pairs = sum(pairs.num_pairs for pairs in record.pairs)
    return record.num_rows, num_tokens, len(table.directions), num_pairs


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare pairs, and print what the folder holds."""
    prepare_and_print(parse_arguments(arguments), prepare_pairs, summary)


if __name__ == "__main__":
    main()
