"""Rows of parallel text: tab-separated tables and JSON lines.

n-way    one column (or key) a language, and perhaps an `id`; any cell may be empty, and a JSON row
         may lack a key
long     the columns (or keys) source_language, target_language, source, target

A table starts with a header. Fields are taken as they stand: quotes and backslashes mean nothing.
One row is held in memory at a time.
"""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from data.codec import LANGUAGE
from data.corpus import decompressed, file_format, not_utf8, readable
from data.errors import UserError

TABLE_FORMATS = (".tsv", ".jsonl")
LONG_COLUMNS = ("source_language", "target_language", "source", "target")
ID_COLUMN = "id"


class Row(NamedTuple):
    """One text in several languages.

    Attributes:
        direction: source and target language of a row of a long table; None in an n-way one.
        texts: by language; "" where there is none.
    """

    direction: tuple[str, str] | None
    texts: dict[str, str]


def read_rows(
    path: Path,
    columns: Collection[str] | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        path: `.tsv` or `.jsonl`, plain or compressed as in data.corpus.
        columns: the languages to read; None: all.
        on_bytes: called with the bytes of the file (as stored) read since its last call.

    Raises:
        UserError: the file is not UTF-8 or damaged, or a row is malformed or wholly empty.
    """
    read_fields = _json_fields if file_format(path, TABLE_FORMATS) == ".jsonl" else _tsv_fields
    try:
        with readable(path), path.open("rb") as raw:
            position = 0
            for where, fields in read_fields(path, decompressed(path, raw), columns):
                row = _row(where, fields, columns)
                if row is not None:
                    yield row
                position, before = max(position, raw.tell()), position
                on_bytes(position - before)
            on_bytes(path.stat().st_size - position)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def _row(where: str, fields: dict[str, str], columns: Collection[str] | None) -> Row | None:
    """One row; None if it is in languages that nobody asked for."""
    direction = None
    if fields.keys() >= {*LONG_COLUMNS}:
        source, target = direction = fields["source_language"], fields["target_language"]
        if source == target:
            raise UserError(f"{where}: source_language and target_language are both {source!r}")
        fields = {source: fields["source"], target: fields["target"]}
    if not any(fields[column].strip() for column in fields if column != ID_COLUMN):
        raise UserError(f"{where}: every side is empty: delete the row, or fill it")
    texts = {
        language: text
        for language, text in fields.items()
        if language != ID_COLUMN and (columns is None or language in columns)
    }
    for language in texts:
        _check_name(language, where)
    if direction is not None and len(texts) < 2:
        return None
    return Row(direction, texts)


def _check_name(language: str, where: str) -> None:
    if not LANGUAGE.fullmatch(language):
        raise UserError(
            f"{where}: {language!r} cannot be the name of a language (letters, digits and hyphens)"
            ": rename it, or name the columns that are languages with --columns"
        )


def _tsv_fields(
    path: Path, stream: IO[bytes], columns: Collection[str] | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """The fields of each row by column, and where it stands."""
    del columns
    header = stream.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
    if len(header) < 2 or len({*header}) < len(header):
        raise UserError(
            f"{path}, line 1 must name the columns, two at least, each once, with tabs between "
            f"them; it reads {header}"
        )
    for number, line in enumerate(stream, start=2):
        values = line.decode().rstrip("\r\n").split("\t")
        where = f"{path}, line {number}"
        if len(values) != len(header):
            raise UserError(
                f"{where} has {len(values)} fields where the header names {len(header)} columns: "
                "mend it or delete it"
            )
        yield where, dict(zip(header, values, strict=True))


def _json_fields(
    path: Path, stream: IO[bytes], columns: Collection[str] | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """The texts of each row by key, and where it stands; empty lines are nothing."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}, column {error.colno} is not JSON: {error.msg}. Each line must be one "
                "object; mend it or delete it"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f'{where} must be an object like {{"en": "...", "de": "..."}}')
        yield where, {key: _text(value, key, where, columns) for key, value in row.items()}


def _text(value: object, key: str, where: str, columns: Collection[str] | None) -> str:
    if value is None:
        return ""
    is_asked = columns is None or key in columns or key in LONG_COLUMNS
    if key == ID_COLUMN or not is_asked:
        return str(value)
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
