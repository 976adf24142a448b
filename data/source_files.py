"""Files of source text: found, decompressed and decoded; a fault is a message that says where.

Memory holds one block of a compressed file and one line of a `.jsonl`.
"""

import codecs
import glob
import io
import json
import lzma
import shlex
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from magnetar.data.errors import UserError

COMPRESSIONS = {".gz": "gzip -dc", ".xz": "xz -dc", ".zst": "zstd -dc", ".zstd": "zstd -dc"}
BLOCK_BYTES = 1 << 16
MOST_NULS = 1 / 32  # of the bytes of a text
HEAD_BYTES = 4096  # looked at for signs of another kind of file
# What other kinds of file begin with: what they are, and their suffix or what to do with them.
SIGNATURES = {
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"\xfd7zXZ\0": ("compressed with xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", ".zst"),
    b"BZh": ("compressed with bzip2", "decompress it first"),
    b"PK\3\4": ("a zip archive", "unpack it first"),
    b"PAR1": ("a Parquet file", ".parquet"),
    b"%PDF": ("a PDF", "extract its text first"),
}
BYTE_ORDER_MARKS = {  # those of UTF-32 first: one begins like one of UTF-16
    codecs.BOM_UTF32_LE: "utf32",
    codecs.BOM_UTF32_BE: "utf32",
    codecs.BOM_UTF16_LE: "utf16",
    codecs.BOM_UTF16_BE: "utf16",
}
Found = TypeVar("Found")
OnBytes = Callable[[int], None]  # takes the bytes of a file, as stored, read since its last call


def matching_files(patterns: Sequence[str], formats: Collection[str]) -> list[Path]:
    """The files that some globs (or plain names) match, sorted.

    Each file is there once, under one of its names: relative or absolute, links of either kind.

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
    return sorted({same_file(path): path for path in sorted(files, reverse=True)}.values())


def same_file(path: Path) -> tuple[int, int]:
    """What two names of one file have in common."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


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
            stream, position = _decompressed(path, raw), 0
            if ".parquet" not in path.suffixes:
                _require_letters(path, stream)
            for found in parse(stream):
                yield found
                position, before = max(position, raw.tell()), position
                on_bytes(position - before)
            on_bytes(path.stat().st_size - position)
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except EOFError as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    """The decompressed bytes of an open file; its suffix names the compression."""
    if path.suffix not in COMPRESSIONS:
        return raw
    if path.suffix == ".gz":
        frames = _Frames(raw, partial(zlib.decompressobj, wbits=31), zlib.error, b"\0")
    elif path.suffix == ".xz":
        frames = _Frames(raw, lzma.LZMADecompressor, lzma.LZMAError, b"\0")
    else:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path}: reading it needs zstandard: run `pip install zstandard`, or decompress it"
            ) from error
        # The largest window that `zstd --long` can ask for.
        whole = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frames = _Frames(raw, whole.decompressobj, zstandard.ZstdError, b"")
    return io.BufferedReader(frames, 4 * BLOCK_BYTES)


