"""Files of source text: found, decompressed and decoded; a fault is a message that says where.

Memory holds one block of a compressed file and one line of a `.jsonl`.
"""

import glob
import io
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from magnetar.data.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst", ".zstd")
BLOCK_BYTES = 1 << 16
Found = TypeVar("Found")
OnBytes = Callable[[int], None]  # takes the bytes of a file, as stored, read since its last call


def matching_files(patterns: Sequence[str], formats: Collection[str]) -> list[Path]:
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


def file_format(path: Path, formats: Collection[str]) -> str:
    """The suffix of a file without its compression, one of the formats.

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


def read_source(
    path: Path, parse: Callable[[IO[bytes]], Iterator[Found]], on_bytes: OnBytes
) -> Iterator[Found]:
    """What a parser finds in a file.

    Args:
        path: the file.
        parse: function of the decompressed bytes.
        on_bytes: function that is called with the bytes read since its last call.

    Raises:
        UserError: if the file is damaged or not UTF-8, or the system refuses to read it.
    """
    try:
        with path.open("rb") as raw:
            position = 0
            for found in parse(_decompressed(path, raw)):
                yield found
                position, before = max(position, raw.tell()), position
                on_bytes(position - before)
            on_bytes(path.stat().st_size - position)
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged or not what its suffix {path.suffix!r} says: {error}. Make it "
            "again, or leave it out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """The decompressed bytes of an open file; its suffix names the compression."""
    if path.suffix not in COMPRESSIONS:
        return raw
    damage: type[Exception] = EOFError
    if path.suffix == ".gz":
        new_frame: Callable[[], Any] = partial(zlib.decompressobj, wbits=31)
    elif path.suffix == ".xz":
        new_frame = lzma.LZMADecompressor
    else:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path}: reading it needs zstandard: run `pip install zstandard`, or decompress it"
            ) from error
        new_frame, damage = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    return io.BufferedReader(_Frames(raw, new_frame, damage), 4 * BLOCK_BYTES)


class _Frames(io.RawIOBase):
    """Bytes of a compressed file, frame after frame.

    The packages' own readers differ in what they say of a file that was cut short, and in what they
    read behind the first frame.
    """

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any], damage: type[Exception]):
        self._raw, self._new_frame, self._damage = raw, new_frame, damage
        self._input, self._output = b"", memoryview(b"")
        self._frame: Any = None  # the frame that is being read; None between frames

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer as far as one step of decompression goes; 0 at the end."""
        while not self._output:
            self._input = self._input or self._raw.read(BLOCK_BYTES)
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


def json_objects(
    path: Path, stream: IO[bytes], example: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object of each line that is not blank, and its place in the file.

    Args:
        path: the file, for messages.
        stream: its decompressed bytes.
        example: an object as it should be.
    """
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
            raise UserError(f"{where} must be an object like {example}")
        yield where, row


def _object(where: str, items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{where} has the key {twice!r} twice: keep one of them")
    return found


def require_text(value: Any, key: str, where: str, way_out: str) -> str:
    """The value of a key, which must be text that can be encoded.

    Args:
        value: the value.
        key: the key.
        where: its file and line.
        way_out: what to do beside mending it.

    Raises:
        UserError: if it is none.
    """
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {key!r} holds {type(value).__name__}, but must hold text: mend it, or "
            f"{way_out}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key!r} holds half a surrogate pair ({value[error.start]!a}), which is not "
            "text: mend it"
        ) from error
    return value


def _not_utf8(path: Path) -> UserError:
    """The error for a file that is not UTF-8. Reads it line by line to name the first bad byte."""
    offset = 0
    with path.open("rb") as raw:
        for number, line in enumerate(_decompressed(path, raw), start=1):
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
