import json
import lzma

import pytest

from magnetar.data.errors import UserError
from magnetar.data.pairs.tables import read_rows
from tests.data.parallel import LANGUAGES, long_rows, verses, write_jsonl, write_tsv

ROWS = verses(20)


def test_an_n_way_table_is_read_row_by_row(tmp_path):
    path = write_tsv(tmp_path / "t.tsv", ROWS)
    assert [(row.direction, row.texts) for row in read_rows(path)] == [(None, row) for row in ROWS]
    assert [*next(read_rows(path)).names] == ["id", *LANGUAGES]


def test_a_compressed_table_is_read_alike_and_counted_to_its_size(tmp_path):
    path = tmp_path / "t.tsv.xz"
    path.write_bytes(lzma.compress(write_tsv(tmp_path / "t.tsv", ROWS).read_bytes()))
    counted = []
    assert [row.texts for row in read_rows(path, None, counted.append)] == ROWS
    assert sum(counted) == path.stat().st_size


def test_json_lines_are_read_alike(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"id": 3, **row} for row in ROWS])
    assert [row.texts for row in read_rows(path)] == ROWS


def test_a_missing_key_and_a_null_are_missing_sides(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"en": "sea", "de": null}\n\n{"de": "See"}\n')
    assert [row.texts for row in read_rows(path)] == [{"en": "sea", "de": ""}, {"de": "See"}]


def test_a_long_table_says_the_direction_of_each_row(tmp_path):
    rows = long_rows(ROWS[:3], "en", "pt-br")
    names = ("en", "pt-br")
    expected = [(names, {name: row[name] for name in names}, names) for row in ROWS[:3]]
    assert [*read_rows(write_jsonl(tmp_path / "t.jsonl", rows))] == expected
    lines = ["\t".join(row.values()) for row in rows]
    (tmp_path / "t.tsv").write_text("\n".join(["\t".join(rows[0]), *lines]))
    assert [*read_rows(tmp_path / "t.tsv")] == expected


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    path = write_tsv(tmp_path / "t.tsv", ROWS)
    assert {*next(read_rows(path, ["en", "de"])).texts} == {"en", "de"}
    path = write_jsonl(tmp_path / "t.jsonl", [{"score": 0.5, **row} for row in ROWS])
    assert {*next(read_rows(path, ["en", "de"])).texts} == {"en", "de"}
    both = long_rows(ROWS, "en", "de") + long_rows(ROWS, "en", "pt-br")
    path = write_jsonl(tmp_path / "long.jsonl", both)
    found = [*read_rows(path, ["en", "de"])]
    assert {row.direction for row in found if row.texts} == {("en", "de")}
    assert {row.names for row in found if not row.texts} == {("en", "pt-br")}


def test_id_is_a_language_where_it_is_asked_for_and_in_long_tables(tmp_path):
    path = write_tsv(tmp_path / "t.tsv", ROWS)
    assert next(read_rows(path, ["en", "id"])).texts == {"id": "0", "en": ROWS[0]["en"]}
    rows = long_rows([{"en": "sea", "id": "laut"}], "en", "id")
    path = write_jsonl(tmp_path / "long.jsonl", [{"id": 7, **rows[0]}])
    for columns in (None, ["en", "id"]):
        assert next(read_rows(path, columns)).texts == {"en": "sea", "id": "laut"}


def test_a_column_called_source_may_stand_beside_languages_that_are_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"source": "web", **ROWS[0]}])
    assert {*next(read_rows(path, ["en", "de"])).texts} == {"en", "de"}
    with pytest.raises(UserError, match=r"line 1 lacks 'source_language': a long table has"):
        [*read_rows(path)]


def test_blank_lines_are_nothing(tmp_path):
    for name, lines in {
        "t.tsv": ["en\tde", "", "sea\tSee", "  "],
        "t.jsonl": ['{"en": "sea", "de": "See"}', ""],
    }.items():
        (tmp_path / name).write_text("\n".join([*lines, ""]))
        found = [row.texts for row in read_rows(tmp_path / name)]
        assert found == [{"en": "sea", "de": "See"}]


def test_quotes_windows_line_ends_and_a_byte_order_mark_are_no_trouble(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes('\ufeffen\tde\r\n"sea\t\\n See\u2028"\r\n'.encode())
    assert [row.texts for row in read_rows(path)] == [{"en": '"sea', "de": '\\n See\u2028"'}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", b"en\tde\nsea\n", r"t\.tsv, line 2 has 1 fields where the header names 2"),
        ("t.tsv", b"en\tde\na\tb\tc\n", r"t\.tsv, line 2 has 3 fields where the header names 2"),
        ("t.tsv", b"en\tde\na\tb\n \t\n", r"t\.tsv, line 3: every side is empty: delete the row"),
        ("t.tsv", b"id\ten\tde\n7\t\t\n", r"t\.tsv, line 2: every side is empty"),
        ("t.tsv", b"en\n", r"t\.tsv, line 1 must name the columns, two at least"),
        ("t.tsv", b"", r"t\.tsv, line 1 must name the columns"),
        ("t.tsv", b"en\ten\nsea\tsee\n", r"t\.tsv, line 1 must name the columns.*each once"),
        ("t.tsv", b"en\tde\na\tb\n\xff\tb\n", r"t\.tsv is not UTF-8: byte 0xff.*\(line 3\)"),
        ("t.tsv", b"en\tv/o\na\tb\n", r"line 2: 'v/o' cannot be the name of a lang.*--columns"),
        ("t.csv", b"en,de\n", r"t\.csv: cannot tell the format.*one of \.tsv, \.jsonl"),
        ("t.jsonl", b'{"en": \n', r"t\.jsonl, line 1, column \d+ is not JSON"),
        ("t.jsonl", b"[1]\n", r't\.jsonl, line 1 must be an object like \{"en"'),
        ("t.jsonl", b'{"en": 3}\n', r"line 1: 'en' holds int, but must hold text: mend it"),
        ("t.jsonl", b'{"en": "\\ud800"}\n', r"line 1: 'en' holds half a surrogate pair"),
        ("t.jsonl", b'{"en": "", "de": " "}\n', r"t\.jsonl, line 1: every side is empty"),
        ("t.jsonl", b'{"en": "\xff"}\n', r"t\.jsonl is not UTF-8: byte 0xff.*\(line 1\)"),
        ("t.jsonl", b'{"en": "a", "de": "b", "en": "c"}\n', r"line 1 has the key 'en' twice: keep"),
        (
            "t.tsv",
            b"source_language\ttarget_language\tsource\ttgt\nen\tde\tsea\tSee\n",
            r"line 2 lacks 'target': a long table has source_language, .* has .*'tgt'. Add or ren",
        ),
        (
            "t.jsonl",
            b'{"source_language": "en", "target_language": "de", "source": "sea"}\n',
            r"line 1 lacks 'target': a long table has source_language, target_language, source, t",
        ),
        (
            "t.jsonl",
            json.dumps(long_rows([{"en": "a"}], "en", "en")[0]).encode(),
            r"line 1: source_language and target_language are both 'en', but must differ",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        [*read_rows(path)]
