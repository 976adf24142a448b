"""magnetar evaluate."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from magnetar.data.text.prepare import PrepareConfig, prepare
from magnetar.data.text.token_files import open_prepared
from magnetar.launchers.evaluate import _keep, main
from tests.launchers.conftest import refusal
from tests.ranks import ROOT
from tests.runs import rewrite_manifest

# Float32 sums of other batches, and of one process or two: 64 terms in each of two layers' products
# round by 128 * 2^-24 = 8e-6 at worst.
OTHER_ORDER = 1e-5


def evaluation(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    main([*(str(argument) for argument in arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_one_process_finds_the_loss_that_two_expert_parallel_ranks_found(
    trained, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluation(capsys, trained.folder, "--batch-size", batch_size)
    expected = trained.summary["validation_after"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(expected[name], rel=OTHER_ORDER), name
    assert found["num_tokens"] == expected["num_tokens"]
    assert found["unigram_perplexity"] == trained.summary["unigram_perplexity"]
    assert found["step"] == 8
    assert json.loads((trained.folder / "evaluation.json").read_text()) == found


@pytest.mark.slow
def test_an_older_checkpoint_has_the_loss_that_it_had_then(
    trained, capsys: pytest.CaptureFixture[str]
) -> None:
    records = map(json.loads, (trained.folder / "metrics.jsonl").read_text().splitlines())
    then = next(r["valid_loss"] for r in records if r["step"] == 4 and "valid_loss" in r)
    found = evaluation(capsys, trained.folder, "--checkpoint", "step_00000004")
    assert found["loss"] == pytest.approx(then, rel=OTHER_ORDER)


@pytest.mark.slow
def test_sequences_limits_what_is_read(trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation(capsys, trained.folder, "--sequences", 3)["num_tokens"] == 3 * 32


@pytest.mark.slow
def test_the_table_shows_the_checkpoint_below_the_unigram_model(
    trained, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(trained.folder)])
    out = capsys.readouterr().out
    assert out.index("unigram model") < out.index("step_00000008")
    assert f"{trained.summary['validation_after']['perplexity']:,.2f}" in out


@pytest.mark.slow
def test_a_folder_of_another_kind_of_vocabulary_is_told_the_file_of_the_run(
    trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, tokenizer = tmp_path / "other", tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a b"], vocab_size=260, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    speeches = str(trained.corpus.parent / "speech_3*.txt")
    (tmp_path / "text.txt").write_text("a b")
    prepare(
        PrepareConfig(
            out=other,
            train=(str(tmp_path / "text.txt"),),
            valid=(speeches,),
            tokenizer=tmp_path / "tokenizer.json",
        )
    )
    message = refusal(capsys, main, trained.folder, "--data", other)
    assert f"{other} was made with another vocabulary" in message
    assert f"with --tokenizer and {trained.corpus / 'tokenizer.model'}" in message


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "other data"])
def test_a_vocabulary_that_is_gone_is_described(
    left: str, trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, own = tmp_path / "run", tmp_path / "own"
    shutil.copytree(trained.folder, run)
    for file in run.glob("checkpoints/*/manifest.json"):
        rewrite_manifest(file, str(trained.corpus), str(own))
    given: tuple[object, ...] = ()
    other, text = tmp_path / "other", tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number} and {7 * number}" for number in range(2000)))
    speeches = str(trained.corpus.parent / "speech_3*.txt")
    prepare(PrepareConfig(out=other, train=(str(text),), valid=(speeches,), vocab_size=310))
    if left == "other data":
        other.rename(own)
    else:
        given = ("--data", other)
    message = refusal(capsys, main, run, *given)
    assert "with --tokenizer and the vocabulary that the run was trained with" in message


@pytest.mark.slow
def test_an_unknown_checkpoint_is_refused_with_those_that_exist(
    trained, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, main, trained.folder, "--checkpoint", "step_00000005")
    assert "use step_00000004 or step_00000008" in message


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_with_one_that_is_complete(
    trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder, run)
    file = run / "checkpoints/step_00000008/rank_00001.safetensors"
    file.write_bytes(b"cut short")
    message = refusal(capsys, main, run)
    assert f"{file} has 9 bytes where" in message
    assert f"the newest complete one is {run / 'checkpoints/step_00000004'}" in message
    assert evaluation(capsys, run, "--checkpoint", "step_00000004")["step"] == 4


def test_a_missing_run_is_refused_with_those_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "train one first" in refusal(capsys, main, tmp_path / "mine")
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours/config.json").write_text("{}")
    message = refusal(capsys, main, tmp_path / "mine")
    assert f"run folder {tmp_path / 'mine'} does not exist: {tmp_path} holds yours" in message
    for number in range(1, 8):
        (tmp_path / f"run_{number}").mkdir()
        (tmp_path / f"run_{number}/config.json").write_text("{}")
    message = refusal(capsys, main, tmp_path / "mine")
    assert f"{tmp_path} holds run_1, run_2, run_3, run_4, run_5, ... (8 runs)" in message


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt", "the"]], ids=str)
def test_a_run_without_a_checkpoint_is_refused_in_a_line(
    command: list[str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", f"magnetar.launchers.{command[0]}", str(tmp_path), *command[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}: holds no complete checkpoint")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--batch-size", "--sequences"])
def test_counts_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{option} 0 must be at least 1" in refusal(capsys, main, "runs/any", option, 0)


@pytest.mark.slow
def test_bits_per_byte_of_a_few_sequences_counts_the_bytes_of_their_text(
    trained, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluation(capsys, trained.folder, "--sequences", 3)
    prepared = open_prepared(trained.corpus)
    predicted = prepared.valid.tokens[1 : 1 + 3 * 32].tolist()
    text = "".join(
        prepared.tokenizer.decode([token])
        for token in predicted
        if token != prepared.tokenizer.eos_id
    )
    expected = found["loss"] * 96 / math.log(2) / len(text.encode())
    assert found["num_tokens"] == 96
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-12)  # float64 alone


@pytest.mark.slow
def test_data_that_is_gone_and_a_config_of_another_version_are_described(
    trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(trained.folder, run)
    manifests = list(run.glob("checkpoints/*/manifest.json"))
    for file in manifests:
        rewrite_manifest(file, str(trained.corpus), str(gone))
    message = refusal(capsys, main, run)
    assert f"prepared folder {gone}" in message
    assert "copy the folder back" in message
    for file in manifests:
        rewrite_manifest(file, '"d_ff"', '"d_of_tomorrow"')
    message = refusal(capsys, main, run)
    assert "not one that this version can read" in message
    assert "d_of_tomorrow" in message


def test_an_answer_that_cannot_be_kept_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json.partial").mkdir()
    _keep({"loss": 1.0}, tmp_path / "evaluation.json")
    shown = capsys.readouterr().err
    assert f"warning: {tmp_path / 'evaluation.json'} is not written (" in shown
