"""What a person reads around a run: the opening lines, the closing table, summary.json."""

import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from rich.table import Table
from rich.text import Text

from magnetar.data.pairs.batches import PairBatches, ValidBins
from magnetar.data.pairs.folder import PreparedPairs
from magnetar.data.text.packed_lm import IGNORE_INDEX, PackedLM, window_batch
from magnetar.data.text.token_files import Prepared
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.evaluate import Example, examples_of, validation_translations
from magnetar.engine.progress import ProgressLine, duration, table
from magnetar.engine.run_data import RunData, TrainingSet, ValidationSet, unigram_perplexity_of
from magnetar.engine.translation.translate import (
    TranslationScores,
    sample_words,
    signature_lines,
    translation_tables,
)
from magnetar.models.cost import in_words, num_parameters
from magnetar.models.decoding.generation import sample

NUM_SAMPLES = 3
PROMPT_TOKENS = 16


def describe(
    config: RunConfig, prepared: RunData, train: TrainingSet, valid: ValidationSet, first_step: int
) -> str:
    """A few lines: the model, its experts, the layout, the data, the run."""
    model, training = config.model, config.training
    lines = in_words(model)
    world_size = dist.get_world_size()
    ep_size = model.moe.ep_size if model.moe else 1
    lines["layout"] = (
        f"{world_size} rank{'s' * (world_size > 1)}, ep_size {ep_size}, "
        f"ZeRO {config.zero_stage}, {config.dtype}"
    )
    vocabulary = f"vocabulary {prepared.vocab_size:,}"
    if isinstance(prepared, Prepared):
        size = f"{prepared.train.num_tokens:,} tokens"
        step_size = f"{config.data.seq_len} tokens"
    else:
        assert isinstance(train, PairBatches)
        assert isinstance(valid, ValidBins)
        assert config.data.pairs is not None
        size = f"{len(prepared.languages)} languages, {len(train.directions)} directions"
        step_size = f"{config.data.pairs.bin_tokens:,} places for pairs"
        done = {"drop": "dropped", "truncate": "truncated"}.get(config.data.pairs.too_long, "")
        for pairs, found, what in (
            ("pairs", train.num_too_long, done),
            ("validation pairs", valid.num_too_long, "truncated"),
        ):
            if found:
                lines["too long"] = lines.get("too long", "") + (
                    f"{'; ' * ('too long' in lines)}{sum(found.values()):,} {pairs}, {what}"
                )
    lines["data"] = f"{prepared.path}: {size}, {vocabulary}"
    if (masking := config.data.masking) is not None:
        unit = "tokens"
        if masking.unit == "span":
            unit = f"tokens in spans of {masking.mean_span_length:g} on average"
        lines["masking"] = f"{masking.probability:.1%} of the {unit}, {masking.replace}"
    begin = f", resuming after step {first_step}" if first_step else ""
    if first_step >= training.num_steps:
        begin = ", already finished"
    lines["run"] = (
        f"{training.run_dir}: {training.num_steps} steps of "
        f"{config.deepspeed['train_batch_size']} x {step_size}{begin}"
    )
    if training.save_every == "never":
        lines["run"] += ", saving nothing"
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def finish(
    engine: Any,
    config: RunConfig,
    prepared: RunData,
    valid: ValidationSet,
    state: dict,
    progress: ProgressLine,
) -> None:
    """Write summary.json and print the closing table, what the model writes, where things lie.

    Every rank takes part: the experts' ranks exchange tokens whenever the model is asked.
    """
    scores = validation_translations(engine, config, prepared, beam=4)
    if isinstance(valid, ValidBins):
        title = "Sentences of the validation split, before and after training"
        texts = translated_texts(state["examples"], examples_of(scores))
    else:
        assert isinstance(prepared, Prepared)
        title, texts = closing_texts(engine, config, prepared, valid)
    if dist.get_rank() != 0:
        return
    run_dir = Path(config.training.run_dir)
    unigram = unigram_perplexity_of(prepared, valid, config, state["after"]["num_tokens"])
    summary = make_summary(engine, config, state, unigram, scores)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    before, after = state["before"], state["after"]
    console = progress.console
    console.print()
    console.print(
        evaluation_table(
            f"Validation, {asked_about(config, after['num_tokens'])}",
            {"before training": before, "after training": after},
            unigram,
        )
    )
    if scores is not None:
        sample = sample_words(config.training.eval_translations)
        for each in translation_tables(f"Validation split, {sample}", scores):
            console.print(each)
        for line in signature_lines(scores):
            console.print(line, soft_wrap=True, markup=False)
        console.print()
    if texts:
        console.print(f"{title}\n", style="bold", markup=False)
    for text in texts:
        console.print(text, end="\n\n", soft_wrap=not console.is_terminal)
    trained = f"{duration(summary['seconds'])} at {summary['tokens_per_second']:,.0f} tokens/s"
    learned = prepared.directions("valid")[:1] if isinstance(prepared, PreparedPairs) else []
    lines = {"trained": trained} | closing_lines(config, engine.global_steps, *learned)
    progress.note("\n".join(f"{name:<11} {text}" for name, text in lines.items()))


