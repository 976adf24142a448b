"""Tokenises parallel text into a folder that translation is trained on.

magnetar prepare-pairs --table own=train.tsv,valid.tsv --vocab-size 8000 \\
    --dedupe --max-length-ratio 3 --out prepared/own

A table has a column a language (en, de, ...), or source_language, target_language, source, target:
docs/translation.md shows both. Stopped runs resume: give the same command again.
"""

from collections.abc import Sequence

import rich.table

from magnetar.data.errors import UserError
from magnetar.data.pairs.filters import PairFilter, dropped, in_words
from magnetar.data.pairs.folder import PairsManifest, TableRecord
from magnetar.data.pairs.prepare import PreparePairsConfig, TableConfig, prepare_pairs
from magnetar.data.text.token_files import SPLITS
from magnetar.launchers.terminal.command_line import CommandParser
from magnetar.launchers.terminal.preparing import (
    add_options,
    print_summary,
    summary_table,
    terminal_reporter,
)
from magnetar.launchers.terminal.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> PreparePairsConfig:
    """The command line as a config.

    Raises:
        UserError: a value is not of its form, or speaks of a table that is not there.
    """
    parser = CommandParser(prog="magnetar prepare-pairs", description=__doc__)
    add = parser.add_argument
    add(
        "--table",
        action="append",
        default=[],
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
    add(
        "--columns",
        action="append",
        default=[],
        metavar="[NAME=]en,de",
        help="languages to read, of every table or of one (default: every column but id)",
    )
    add(
        "--directions",
        default="all",
        metavar="all|en-de,de-en",
        help="all: of an n-way table every one, of a long table those that it lists (default)",
    )
    add(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="how many times each pair of a table counts when training draws (default 1)",
    )
    add("--dedupe", action="store_true", help="drop pairs seen before, or in a validation split")
    add("--max-length-ratio", type=float, metavar="R", help="drop pairs of more unequal lengths")
    add("--max-length", type=int, metavar="N", help="drop pairs with more tokens on a side")
    values = parser.parse_args(arguments)
    return PreparePairsConfig(
        out=values.out,
        tables=_tables(values.table, values.columns, values.weight),
        vocab_size=values.vocab_size,
        vocab_temperature=values.vocab_temperature,
        tokenizer=values.tokenizer,
        directions=None if values.directions == "all" else _list(values.directions),
        filter=PairFilter(values.dedupe, values.max_length_ratio, values.max_length),
        workers=values.workers,
    )


def _tables(
    tables: list[str], all_columns: list[str], all_weights: list[str]
) -> tuple[TableConfig, ...]:
    names = [table.partition("=")[0] for table in tables]
    columns: dict[str, tuple[str, ...]] = {}
    for value in all_columns:
        name, is_named, languages = value.rpartition("=")
        for table in [_known(name, names, "--columns")] if is_named else names:
            columns[table] = _list(languages)
    weights: dict[str, float] = {}
    for value in all_weights:
        name, _, weight = value.partition("=")
        try:
            weights[_known(name, names, "--weight")] = float(weight)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--weight {value} is not NAME=NUMBER: use bible=2, say") from error
    found = []
    for table in tables:
        name, is_named, files = table.partition("=")
        train, *valid = files.split(",")
        if not is_named or len(valid) > 1:
            raise UserError(
                f"--table {table} is not NAME=TRAIN,VALID: use bible=train.tsv,valid.tsv, say"
            )
        found.append(
            TableConfig(
                name, train, "".join(valid), columns.get(name), weight=weights.get(name, 1.0)
            )
        )
    return tuple(found)


def _known(name: str, names: list[str], option: str) -> str:
    if name not in names:
        raise UserError(f"{option} {name}: no --table has this name, only {', '.join(names)}")
    return name


def _list(values: str) -> tuple[str, ...]:
    return tuple(value for value in values.split(",") if value)


def summary(manifest: PairsManifest) -> rich.table.Table:
    """What each split of each table holds, and what was dropped."""
    columns = ("table", "split", "rows", "tokens", "directions", "pairs", "dropped")
    shown = summary_table(columns, texts=("table", "split", "dropped"))
    names = [*dict.fromkeys(table.name.partition(".")[0] for table in manifest.tables)]
    for name in names:
        for split in SPLITS:
            # A long table is stored as one for each direction, called NAME.DIRECTION.
            found = [
                table
                for table in manifest.tables
                if table.name.partition(".")[0] == name and split in table.splits
            ]
            if found:
                counts = [*map(sum, zip(*(_counts(one, split) for one in found), strict=True))]
                reasons = in_words(dropped(found, split))
                shown.add_row(name, split, *(f"{count:,}" for count in counts), reasons)
    return shown


def _counts(table: TableRecord, split: str) -> tuple[int, int, int, int]:
    """Rows, tokens, directions and pairs."""
    record = table.splits[split]
    return (
        record.num_rows,
        sum(column.num_tokens for column in record.columns.values()),
        len(table.directions),
        sum(pairs.num_pairs for pairs in table.pairs(split)),
    )


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare pairs, and print what the folder holds."""
    config = parse_arguments(arguments)
    was_there = config.out.exists()  # it is left as it is then
    with terminal_reporter() as reporter:
        manifest = prepare_pairs(config, reporter)
    languages = f"languages: {', '.join(manifest.languages)}"
    print_summary(summary(manifest), [languages], manifest, config.out, was_there)


if __name__ == "__main__":
    main()
