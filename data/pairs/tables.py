"""Rows of parallel text: tab-separated tables and JSON lines.

n-way    one column (or key) a language; any cell may be empty, and a JSON row may lack a key
long     the columns (or keys) source_language, target_language, source, target; others are ignored

A table starts with a header. Fields are taken literally: quotes and backslashes have no meaning.
Blank lines are skipped. In an n-way table `id` is the name of a row, and the language Indonesian
only if it is named explicitly. Memory holds one row at a time.
"""

import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import LANGUAGE
from magnetar.data.text.corpus import decompressed, file_format, not_utf8, readable

TABLE_FORMATS = (".tsv", ".jsonl")
LONG_COLUMNS = ("source_language", "target_language", "source", "target")
ID_COLUMN = "id"


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
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        path: `.tsv` or `.jsonl`, plain or compressed as in data.text.corpus.
        columns: the languages to read; None: all.
        on_bytes: function that is called with the bytes of the file (as stored) read since its last
            call.

    Raises:
        UserError: if the file is not UTF-8 or damaged, or a row is malformed, wholly empty, or has
            only some of a long table's columns.
    """
    read_fields = _json_fields if file_format(path, TABLE_FORMATS) == ".jsonl" else _tsv_fields
    try:
        with readable(path), path.open("rb") as raw:
            position = 0
            for where, fields in read_fields(path, decompressed(path, raw)):
                yield _row(where, fields, columns)
                position, before = max(position, raw.tell()), position
                on_bytes(position - before)
            on_bytes(path.stat().st_size - position)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


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


def _tsv_fields(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of each row by column, and its place in the file."""
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


def _json_fields(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The values of each row by key, and its place in the file."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        try:
            row = json.loads(text, object_pairs_hook=partial(_object, where))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}, column {error.colno} is not JSON: {error.msg}. Each line must be one "
                "object; mend it or delete it"
            ) from error
        except UserError:
            raise
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 9,000 brackets
            raise UserError(
                f"{where} is no JSON that can be read: {error}. Mend it or delete it"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f'{where} must be an object like {{"en": "...", "de": "..."}}')
        yield where, row


def _object(where: str, items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{where} has the key {twice!r} twice: keep one of them")
    return found


def _text(value: Any, key: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {key!r} holds {type(value).__name__}, but must hold text: mend it, or "
            "name the keys that are languages with --columns"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key!r} holds half a surrogate pair ({value[error.start]!a}), which is not "
            "text: mend it"
        ) from error
    return value