def closing_lines(
    config: RunConfig, step: int, direction: tuple[str, str] = ("A", "B")
) -> dict[str, str]:
    """Where the things of a finished run lie, and what to do with them.

    Args:
        config: the run's.
        step: its last.
        direction: that a run on pairs has learned.
    """
    run_dir, programs = Path(config.training.run_dir), programs_folder()
    is_saved = config.training.save_every != "never"
    checkpoint = f"{run_dir}/checkpoints/step_{step:08d}"
    lines = {
        "checkpoint": checkpoint if is_saved else 'none, by magnetar.training.save_every="never"',
        "metrics": f"{run_dir}/metrics.jsonl, {run_dir}/summary.json",
    }
    if config.deepspeed.get("tensorboard", {}).get("enabled"):
        lines["curves"] = f"{programs}tensorboard --logdir {run_dir}/tensorboard"
    if is_saved and config.model.architecture == "decoder":
        lines["next"] = f'{programs}magnetar generate {run_dir} --prompt "My fellow citizens"'
    elif is_saved and config.data.pairs is not None:
        source, target = direction
        lines["next"] = f"{programs}magnetar translate {run_dir} --from {source} --to {target}"
    elif is_saved:
        lines["next"] = f"{programs}magnetar evaluate {run_dir}"
    return lines


def programs_folder() -> str:
    """What to write before the name of a program of this environment: nothing if it is active."""
    folder = Path(sys.executable).parent
    found = shutil.which("python")
    if found and Path(found).parent == folder:
        return ""
    here = Path.cwd()
    return f"{folder.relative_to(here) if folder.is_relative_to(here) else folder}/"


def asked_about(config: RunConfig, num_tokens: int) -> str:
    """`722 masked tokens`: what a validation loss is the mean over."""
    masked = "masked " if config.model.architecture == "encoder" else ""
    if config.data.pairs is not None:
        masked = "target "
    return f"{num_tokens:,} {masked}tokens"


def evaluation_table(title: str, rows: dict[str, dict[str, Any]], unigram: float) -> Table:
    """Evaluations, as dictionaries, below the unigram perplexity of the same data.

    Masked models have no bits per byte, and then no such column.
    """
    columns = ["", "loss (nats)", "perplexity", "of unigram"]
    cells = [["unigram model", f"{math.log(unigram):.4f}", f"{unigram:,.2f}", "1.000"]]
    cells += [
        [
            name,
            f"{values['loss']:.4f}",
            f"{values['perplexity']:,.2f}",
            f"{values['perplexity'] / unigram:.3f}",
        ]
        for name, values in rows.items()
    ]
    if all("bits_per_byte" in values for values in rows.values()):
        columns.append("bits per byte")
        cells[0].append("")
        for row, values in zip(cells[1:], rows.values(), strict=True):
            row.append(f"{values['bits_per_byte']:.3f}")
    return table(title, columns, cells)


def validation_words(values: dict[str, float]) -> str:
    """`perplexity 7.31, greedily BLEU 12.0, chrF 34.5`: an evaluation in a line."""
    words = f"perplexity {values['perplexity']:,.2f}"
    if "bleu" in values:
        words += f", greedily BLEU {values['bleu']:.1f}, chrF {values['chrf']:.1f}"
    return words


def translated_texts(before: list[Example], after: list[Example]) -> list[Text]:
    """Sources with their references, what the initial model made of them, and the trained one."""
    initial = {(example[0], example[1]): example[3] for example in before}
    texts = []
    for direction, source, reference, translation in after:
        rows = {
            direction: source,
            "reference": reference,
            "before": initial.get((direction, source), ""),
            "after": translation,
        }
        text = Text()
        for name, words in rows.items():
            text.append(f"{name:<11}", "dim").append(f"{words}\n", "bold" * (name == "after"))
        text.rstrip()
        texts.append(text)
    return texts


def continuation_text(prompt: str, continuation: str) -> Text:
    """Prompt and continuation as one text, the prompt dim where there are colours."""
    return Text.assemble((prompt, "dim"), continuation)


def closing_texts(
    engine: Any, config: RunConfig, prepared: Prepared, valid: PackedLM
) -> tuple[str, list[Text]]:
    """What the model makes of a few validation texts, and a title for it.

    A decoder continues their beginnings, an encoder fills in what is masked, an encoder-decoder
    shows nothing.
    """
    if config.model.architecture == "decoder":
        continued = sample_continuations(engine, config, prepared)
        title = "Beginnings of validation documents, continued by the model"
        return title, [continuation_text(*pair) for pair in continued]
    if config.model.architecture == "encoder" and config.training.sample_tokens:
        title = "Validation texts, masked tokens [filled in], [wrong|right] where wrong"
        return title, fill_in_masks(engine, config, prepared, valid)
    return "", []


