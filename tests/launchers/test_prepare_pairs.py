import re
import sys

import pytest

from magnetar.data.errors import UserError
from magnetar.data.pairs.filters import PairFilter
from magnetar.data.pairs.folder import open_pairs
from magnetar.launchers.prepare_pairs import main, parse_arguments
from tests.data.parallel import long_rows, verses, write_jsonl, write_tsv


@pytest.fixture
def train_file(tmp_path):
    return write_tsv(tmp_path / "train.tsv", [*verses(100), *verses(3)])


@pytest.fixture
def valid_file(tmp_path):
    return write_tsv(tmp_path / "valid.tsv", verses(10, seed=1))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_pairs", *map(str, arguments)])
    main()


def test_the_command_prints_what_the_folder_holds(
    tmp_path, train_file, valid_file, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "140")
    rows = long_rows(verses(20, seed=2), "en", "de") + long_rows(verses(9, seed=3), "en", "pt-br")
    other = write_jsonl(tmp_path / "help.jsonl", rows)
    arguments = ["--table", f"verses={train_file},{valid_file}", "--table", f"help={other}"]
    arguments += ["--vocab-size", 320, "--dedupe", "--workers", 1, "--out", tmp_path / "out"]
    run(monkeypatch, *arguments)
    output = capsys.readouterr()
    tables = open_pairs(tmp_path / "out").manifest.tables
    num_tokens = sum(column.num_tokens for column in tables[0].splits["train"].columns.values())
    shown = [" ".join(line.split()) for line in output.out.splitlines()]
    assert f"verses train 103 {num_tokens:,} 6 600 duplicate 18" in shown  # 6 * 103
    assert re.search(r"^verses valid 10 \d+ 6 60 none$", "\n".join(shown), re.MULTILINE)
    assert re.search(r"^help train 29 [\d,]+ 2 29 none$", "\n".join(shown), re.MULTILINE)
    assert "languages: en, de, pt-br" in shown
    assert "vocabulary: 320 entries, tokenizer.model" in shown
    assert f"written: {tmp_path / 'out'}" in shown
    run(monkeypatch, *arguments)
    again = capsys.readouterr()
    assert again.out == output.out.replace("written: ", "up to date: ")
    assert "is up to date" in again.err


def test_every_option_reaches_the_config():
    given = (
        "--table a=a.tsv,v.tsv --table b=,b.jsonl --columns en,de --columns b=en,pt-br "
        "--weight a=2 --directions en-de,de-en --dedupe --max-length-ratio 3 --max-length 99 "
        "--vocab-size 500 --vocab-temperature 2 --workers 3 --out x"
    )
    config = parse_arguments(given.split())
    first, second = config.tables
    assert (first.name, first.train, first.valid) == ("a", "a.tsv", "v.tsv")
    assert (second.name, second.train, second.valid) == ("b", "", "b.jsonl")
    assert (first.columns, second.columns) == (("en", "de"), ("en", "pt-br"))
    assert (first.weight, second.weight) == (2, 1)
    assert config.directions == ("en-de", "de-en")
    assert config.filter == PairFilter(True, 3, 99)
    assert (config.vocab_size, config.vocab_temperature, config.workers) == (500, 2, 3)
    assert parse_arguments(["--table", "a=t.tsv", "--out", "x"]).directions is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--table a.tsv", r"--table a\.tsv is not NAME=TRAIN,VALID: use bible=train\.tsv"),
        ("--table a=x,y,z", r"--table a=x,y,z is not NAME=TRAIN,VALID"),
        ("--table a=x --weight b=2", r"--weight b: no --table has this name, only a"),
        ("--table a=x --columns b=en,de", r"--columns b: no --table has this name, only a"),
        ("--table a=x --weight a=two", r"--weight a=two is not NAME=NUMBER: use bible=2"),
    ],
)
def test_a_malformed_option_is_a_message(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_arguments([*arguments.split(), "--out", "x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id\ten\tde\n1\t\xff\tSee\n", "error: {file} is not UTF-8: byte 0xff"),
        (b"id\ten\tde\n1\t\t\n", "error: {file}, line 2: every side is empty"),
        (b"id\ten\tde\n1\tsea\n", "error: {file}, line 2 has 2 fields where the header names 3"),
    ],
)
def test_bad_text_is_one_line_and_status_2_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, content, message
):
    file = tmp_path / "t.tsv"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--table", f"t={file}", "--vocab-size", 300, "--out", tmp_path / "out")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message.format(file=file))
    assert [*tmp_path.iterdir()] == [file]
