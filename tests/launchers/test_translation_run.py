"""A run of sentence pairs through every command that translates."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import sacrebleu

from magnetar.data.pairs.folder import PreparedPairs
from magnetar.launchers import convert, evaluate, translate
from tests.data.parallel import prepared_verses, verses
from tests.launchers.conftest import refusal
from tests.runs import launch, write_config

CHANGES = {
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": 2,
    "magnetar.model.architecture": "encoder_decoder",
    "magnetar.model.share_embeddings": True,
    "magnetar.model.max_seq_len": 48,
    "magnetar.data.seq_len": 48,
    "magnetar.data.pairs": {"bin_tokens": 512, "temperature": 2.0},
    "magnetar.training.eval_translations": 3,
    "magnetar.training.num_steps": 8,
}


class Run(NamedTuple):
    folder: Path
    prepared: PreparedPairs
    text: Path  # English, a sentence a line

    def lines(self, path: Path, out: Path, *more: object) -> list[str]:
        options = (self.text, "--from", "en", "--to", "de", "--out", out, "--max-len", 9, *more)
        out.unlink(missing_ok=True)  # the command refuses to write over it
        translate.main([str(part) for part in (path, *options)])
        return out.read_text().splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks that share the experts, eight steps."""
    folder = tmp_path_factory.mktemp("translation")
    prepared = prepared_verses(folder, num_train=120)
    done = launch(write_config(folder, prepared.path, changes=CHANGES))
    assert done.returncode == 0, done.stdout
    text = folder / "text.en"
    text.write_text("".join(row["en"] + "\n" for row in verses(6, seed=5)))
    return Run(folder / "run", prepared, text)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--beam", 1), ("--beam", 4), ("--sample",)], ids=str)
def test_reshaped_exported_and_imported_runs_translate_alike(
    run: Run, more: tuple, tmp_path: Path
) -> None:
    one_rank, exported, imported = (tmp_path / name for name in ("ep_1", "exported", "imported"))
    ranks = ("--world-size", "1", "--ep-size", "1")
    convert.main(["reshard", str(run.folder), "--out", str(one_rank), *ranks])
    convert.main(["export", str(run.folder), "--out", str(exported)])
    convert.main(["import", str(exported), "--out", str(imported)])
    expected = run.lines(run.folder, tmp_path / "lines", *more)
    assert len(expected) == 6
    assert any(expected)
    for folder in (one_rank, exported, imported):
        assert run.lines(folder, tmp_path / "lines", *more) == expected, folder.name


@pytest.mark.slow
def test_the_prepared_folder_is_not_needed(run: Run, tmp_path: Path) -> None:
    expected = run.lines(run.folder, tmp_path / "lines")
    away = run.prepared.path.with_name("away")
    run.prepared.path.rename(away)
    try:
        assert run.lines(run.folder, tmp_path / "lines") == expected
    finally:
        away.rename(run.prepared.path)


@pytest.mark.slow
def test_evaluate_finds_what_the_end_of_training_found(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(run.folder), "--max-sentences", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run.folder / "summary.json").read_text())["translations"]
    assert found["directions"].keys() == summary["directions"].keys()
    for direction, scores in summary["directions"].items():
        assert found["directions"][direction] == pytest.approx(scores)
    assert found["bleu_signatures"] == summary["bleu_signatures"]
    assert (found["step"], found["data"]) == (8, str(run.prepared.path))
    assert (found["split"], found["sample"]) == ("valid", summary["sample"])
    assert json.loads((run.folder / "evaluation.json").read_text()) == found


@pytest.mark.slow
def test_anyone_can_score_what_evaluate_writes(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--directions", "en-de", "--beam", "1", "--json"]
    texts = tmp_path / "texts"
    evaluate.main([str(run.folder), *options, "--write-translations", str(texts)])
    found = json.loads(capsys.readouterr().out)
    sides = [
        (texts / f"en-de.{name}.txt").read_text().splitlines()
        for name in ("translations", "references")
    ]
    assert len(sides[0]) == found["directions"]["en-de"]["sentences"]
    chrf = sacrebleu.corpus_chrf(sides[0], [sides[1]]).score
    assert found["chrf"] == pytest.approx(chrf)
    message = refusal(capsys, evaluate.main, run.folder, "--write-translations", texts)
    assert f"--write-translations {texts} exists: name a folder that does not" in message


@pytest.mark.slow
def test_the_table_has_the_directions_that_are_asked_for(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--directions", "en-pt-br", "de-en", "--max-sentences", "2", "--beam", "1")
    evaluate.main([str(run.folder), *options])
    out = capsys.readouterr().out
    assert "en -> pt-br" in out
    assert "de -> en" in out
    assert "en -> de" not in out
    assert "BLEU  nrefs:1|case:mixed" in out
    assert "chrF  nrefs:1|case:mixed" in out
    assert "beam 1, length penalty 1" in out


@pytest.mark.slow
def test_what_does_not_fit_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, evaluate.main, run.folder, "--sequences", 3)
    assert f"--sequences says nothing about {run.folder}, which translates: leave it out" in message
    message = refusal(capsys, evaluate.main, run.folder, "--directions", "en-fr")
    assert "direction 'en-fr' is not SOURCE-TARGET of two languages" in message
    other = prepared_verses(tmp_path, num_train=40).path
    for main, more in ((evaluate.main, ()), (translate.main, ("--from", "en", "--to", "de"))):
        message = refusal(capsys, main, run.folder, *more, "--data", other)
        assert "another vocabulary" in message
        assert f"than {run.folder} was trained with" in message
    copied = tmp_path / "copied"
    shutil.copytree(run.folder, copied)
    (copied / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    message = refusal(capsys, translate.main, copied, "--from", "en", "--to", "de")
    assert f"{copied / 'tokenizer.model'} is another vocabulary" in message


@pytest.mark.slow
def test_evaluate_refuses_options_of_translation_for_text(
    trained, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--directions", "en-de"), ("--beam", 2), ("--max-sentences", 2)):
        message = refusal(capsys, evaluate.main, trained.folder, option, value)
        assert f"{option} says nothing about {trained.folder}, which does not translate" in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--write-translations", "tests"), "--write-translations tests exists: name a folder"),
        (("--beam", 0), "--beam 0 must be at least 1"),
        (("--max-sentences", 0), "--max-sentences 0 must be at least 1"),
        (("--length-penalty", "-0.5"), "--length-penalty -0.5 must be 0 to 10"),
    ],
)
def test_evaluates_own_options_are_checked(
    option: tuple, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, evaluate.main, "runs/any", *option)
