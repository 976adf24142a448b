"""What docs/translation.md tells people to type and to write."""

import re
import shlex
import sys
from itertools import pairwise

import pytest

from magnetar.data.pairs.folder import open_pairs
from magnetar.engine.config.schema import load_config
from magnetar.launchers import evaluate, prepare_pairs, translate
from tests.data.parallel import verses, write_tsv
from tests.ranks import ROOT

PAGE = (ROOT / "docs" / "translation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("magnetar") and not line.startswith("magnetar verses")
]
PARSERS = {
    "prepare-pairs": prepare_pairs.parse_arguments,
    "translate": translate.parse_arguments,
    "evaluate": evaluate.parse_arguments,
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speech.txt").write_text("The sea is calm.")
    if command[1] != "train":
        PARSERS[command[1]](command[2:])
        return
    config = command[2]
    changes = [value for key, value in pairwise(command) if key == "--set"]
    assert load_config(ROOT / config, changes, 1).data.pairs is not None


def test_every_config_of_the_family_is_named():
    named = {*re.findall(r"mt_\w+\.json", PAGE)}
    assert named == {path.name for path in (ROOT / "ds_configs").glob("mt_*.json")}


def test_the_examples_are_read_and_counted_as_the_page_says(tmp_path, monkeypatch, capsys):
    n_way, long, json_lines, table = (
        next(block for block in BLOCKS if block.startswith(start))
        for start in ("id\ten", "source_language\t", '{"id"', "  table")
    )
    write_tsv(tmp_path / "bulk.tsv", verses(300))
    again = "3\tThe sea is calm.\tDas Meer ist ruhig.\tO mar está muito calmo.\n"
    tables = {"own.tsv": n_way + again, "long.tsv": long, "rows.jsonl": json_lines}
    arguments = ["--vocab-size", "350", "--dedupe", "--workers", "1", "--out", tmp_path / "out"]
    for name, text in tables.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        arguments += ["--table", f"{name.partition('.')[0]}={tmp_path / name}"]
    arguments += ["--table", f"bulk={tmp_path / 'bulk.tsv'}"]
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "argv", ["prepare_pairs", *map(str, arguments)])
    prepare_pairs.main()
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    own = table.splitlines()[-1].split()
    assert [line[:3] + line[4:] for line in shown if line[:1] == ["own"]] == [own[:3] + own[4:]]
    directions = open_pairs(tmp_path / "out").manifest.tables[1:4]
    assert [table.name for table in directions] == ["long.en-de", "long.pt-br-en", "rows"]
