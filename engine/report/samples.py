"""What a person reads around a run: the opening lines, the closing table, summary.json."""

import importlib.metadata
import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from rich.table import Table
from rich.text import Text

from magnetar.data.loader import RunData
from magnetar.data.text.packed_lm import IGNORE_INDEX
from magnetar.engine.config.schema import TrainingConfig
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.engine.evaluate import Evaluations, Example, examples_of
from magnetar.engine.report.progress import ProgressLine, duration, table
from magnetar.engine.report.translations import (
    sample_words,
    signature_lines,
    translation_tables,
)
from magnetar.engine.translation.translate import TranslationScores
from magnetar.models.config import ModelConfig
from magnetar.models.cost import in_words, num_parameters
from magnetar.models.decoding.generation import sample

NUM_SAMPLES = 3
PROMPT_TOKENS = 16


class RunTotals(NamedTuple):
    """The numbers of a whole run.

    Attributes:
        steps: optimizer steps done.
        tokens: tokens trained on.
        seconds: training time over all starts.
        num_clipped: steps that SparseClip clipped.
    """

    steps: int
    tokens: int
    seconds: float
    num_clipped: int

    @property
    def tokens_per_second(self) -> float:
        """Mean speed; 0 before any training time is measured."""
        return self.tokens / self.seconds if self.seconds else 0.0


def describe(
    model: ModelConfig,
    layout: str,
    data: RunData,
    training: TrainingConfig,
    train_batch_size: int,
    first_step: int,
) -> str:
    """A few lines: the model, its experts, the layout in words, the data, the run.

    `first_step` is the number of steps done before this start.
    """
    lines = in_words(model) | {"layout": layout} | data.describe()
    begin = f", resuming after step {first_step}" if first_step else ""
    if first_step >= training.num_steps:
        begin = ", already finished"
    lines["run"] = (
        f"{training.run_dir}: {training.num_steps} steps of "
        f"{train_batch_size} x {data.sample_words}{begin}"
    )
    if training.save_every == "never":
        lines["run"] += ", saving nothing"
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def layout_words(world_size: int, ep_size: int, zero_stage: int, dtype: str) -> str:
    """`2 ranks, ep_size 2, ZeRO 1, fp32`: what runs where."""
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    return f"{ranks}, ep_size {ep_size}, ZeRO {zero_stage}, {dtype}"


def finish(
    evaluations: Evaluations,
    model: ModelConfig,
    training: TrainingConfig,
    totals: RunTotals,
    has_tensorboard: bool,
    progress: ProgressLine,
) -> None:
    """Write summary.json, and print the closing table, a few samples and where the files are.

    Every rank calls this, since ranks that share experts exchange tokens in each forward pass.
    """
    engine, data = evaluations.engine, evaluations.data
    before, after = evaluations.before, evaluations.after
    scores = evaluations.translations(beam=4)
    if model.architecture == "encoder_decoder":
        title = "Sentences of the validation split, before and after training"
        texts = translated_texts(evaluations.examples, examples_of(scores))
    else:
        title, texts = closing_texts(engine, data, model.architecture, training.sample_tokens)
    if dist.get_rank() != 0:
        return
    run_dir, console = Path(training.run_dir), progress.console
    unigram = data.unigram_perplexity(int(after["num_tokens"]))
    summary = make_summary(evaluations, model, totals, unigram, scores, engine.device)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print()
    console.print(
        evaluation_table(
            f"Validation, {after['num_tokens']:,} {data.asked_tokens}",
            {"before training": before, "after training": after},
            unigram,
        )
    )
    if scores is not None:
        words = sample_words(evaluations.num_translations)
        for each in translation_tables(f"Validation split, {words}", scores):
            console.print(each)
        for line in signature_lines(scores):
            console.print(line, soft_wrap=True, markup=False)
        for warning in scores.warnings:
            console.print(f"warning: {warning}", soft_wrap=True, markup=False)
        console.print()
    if texts:
        console.print(f"{title}\n", style="bold", markup=False)
    for text in texts:
        console.print(text, end="\n\n", soft_wrap=not console.is_terminal)
    lines = closing_lines(training, model.architecture, data.directions, totals, has_tensorboard)
    progress.note("\n".join(f"{name:<11} {text}" for name, text in lines.items()))


