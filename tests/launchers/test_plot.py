"""python -m launchers.plot."""

import json
from pathlib import Path

import pytest

from launchers.plot import main

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


def test_several_runs_are_drawn_into_one_picture_that_must_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("deep", "shallow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    runs = [str(tmp_path / "deep"), str(tmp_path / "shallow")]
    with pytest.raises(SystemExit) as ended:
        main(runs)
    assert ended.value.code == 2
    assert "several runs need --out: name the picture" in capsys.readouterr().err
    main([*runs, "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("", "no training record yet")]
)
def test_a_folder_without_records_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