@torch.no_grad()
def fill_in_masks(
    engine: Any, config: RunConfig, prepared: Prepared, valid: PackedLM
) -> list[Text]:
    """Beginnings of validation windows from all over the split, filled in by an encoder."""
    step = max(1, len(valid) // NUM_SAMPLES)
    batch = window_batch(valid, range(0, len(valid), step)[:NUM_SAMPLES])
    model = engine.module
    was_training = model.training
    model.eval()
    logits = model(*(torch.from_numpy(array).to(engine.device) for array in batch.inputs)).logits
    model.train(was_training)
    answers = logits[..., : prepared.vocab_size].argmax(-1).cpu().numpy()  # no mask, no filling
    shown = slice(config.training.sample_tokens)
    return [
        filled_in_text(prepared.tokenizer, row[shown].tolist(), asked[shown].tolist(), given[shown])
        for row, asked, given in zip(answers, batch.targets, batch.inputs[0].tolist(), strict=True)
    ]


def filled_in_text(
    tokenizer: Any, answers: list[int], targets: list[int], given: list[int]
) -> Text:
    """The text with what was filled in in brackets, bold where there are colours.

    Args:
        tokenizer: of the data.
        answers: the model's choice at every position.
        targets: the true token where one was masked, else IGNORE_INDEX.
        given: what the model saw.
    """
    text, truth = Text(), list[int]()
    for answer, target, seen in zip(answers, targets, given, strict=True):
        is_asked = target != IGNORE_INDEX
        true = piece(tokenizer, truth, target if is_asked else seen)
        if not is_asked:
            text.append(true)
        else:
            filled = piece(tokenizer, truth, answer)
            text.append(" [" if true[:1] == " " and len(true) > 1 else "[")
            text.append(visible(filled), "bold")
            text.append(f"|{visible(true)}" * (answer != target), "dim")
            text.append("]")
        truth.append(target if is_asked else seen)
    return text


def visible(piece: str) -> str:
    """A token's text without the space around it; ␣ for space alone, ¶ for a document's end."""
    return piece.strip() or ("␣" if piece else "¶")


def piece(tokenizer: Any, before: list[int], token: int) -> str:
    """The text that a token adds to those before it: it can depend on them."""
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]


def sample_continuations(
    engine: Any, config: RunConfig, prepared: Prepared
) -> list[tuple[str, str]]:
    """Continue different beginnings of validation documents: (prompt, continuation) as text."""
    num_tokens = config.training.sample_tokens
    if not num_tokens:
        return []
    split, tokenizer = prepared.valid, prepared.tokenizer
    beginnings: list[list[int]] = []
    for index in range(split.num_documents):
        beginning = split.document(index)[:PROMPT_TOKENS].tolist()
        if len(beginning) == PROMPT_TOKENS and beginning not in beginnings:
            beginnings.append(beginning)
        if len(beginnings) == NUM_SAMPLES:
            break
    if not beginnings:
        return []
    tokens = sample(engine.module, torch.tensor(beginnings, device=engine.device), num_tokens)
    return [decode_continuation(tokenizer, row, PROMPT_TOKENS) for row in tokens.tolist()]


def decode_continuation(tokenizer: Any, tokens: list[int], prompt_length: int) -> tuple[str, str]:
    """Prompt and continuation as text; the continuation ends where its document does."""
    # A vocabulary padded for speed has ids that mean nothing.
    tokens = [token for token in tokens if token < tokenizer.vocab_size]
    if tokenizer.eos_id in tokens[prompt_length:]:
        tokens = tokens[: tokens.index(tokenizer.eos_id, prompt_length)]
    prompt = tokenizer.decode(tokens[:prompt_length])
    # Decoded together: a token's text can depend on the one before it.
    return prompt, tokenizer.decode(tokens)[len(prompt) :]


def make_summary(
    engine: Any,
    config: RunConfig,
    state: dict,
    unigram: float,
    scores: TranslationScores | None = None,
) -> dict[str, Any]:
    """The content of summary.json."""
    steps, seconds = engine.global_steps, state["seconds"]
    num_tokens = steps * engine.train_batch_size() * config.data.seq_len
    if config.data.pairs is not None:
        num_tokens = state["num_targets"]
    total, active = num_parameters(config.model)
    sample = {"split": "valid", "sample": sample_words(config.training.eval_translations)}
    return {
        "steps": steps,
        "tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds if seconds else 0.0,
        "parameters": total,
        "active_parameters": active,
        "clipped_steps": state["num_clipped"],
        "validation_before": state["before"],
        "validation_after": state["after"],
        "unigram_perplexity": unigram,
        "perplexity_of_unigram": state["after"]["perplexity"] / unigram,
        **({} if scores is None else {"translations": sample | scores.to_dict()}),
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "deepspeed", "numpy", "sentencepiece")
        }
        | {"python": platform.python_version()},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the sources, with "-dirty" if they differ from it; None outside a clone."""
    source = Path(__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