def closing_lines(
    training: TrainingConfig,
    architecture: str,
    directions: Sequence[tuple[str, str]],
    totals: RunTotals,
    has_tensorboard: bool,
) -> dict[str, str]:
    """Lines about the files of a finished run, and a command that uses its model.

    `directions` are the translation directions of the validation split; none for text.
    """
    run_dir, programs = Path(training.run_dir), programs_folder()
    is_saved = training.save_every != "never"
    checkpoint = f"{run_dir}/checkpoints/step_{totals.steps:08d}"
    lines = {
        "trained": f"{duration(totals.seconds)} at {totals.tokens_per_second:,.0f} tokens/s",
        "checkpoint": checkpoint if is_saved else 'none, by magnetar.training.save_every="never"',
        "metrics": f"{run_dir}/metrics.jsonl, {run_dir}/summary.json",
    }
    if has_tensorboard:
        command = [f"{programs}tensorboard", "--logdir", f"{run_dir}/tensorboard"]
        lines["curves"] = shlex.join(command)
    if is_saved:
        if architecture == "decoder":
            command = ["generate", str(run_dir), "--prompt", "My fellow citizens"]
        elif directions:
            source, target = directions[0]
            command = ["translate", str(run_dir), "--from", source, "--to", target]
        else:
            command = ["evaluate", str(run_dir)]
        lines["next"] = shlex.join([f"{programs}magnetar", *command])
    return lines


def programs_folder() -> str:
    """The folder of this environment's programs as a prefix; "" if the environment is active."""
    folder = Path(sys.executable).parent
    found = shutil.which("python")
    if found and Path(found).parent == folder:
        return ""
    here = Path.cwd()
    return f"{folder.relative_to(here) if folder.is_relative_to(here) else folder}/"


def evaluation_table(title: str, rows: dict[str, dict[str, Any]], unigram: float) -> Table:
    """A table of evaluations below the unigram perplexity of the same data.

    Args:
        title: title of the table.
        rows: values of `Evaluation.to_dict`, by the name of their line. The column of bits per
            byte is left out if one has none, as those of masked models.
        unigram: perplexity of the unigram model.
    """
    lines = {"unigram model": {"loss": math.log(unigram), "perplexity": unigram}, **rows}
    cells = [
        [
            name,
            f"{values['loss']:.4f}",
            f"{values['perplexity']:,.2f}",
            f"{values['perplexity'] / unigram:.3f}",
            f"{values['bits_per_byte']:.3f}" if "bits_per_byte" in values else "",
        ]
        for name, values in lines.items()
    ]
    columns = ["", "loss (nats)", "perplexity", "of unigram", "bits per byte"]
    if not all("bits_per_byte" in values for values in rows.values()):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    return table(title, columns, cells)


def validation_words(values: dict[str, float]) -> str:
    """`perplexity 7.31, greedily BLEU 12.0, chrF 34.5`: an evaluation in a line."""
    words = f"perplexity {values['perplexity']:,.2f}"
    if "bleu" in values:
        words += f", greedily BLEU {values['bleu']:.1f}, chrF {values['chrf']:.1f}"
    return words


def translated_texts(before: list[Example], after: list[Example]) -> list[Text]:
    """Sources, references, and the translations of the initial and of the trained model."""
    initial = {(direction, source): translation for direction, source, _, translation in before}
    texts = []
    for direction, source, reference, translation in after:
        first = initial.get((direction, source), "")
        names = (direction, "reference", "before", "after")
        text = Text()
        for name, words in zip(names, (source, reference, first, translation), strict=True):
            text.append(f"{name:<11}", "dim").append(f"{words}\n", "bold" * (name == "after"))
        text.rstrip()
        texts.append(text)
    return texts


def closing_texts(
    engine: DeepSpeedEngine, data: RunData, architecture: str, num_tokens: int
) -> tuple[str, list[Text]]:
    """A title, and what the model makes of validation texts of some tokens; every rank calls this.

    A decoder continues their beginnings, an encoder fills in what is masked.
    """
    if not num_tokens:
        return "", []
    if architecture == "decoder":
        title = "Beginnings of validation documents, continued by the model"
        return title, _continued_texts(engine, data, num_tokens)
    title = "Validation texts, masked tokens [filled in], [wrong|right] where wrong"
    return title, _fill_in_masks(engine, data, num_tokens)


