"""magnetar plot."""

import json
import sys
from pathlib import Path

import matplotlib
import pytest

from magnetar.launchers.plot import main
from tests.launchers.conftest import refusal

RECORD = {"step": 1, "loss": 5.0, "grad_norm": 0.4}
ROUTING = {"layer_2/routing_entropy": 1.9, "layer_2/load_max": 1.5, "layer_2/load_min": 0.5}
PNG = b"\x89PNG"


@pytest.mark.parametrize("routing", [{}, ROUTING], ids=["dense", "sparse"])
def test_a_run_that_still_trains_is_drawn(
    routing: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"step": 0, "valid_loss": 6.0}, RECORD | routing, RECORD | routing | {"step": 2}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    main([str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert f"wrote {tmp_path / 'curves.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [b"\0\0\0", b"\xff\xfe", b"null", b"{}", b"[" * 9_999, b"9" * 5_000]
)
def test_a_line_that_is_no_record_is_left_out_of_the_picture_with_a_word(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [RECORD | ROUTING, {"step": 2, "loss": None}, {"step": 3, "valid_loss": 4.0}]
    lines = [*(json.dumps(record).encode() for record in records), line, b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    main([str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    words = f"warning: {tmp_path / 'metrics.jsonl'}: line 4 is no record and is left out"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "key"), [("config.json", "gradient_clipping"), ("summary.json", "unigram_perplexity")]
)
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"KEY": "0"}', '{"KEY": NaN}', "[" * 90_000])
def test_a_damaged_file_costs_its_line_of_the_picture_alone(
    name: str, key: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / name).write_text(content.replace("KEY", key))
    main([str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    words = f"warning: {tmp_path / name} has no {key}, so its line is not drawn"
    assert words in capsys.readouterr().err


def test_a_suffix_of_no_picture_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    message = refusal(capsys, main, tmp_path, "--out", tmp_path / "curves.txt")
    assert "curves.txt: no picture is called .txt: use " in message
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    for name in ("curves.PDF", "curves"):  # a way out, and PNG is the usual one
        main([str(tmp_path), "--out", str(tmp_path / name)])
    assert (tmp_path / "curves").read_bytes().startswith(PNG)
    assert (tmp_path / "curves.PDF").read_bytes().startswith(b"%PDF")


def test_several_runs_are_drawn_into_one_picture_that_must_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("deep", "shallow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    runs = [str(tmp_path / "deep"), str(tmp_path / "shallow")]
    assert "several runs need --out: name the picture" in refusal(capsys, main, *runs)
    main([*runs, "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("num_runs", [1, 2])
@pytest.mark.parametrize("translates", [False, True])
def test_bleu_is_drawn_of_runs_that_translate(
    num_runs: int, translates: bool, tmp_path: Path
) -> None:
    valid = {"step": 1, "valid_loss": 5.5} | ({"valid_bleu": 3.0} if translates else {})
    runs = [tmp_path / str(index) for index in range(num_runs)]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text(f"{json.dumps(RECORD)}\n{json.dumps(valid)}\n")
    picture = tmp_path / "curves.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        main([*map(str, runs), "--out", str(picture)])
    assert ("greedy BLEU of the validation sample" in picture.read_text()) == translates


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("", "no training record yet")]
)
def test_a_folder_without_records_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert message in refusal(capsys, main, tmp_path)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(RECORD)}\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refusal(capsys, main, tmp_path)
    assert "run pip install 'magnetar[plot]' or pip install matplotlib" in message
