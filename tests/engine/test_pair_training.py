"""Runs on sentence pairs: any layout, resumed exactly, with losses that a loop finds too."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from magnetar.convert.export import export
from magnetar.data.errors import UserError
from magnetar.data.loader import PairData, open_data
from magnetar.data.pairs.folder import PreparedPairs, open_pairs
from magnetar.data.text.packed_lm import IGNORE_INDEX
from magnetar.engine.checkpoint.format import newest_checkpoint
from magnetar.engine.checkpoint.open_run import load_model, open_run
from magnetar.engine.config.schema import load_config
from magnetar.engine.prepare_run import data_options, prepare_run
from magnetar.models.transformer import EncoderDecoder
from tests.data.parallel import prepared_verses
from tests.engine.checkpoint.test_resume import kill_after_step
from tests.runs import launch, make_corpus, records, write_config

NUM_STEPS = 8
PAIRS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "magnetar.model.architecture": "encoder_decoder",
    "magnetar.model.share_embeddings": True,
    "magnetar.model.max_seq_len": 48,
    "magnetar.model.max_target_len": 40,
    "magnetar.data.seq_len": 48,
    "magnetar.data.pairs": {"bin_tokens": 512, "temperature": 2.0},
    "magnetar.training.label_smoothing": 0.1,
    "magnetar.training.eval_translations": 2,
    "magnetar.training.num_steps": NUM_STEPS,
}
# Bins of a step on two ranks, one after the other on one rank; experts are balanced over the step.
ANY_LAYOUT = PAIRS | {
    "train_batch_size": 2,
    "magnetar.model.dropout": 0.0,
    "magnetar.model.moe.balance_scope": "batch",
    "magnetar.model.moe.second_expert": "sampled",
    "magnetar.model.moe.jitter": 0.1,
    "magnetar.training.eval_translations": 0,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedPairs:
    return prepared_verses(tmp_path_factory.mktemp("pairs"), num_train=120)


@pytest.fixture(scope="module")
def trained(prepared: PreparedPairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    done = launch(write_config(folder, prepared.path, changes=PAIRS))
    assert done.returncode == 0, done.stdout
    (folder / "output").write_text(done.stdout)
    return folder / "run"


def losses(run_dir: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in records(run_dir) if name in record]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_exactly_the_same_metrics(
    trained: Path, prepared: PreparedPairs, tmp_path: Path
) -> None:
    config = write_config(tmp_path, prepared.path, changes=PAIRS)
    kill_after_step(config, 6)
    resumed = launch(config)
    assert resumed.returncode == 0, resumed.stdout
    # The same layout on the same machine: each rank repeats the same operators on as many threads.
    assert records(tmp_path / "run") == records(trained)
    whole, after = (
        json.loads((d / "summary.json").read_text()) for d in (trained, config.parent / "run")
    )
    assert after["translations"] == whole["translations"]
    assert after["tokens"] == whole["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("moe", [True, False], ids=["sparse, noisy", "dense"])
def test_the_layout_changes_no_loss(moe: bool, prepared: PreparedPairs, tmp_path: Path) -> None:
    changes = {k: v for k, v in ANY_LAYOUT.items() if moe or not k.startswith("magnetar.model.moe")}
    if not moe:
        changes["magnetar.model.moe"] = None
    found = []
    for ranks in (1, 2):
        own = changes | ({"magnetar.model.moe.ep_size": ranks} if moe else {})
        config = write_config(tmp_path, prepared.path, f"ranks_{ranks}", own)
        done = launch(config, ranks=ranks)
        assert done.returncode == 0, done.stdout
        found.append(tmp_path / f"ranks_{ranks}")
    accumulation = [
        json.loads((d / "config.json").read_text())["gradient_accumulation_steps"] for d in found
    ]
    assert accumulation == [2, 1]
    for name in ("loss", "valid_loss", "grad_norm"):
        one, two = (losses(run_dir, name) for run_dir in found)
        # float32 sums in another order, amplified by Adam.
        assert one == pytest.approx(two, rel=0, abs=5e-5), name
    first, *_, last = losses(found[0])
    assert first - last > 0.05, "the model must learn, or nothing is compared"


@pytest.mark.slow
def test_the_validation_loss_is_the_mean_over_the_target_tokens_of_every_pair(
    trained: Path, prepared: PreparedPairs
) -> None:
    model = load_model(newest_checkpoint(trained)).eval()
    assert isinstance(model, EncoderDecoder)
    total, count = 0.0, 0
    for direction in prepared.directions("valid"):
        for source, target in prepared.pairs("valid", *direction):
            # What is longer than the model is cut, and keeps its end.
            source, target = (
                side if len(side) <= n else np.concatenate([side[: n - 1], side[-1:]])
                for side, n in ((source, 48), (target, 40))
            )
            given = torch.tensor([[prepared.codec.eos_id, *target[:-1]]])
            with torch.no_grad():
                logits = model(torch.tensor(source)[None], given).logits[0].double()
            log_probs = logits.log_softmax(-1)
            total -= sum(float(log_probs[i, int(token)]) for i, token in enumerate(target))
            count += len(target)
    assert losses(trained, "valid_num_tokens")[-1] == count
    # The model's float32 logits are one float32 sum in bins and another pair by pair: 1e-6 a token.
    assert losses(trained, "valid_loss")[-1] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.slow
def test_a_step_asks_about_the_targets_of_its_bins_and_counts_them(
    trained: Path, prepared: PreparedPairs
) -> None:
    bins = PairData(prepared, data_options(load_config(trained / "config.json"))).train
    counts = [
        sum(int((bins.bin(step, i).targets != IGNORE_INDEX).sum()) for i in range(bins.bins))
        for step in range(NUM_STEPS)
    ]
    assert losses(trained, "tokens") == np.cumsum(counts).tolist()
    assert json.loads((trained / "summary.json").read_text())["tokens"] == sum(counts)


@pytest.mark.slow
def test_everything_promised_is_there(trained: Path, prepared: PreparedPairs) -> None:
    evaluations = [record for record in records(trained) if "valid_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 4, 8]
    assert all(0 <= record["valid_bleu"] <= 100 for record in evaluations)
    assert all(0 <= record["valid_chrf"] <= 100 for record in evaluations)
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    for name in ("bleu", "chrf", "loss"):
        found = [event.value for event in events.Scalars(f"valid/{name}")]  # float32, so 1e-7 off
        assert found == pytest.approx([record[f"valid_{name}"] for record in evaluations])
    final = evaluations[-1]
    of_one = [value for name, value in final.items() if name.startswith("valid_chrf/")]
    assert final["valid_chrf"] == pytest.approx(sum(of_one) / len(of_one))
    shown_scalar = events.Scalars("valid/chrf/en-de")[-1].value
    assert shown_scalar == pytest.approx(final["valid_chrf/en-de"])
    summary = json.loads((trained / "summary.json").read_text())
    directions = {"-".join(direction) for direction in prepared.directions("valid")}
    table = summary["translations"]
    assert table["directions"].keys() == directions
    assert table["sample"] == "the first 2 sentences of each direction"
    assert all(each["sentences"] == 2 for each in table["directions"].values())
    assert "version:" in table["chrf_signature"]
    data = PairData(prepared, data_options(load_config(trained / "config.json")))
    assert summary["unigram_perplexity"] == data.unigram_perplexity(0)
    vocabulary = (trained / "tokenizer.model").read_bytes()
    assert vocabulary == (prepared.path / "tokenizer.model").read_bytes()
    shown = (trained.parent / "output").read_text()
    for words in (
        "3 languages, 6 directions",
        "places for pairs",
        "before training",
        "after ",
        "reference",
        "magnetar translate",
        "--from en --to de",
        "too long",
        "dropped",
    ):
        assert words in shown


@pytest.mark.slow
def test_what_continues_text_sends_its_user_to_what_translates(trained: Path) -> None:
    with pytest.raises(UserError, match=r"has learnt sentence pairs: use .*magnetar translate"):
        _ = open_run(trained).text_config


@pytest.mark.slow
def test_an_exported_run_has_its_vocabulary(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "exported")
    vocabulary = (tmp_path / "exported" / "tokenizer.model").read_bytes()
    assert vocabulary == (trained / "tokenizer.model").read_bytes()


def test_the_unigram_perplexity_is_that_of_the_targets(
    prepared: PreparedPairs, tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path, prepared.path, changes=PAIRS))
    tokens = [
        int(token)
        for direction in prepared.directions("valid")
        for pair in prepared.pairs("valid", *direction)
        for token in (
            pair.target if len(pair.target) <= 40 else [*pair.target[:39], pair.target[-1]]
        )
    ]
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    data = PairData(prepared, data_options(config))
    assert data.unigram_perplexity(0) == pytest.approx(expected)


def user_error(config: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare_run(load_config(config, world_size=2), 2)
    return str(caught.value)


def test_data_of_the_other_kind_is_refused(prepared: PreparedPairs, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    message = user_error(write_config(tmp_path, corpus, changes=PAIRS))
    assert (
        f"{corpus} holds running text, and magnetar.data.pairs asks for sentence pairs" in message
    )
    assert "magnetar prepare-pairs" in message
    message = user_error(
        write_config(tmp_path, prepared.path, changes={"magnetar.model.moe": None})
    )
    assert f"{prepared.path} holds sentence pairs, and magnetar.data.pairs is null" in message
    assert "{} for its defaults" in message


@pytest.mark.parametrize(
    ("pairs", "parts"),
    [
        ({"directions": ["en-xx"]}, ["'en-xx'", "en, de, pt-br"]),
        ({"too_long": "refuse"}, ["longer than", "seq_len=48"]),
    ],
)
def test_pairs_that_cannot_be_learned_are_refused_before_anything_starts(
    pairs: dict[str, Any], parts: list[str], prepared: PreparedPairs, tmp_path: Path
) -> None:
    own = {"magnetar.data.pairs": pairs}
    message = user_error(write_config(tmp_path, prepared.path, changes=PAIRS | own))
    assert all(part in message for part in parts)


def test_the_config_says_which_data_to_open(prepared: PreparedPairs, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, prepared.path, changes=PAIRS))
    data = open_data(prepared.path, data_options(config))
    assert isinstance(data, PairData)
    assert data.prepared == open_pairs(prepared.path)