@torch.no_grad()
def _fill_in_masks(engine: DeepSpeedEngine, data: RunData, num_tokens: int) -> list[Text]:
    """Beginnings of validation windows from all over the split, filled in by an encoder."""
    batch = data.example_windows(NUM_SAMPLES)
    if batch is None:
        return []
    model = engine.module
    was_training = model.training
    model.eval()
    logits = model(*(torch.from_numpy(array).to(engine.device) for array in batch.inputs)).logits
    model.train(was_training)
    # Ids beyond the vocabulary are the mask and padding, which are no answers.
    answers = logits[..., : data.vocab_size].argmax(-1).tolist()  # (B, T)
    rows = zip(answers, batch.targets.tolist(), batch.inputs[0].tolist(), strict=True)
    return [filled_in_text(data.tokenizer, *(part[:num_tokens] for part in row)) for row in rows]


def filled_in_text(
    tokenizer: Any, answers: list[int], targets: list[int], given: list[int]
) -> Text:
    """A text with the model's answers in brackets, bold if there are colours.

    Args:
        tokenizer: the vocabulary of the data.
        answers: (T,) the model's choice at every position.
        targets: (T,) the true token if it was masked, else IGNORE_INDEX.
        given: (T,) the tokens that the model read.
    """
    text, truth = Text(), list[int]()
    for answer, target, seen in zip(answers, targets, given, strict=True):
        is_asked = target != IGNORE_INDEX
        true = _piece(tokenizer, truth, target if is_asked else seen)
        if not is_asked:
            text.append(true)
        else:
            filled = _visible(_piece(tokenizer, truth, answer))
            text.append(" [" if true[:1] == " " and len(true) > 1 else "[")
            text.append(filled, "bold")
            text.append(f"|{_visible(true)}" * (answer != target), "dim")
            text.append("]")
        truth.append(target if is_asked else seen)
    return text


def _visible(piece: str) -> str:
    """A token's text without spaces around it; ␣ is a lone space, ¶ the end of a document."""
    return piece.strip() or ("␣" if piece else "¶")


def _piece(tokenizer: Any, before: list[int], token: int) -> str:
    """The text that a token adds to those before it, on which it can depend."""
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]


def _continued_texts(engine: DeepSpeedEngine, data: RunData, num_tokens: int) -> list[Text]:
    """Different beginnings of validation documents, continued by a decoder."""
    beginnings = data.beginnings(NUM_SAMPLES, PROMPT_TOKENS)
    if not beginnings:
        return []
    tokens = sample(engine.module, torch.tensor(beginnings, device=engine.device), num_tokens)
    return [continuation_text(data.tokenizer, row, PROMPT_TOKENS) for row in tokens.tolist()]


def continuation_text(tokenizer: Any, tokens: list[int], prompt_length: int) -> Text:
    """Prompt and continuation as one text that ends where its document does; the prompt is dim."""
    # A vocabulary padded for speed has ids without a text.
    tokens = [token for token in tokens if token < tokenizer.vocab_size]
    if tokenizer.eos_id in tokens[prompt_length:]:
        tokens = tokens[: tokens.index(tokenizer.eos_id, prompt_length)]
    prompt = tokenizer.decode(tokens[:prompt_length])
    # Decoded together, since a token's text can depend on the one before it.
    return Text.assemble((prompt, "dim"), tokenizer.decode(tokens)[len(prompt) :])


def make_summary(
    evaluations: Evaluations,
    model: ModelConfig,
    totals: RunTotals,
    unigram: float,
    scores: TranslationScores | None,
    device: torch.device,
) -> dict[str, Any]:
    """The content of summary.json."""
    total, active = num_parameters(model)
    sample = {"split": "valid", "sample": sample_words(evaluations.num_translations)}
    return {
        "steps": totals.steps,
        "tokens": totals.tokens,
        "seconds": totals.seconds,
        "tokens_per_second": totals.tokens_per_second,
        "parameters": total,
        "active_parameters": active,
        "clipped_steps": totals.num_clipped,
        "validation_before": evaluations.before,
        "validation_after": evaluations.after,
        "unigram_perplexity": unigram,
        "perplexity_of_unigram": evaluations.after["perplexity"] / unigram,
        **({} if scores is None else {"translations": sample | scores.to_dict()}),
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "deepspeed", "numpy", "sentencepiece")
        }
        | {"python": platform.python_version()},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the sources, with "-dirty" if they differ from it; None outside a clone."""
    source = Path(__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
