"""The tables of parallel text as they will be stored, found by reading every row once.

An n-way table is stored unchanged, and a long one as a table for each of its directions.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from magnetar.data.errors import UserError
from magnetar.data.pairs.tables import ID_COLUMN, Row, read_rows
from magnetar.data.prepared_folder import Reporter
from magnetar.data.text.token_files import SPLITS


@dataclass(frozen=True)
class TableConfig:
    """One corpus. Each split is a glob or ""; one of them at least is given."""

    name: str
    train: str = ""
    valid: str = ""
    columns: tuple[str, ...] | None = None  # languages; None: every column but `id`
    weight: float = 1.0  # each pair counts so many times when training draws


@dataclass
class StoredTable:
    """Result of the first reading: an n-way table, or one direction of a long one."""

    name: str
    config: TableConfig
    direction: tuple[str, str] | None
    num_rows: Counter[str] = field(default_factory=Counter)  # by split
    num_chars: Counter[str] = field(default_factory=Counter)  # of training text, by language
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by split and language

    @property
    def languages(self) -> list[str]:
        """Every language in the order of the columns."""
        return [*self.num_chars]

    def directions(self, asked: list[tuple[str, str]] | None) -> list[tuple[str, str]]:
        """The directions to prepare."""
        if asked is not None:
            return [pair for pair in asked if {*pair} <= {*self.languages}]
        if self.direction is not None:
            return [self.direction]
        return [(a, b) for a in self.languages for b in self.languages if a != b]


Files = dict[tuple[str, str], list[Path]]  # by name of the table and split
Rows = Iterator[tuple[StoredTable, str, Row]]  # each with its split


def counted_tables(configs: tuple[TableConfig, ...], files: Files, reporter: Reporter) -> "Reader":
    """A reader of tables that are counted.

    Raises:
        UserError: if a row is malformed, a column is missing, or a table has nothing to learn from.
    """
    reader = Reader(configs, files, reporter)
    for table, split, row in reader.rows("counting"):
        table.num_rows[split] += 1
        for language, text in row.texts.items():
            table.num_chars[language] += len(text) if split == "train" else 0
            table.num_bytes[split, language] += len(text.encode()) if text.strip() else 0
    for one in configs:
        stored = [table for table in reader.tables.values() if table.config is one]
        _check_columns(one, reader)
        hint = _row_id_hint(one, reader)
        for table in stored:
            if len(table.languages) < 2:
                raise UserError(
                    f"table {table.name} has only one language, {', '.join(table.languages)}: add "
                    f"another{hint and f'. {hint}'}"
                )
        for split in SPLITS:
            if (one.name, split) in files and not any(table.num_rows[split] for table in stored):
                raise UserError(
                    f"{files[one.name, split][0]} holds no row of table {one.name}"
                    f"{' in two languages of --columns' if one.columns else ''}: fill it, or leave "
                    "it out of --table"
                )
        if hint:
            reporter.message(hint)
        if num_others := reader.num_others[one.name]:
            reporter.message(
                f"table {one.name}: left out {num_others:,} rows that are not in two languages of "
                "--columns"
            )
    return reader


def _check_columns(one: TableConfig, reader: "Reader") -> None:
    """Raise a UserError if a file lacks one of the table's languages."""
    files = {path: names for (name, path), names in reader.columns.items() if name == one.name}
    of_all = dict.fromkeys(name for names in files.values() for name in names if name != ID_COLUMN)
    for path, names in files.items():
        for language in one.columns or of_all:
            if language not in names:
                asked = "--columns asks for" if one.columns else "other files of the table have"
                raise UserError(
                    f"{path} has no column {language!r}, which {asked}: it has "
                    f"{', '.join(names)}. Every file of table {one.name} must have all its "
                    "languages: add or rename the column, name only those that all have with "
                    "--columns, or give the file as a --table of its own"
                )
    found = reader.languages.get(one.name, {})
    absent = [language for language in one.columns or () if found and language not in found]
    if absent and not files:
        raise UserError(
            f"table {one.name} has no row in {absent[0]!r}, which --columns asks for: it has "
            f"{', '.join(found)}. Name only those"
        )


def _row_id_hint(one: TableConfig, reader: "Reader") -> str:
    """A hint for a table whose column `id` is not read as a language; "" without such a column."""
    for (name, _), names in reader.columns.items():
        if name == one.name and ID_COLUMN in names and ID_COLUMN not in (one.columns or ()):
            languages = one.columns or [column for column in names if column != ID_COLUMN]
            return (
                f"table {one.name}: column id is what its rows are called; if it is Indonesian, "
                f"use --columns {one.name}={','.join([*languages, ID_COLUMN])}"
            )
    return ""


@dataclass
class Reader:
    """Reads every row of every table, each time it is called.

    Attributes:
        tables: the tables that rows have been read of, by name.
        columns: columns of n-way rows, by table and file.
        languages: languages of long rows, by table.
        num_others: number of long rows of directions that are not read, by table.
    """

    configs: tuple[TableConfig, ...]
    files: Files
    reporter: Reporter
    tables: dict[str, StoredTable] = field(default_factory=dict)
    columns: dict[tuple[str, Path], dict[str, None]] = field(default_factory=dict)
    languages: dict[str, dict[str, None]] = field(default_factory=dict)
    num_others: Counter[str] = field(default_factory=Counter)

    def rows(self, stage: str, splits: tuple[str, ...] = SPLITS) -> Rows:
        """The rows, table after table and split after split."""
        of_splits = [paths for (_, split), paths in self.files.items() if split in splits]
        on_bytes = self.reporter.count_bytes(stage, [path for paths in of_splits for path in paths])
        for one in self.configs:
            for split in splits:
                for path in self.files.get((one.name, split), []):
                    for row in read_rows(path, one.columns, on_bytes):
                        self._note(one.name, path, row)
                        if row.texts:
                            yield self._table(one, row.direction), split, row

    def _note(self, name: str, path: Path, row: Row) -> None:
        if row.direction is None:
            self.columns.setdefault((name, path), {}).update(dict.fromkeys(row.names))
            return
        self.languages.setdefault(name, {}).update(dict.fromkeys(row.names))
        self.num_others[name] += not row.texts

    def _table(self, one: TableConfig, direction: tuple[str, str] | None) -> StoredTable:
        name = one.name if direction is None else f"{one.name}.{'-'.join(direction)}"
        if name not in self.tables:
            self.tables[name] = StoredTable(name, one, direction)
        return self.tables[name]