class _Frames(io.RawIOBase):
    """Bytes of a compressed file, frame after frame, with padding behind each.

    The packages' own readers differ in what they say of a file that was cut short, and in what they
    read behind the first frame.
    """

    def __init__(
        self,
        raw: IO[bytes],
        new_frame: Callable[[], Any],
        damage: type[Exception],
        padding: bytes,
    ):
        self._raw, self._new_frame, self._damage = raw, new_frame, damage
        self._padding = padding
        self._input, self._output = b"", memoryview(b"")
        self._frame: Any = new_frame()  # the frame that is being read; None between frames

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
            if self._frame is None:
                self._input = self._input.lstrip(self._padding)
                self._frame = self._new_frame() if self._input else None
                continue
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
        except (ValueError, RecursionError) as error:
            what = "brackets in it are thousands deep"
            if isinstance(error, ValueError):
                what = "a number in it has thousands of digits"
            raise UserError(
                f"{where} is no JSON that can be read: {what}. Mend it or delete it"
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


def _damaged(path: Path, error: EOFError) -> UserError:
    """The error for a file that cannot be decompressed."""
    with path.open("rb") as raw:
        kind = _other_kind(path, raw.read(HEAD_BYTES), is_decompressed=False)
    if "Dictionary" in str(error):
        kind = "compressed with a dictionary: decompress it with zstd -d -D DICTIONARY"
    return UserError(
        f"{path} is damaged or not what its suffix {path.suffix!r} says: {error}. "
        + (f"It is {kind}" if kind else "Make it again, or leave it out")
    )


def _other_kind(path: Path, head: bytes, is_decompressed: bool = True) -> str:
    """The kind of a file whose content begins like this, and a way out; "" for text.

    Args:
        path: the file.
        head: its first bytes.
        is_decompressed: whether they come from behind the compression that the suffix names. Else
            "" also stands for that compression.
    """
    found = next((found for start, found in SIGNATURES.items() if head.startswith(start)), None)
    if found is None:
        return ""
    kind, suffix = found
    inner, outer = path.name, ""
    if path.suffix in COMPRESSIONS:
        inner, outer = path.stem, path.suffix
    if not suffix.startswith("."):
        return f"{kind}: {suffix}"
    if suffix == ".parquet":
        name = Path(inner).stem + suffix + (outer if is_decompressed else "")
    elif outer and is_decompressed:
        return f"{kind} once more: decompress it once"
    else:
        name = inner + suffix
    is_named = name == path.name.removesuffix("d")  # .zstd is another name of .zst
    return "" if is_named else f"{kind}: rename it to {name}"


def _wide_encoding(head: bytes) -> str:
    """The encoding of 16 or 32 bits a letter of a file that begins like this; "" for none.

    ASCII, blanks say, has its NULs on one side of each letter.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    places = [head[i::4].count(0) for i in range(4)]
    if sum(places) <= len(head) * MOST_NULS:
        return ""
    nearly_all = 0.9 * len(head) / 4
    for encoding, two in (("utf32le", places[2:]), ("utf32be", places[:2])):
        if min(two) > nearly_all:
            return encoding
    first, second = places[0] + places[2], places[1] + places[3]
    if max(first, second) < 2 * min(first, second):
        return ""  # NULs anywhere: no text
    return "utf16le" if second > first else "utf16be"


def _conversion(path: Path, *options: str) -> str:
    """A way out: the command that writes a file anew, through iconv with each of some options."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
    start = f"{COMPRESSIONS.get(path.suffix, 'cat')} {shlex.quote(str(path))}"
    steps = [start, *(f"iconv {option}" for option in options)]
    command = f"{' | '.join(steps)} > {shlex.quote(str(path.with_name(f'utf8-{name}')))}"
    return f"`{command}`, and name the new file in place of this one"


def _require_letters(path: Path, stream: io.BufferedReader) -> None:
    """Refuse text of 16 or 32 bits a letter that is valid UTF-8, with a NUL beside every letter."""
    head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
    if head.count(0) <= len(head) * MOST_NULS:
        return
    if kind := _other_kind(path, head):
        raise UserError(f"{path} is not text but {kind}")
    if not head.strip(b"\0"):
        raise UserError(
            f"{path} begins with nothing but NUL bytes, as after a power loss: make it again, or "
            "leave it out"
        )
    encoding = _wide_encoding(head)
    options = [f"-f {encoding} -t utf8"]
    if head.startswith(("\xff\xfe".encode(), "\xfe\xff".encode())):
        options = ["-f utf8 -t latin1", "-f utf16 -t utf8"]  # somebody has taken it for latin1
    elif not encoding:
        raise UserError(f"{path} has NUL bytes among its letters, so it is no text: leave it out")
    raise UserError(
        f"{path} is not UTF-8: it has NUL bytes beside its letters. Convert it with "
        f"{_conversion(path, *options)}"
    )


def _not_utf8(path: Path) -> UserError:
    """The error for a file that is not UTF-8. Reads all of it to find the first bad byte."""
    offset, place, num_bad, num_good = 0, "", 0, 0
    seen: set[int] = set()  # bytes of the lines that are not UTF-8
    with path.open("rb") as raw:
        stream = _decompressed(path, raw)
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        try:
            for number, line in enumerate(stream, start=1):
                try:
                    num_good += not line.decode().isascii()
                except UnicodeDecodeError as error:
                    num_bad += 1
                    byte, at = line[error.start], offset + error.start
                    place = place or f"byte 0x{byte:02x} at offset {at} (line {number})"
                    seen.update(line)
                offset += len(line)
        except EOFError as error:  # the letters are wrong because of the damage behind them
            return _damaged(path, error)
    if kind := _other_kind(path, head):
        return UserError(f"{path} is not text but {kind}")
    if wide := _wide_encoding(head):
        way_out = f"Convert it with {_conversion(path, f'-f {wide} -t utf8')}"
    elif num_good >= num_bad:
        way_out = (
            f"The rest is UTF-8, so mend the {num_bad} lines with such bytes, or leave the bytes "
            f"out with {_conversion(path, '-c -f utf8 -t utf8')}"
        )
    else:
        encoding = "latin1"
        if any(0x80 <= byte < 0xA0 for byte in seen):  # latin1 has no letters there
            encoding = "ENCODING" if seen & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "cp1252"
        way_out = (
            "Convert it from the encoding that it was saved in (iconv -l lists them"
            f"{'' if encoding == 'ENCODING' else f'; {encoding} is Western European'}) with "
            f"{_conversion(path, f'-f {encoding} -t utf8')}"
        )
    return UserError(f"{path} is not UTF-8: {place}. {way_out}")
