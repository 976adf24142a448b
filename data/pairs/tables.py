"""Rows of parallel text: tab-separated tables and JSON lines.

n-way    one column (or key) a language; any cell may be empty, and a JSON row may lack a key
long     the columns (or keys) source_language, target_language, source, target; others are ignored

A table starts with a header. Fields are taken literally: quotes and backslashes have no meaning.
Blank lines are skipped. In an n-way table `id` is the name of a row, and the language Indonesian
only if it is named explicitly. Memory holds one row at a time.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import LANGUAGE
from magnetar.data.source_files import (
    OnBytes,
    file_format,
    json_objects,
    read_source,
    require_text,
)

LONG_COLUMNS = ("source_language", "target_language", "source", "target")
ID_COLUMN = "id"
Fields = tuple[str, dict[str, Any]]  # the place of a row, and its values by column


class Row(NamedTuple):
    """One text in several languages.

    Attributes:
        direction: source and target language of a row of a long table; None in an n-way one.
        texts: text by language, "" if a side is missing. Holds only the requested languages, and
            nothing for a row of a long table in another direction.
        names: all columns of an n-way row, or both languages of a long one.
    """

    direction: tuple[str, str] | None
    texts: dict[str, str]
    names: Collection[str]


def read_rows(
    path: Path,
    columns: Collection[str] | None = None,
    on_bytes: OnBytes = lambda num_bytes: None,
) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        path: `.tsv` or `.jsonl`, plain or compressed as in data.source_files.
        columns: the languages to read; None: all.
        on_bytes: function that is called with the bytes read since its last call.

    Raises:
        UserError: if the file is not UTF-8 or damaged, or a row is malformed, wholly empty, or has
            only some of a long table's columns.
    """
    parse = TABLE_FORMATS[file_format(path, TABLE_FORMATS)]
    for where, fields in read_source(path, partial(parse, path), on_bytes):
        yield _row(where, fields, columns)


def _row(where: str, fields: dict[str, Any], columns: Collection[str] | None) -> Row:
    # `source` and `target` may be notes beside languages that are asked for by name.
    of_long = LONG_COLUMNS if columns is None else LONG_COLUMNS[:2]
    if any(column in fields for column in of_long):
        return _long_row(where, fields, columns)
    texts = {
        column: _text(value, column, where)
        for column, value in fields.items()
        if (column in columns if columns is not None else column != ID_COLUMN)
    }
    others = (fields[column] for column in fields if column not in (*texts, ID_COLUMN))
    if not any(str(text).strip() for text in (*texts.values(), *others) if text is not None):
        raise UserError(f"{where}: every side is empty: delete the row, or fill it")
    for language in texts:
        _check_name(language, where)
    return Row(None, texts, fields.keys())


def _long_row(where: str, fields: dict[str, Any], columns: Collection[str] | None) -> Row:
    absent = [column for column in LONG_COLUMNS if column not in fields]
    if absent:
        raise UserError(
            f"{where} lacks {absent[0]!r}: a long table has {', '.join(LONG_COLUMNS)}, and this "
            f"one has {', '.join(map(repr, fields))}. Add or rename it; a table with a column a "
            "language has none of these"
        )
    first, second, *sides = (_text(fields[column], column, where) for column in LONG_COLUMNS)
    if first == second:
        raise UserError(
            f"{where}: source_language and target_language are both {first!r}, but must differ: "
            "mend one, or delete the row"
        )
    if not any(map(str.strip, sides)):
        raise UserError(f"{where}: every side is empty: delete the row, or fill it")
    names = (first, second)
    is_asked = columns is None or {*names} <= {*columns}
    for language in names if is_asked else ():
        _check_name(language, where)
    return Row(names, dict(zip(names, sides, strict=True)) if is_asked else {}, names)


def _check_name(language: str, where: str) -> None:
    if not LANGUAGE.fullmatch(language):
        raise UserError(
            f"{where}: {language!r} cannot be the name of a language (letters, digits and hyphens)"
            ": rename it, or name the columns that are languages with --columns"
        )


def _tsv_fields(path: Path, stream: IO[bytes]) -> Iterator[Fields]:
    header = stream.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
    if len(header) < 2 or len({*header}) < len(header):
        raise UserError(
            f"{path}, line 1 must name the columns, two at least, each once, with tabs between "
            f"them; it reads {header}"
        )
    for number, line in enumerate(stream, start=2):
        if not line.strip() and b"\t" not in line:
            continue
        values = line.decode().rstrip("\r\n").split("\t")
        where = f"{path}, line {number}"
        if len(values) != len(header):
            raise UserError(
                f"{where} has {len(values)} fields where the header names {len(header)} columns: "
                "mend it or delete it"
            )
        yield where, dict(zip(header, values, strict=True))


def _json_fields(path: Path, stream: IO[bytes]) -> Iterator[Fields]:
    return json_objects(path, stream, '{"en": "...", "de": "..."}')


# By suffix, the place and the values by column of each row of an open file.
TABLE_FORMATS: dict[str, Callable[[Path, IO[bytes]], Iterator[Fields]]] = {
    ".tsv": _tsv_fields,
    ".jsonl": _json_fields,
}


def _text(value: Any, key: str, where: str) -> str:
    if value is None:
        return ""
    return require_text(value, key, where, "name the keys that are languages with --columns")
