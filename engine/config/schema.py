"""The run's JSON: read, checked and resolved before any process group exists."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from magnetar.data.errors import UserError
from magnetar.engine.config.batch_sizes import (
    ACCUMULATION,
    MICRO,
    TRAIN,
    BatchSizes,
    batch_problems,
    filled,
)
from magnetar.engine.config.deepspeed import DeepSpeedKeys
from magnetar.engine.config.errors import (
    Problem,
    apply_overrides,
    check_keys,
    key_paths,
    missing_key,
    read_json_object,
    shown,
    strange_texts,
)
from magnetar.engine.config.rules import broken_rules
from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import Count, StrictModel, one_problem, without_retired_keys

SaveEvery = Annotated[Count | Literal["never"] | None, WrapValidator(one_problem)]

_POLYNOMIAL_ONLY = ("total_steps", "power", "end_lr")


class MaskingConfig(StrictModel):
    """What an encoder, or the encoder of an encoder-decoder, is not shown."""

    probability: float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="Share of each sequence's tokens that is masked: exactly this share, rounded, "
        "and at least one token.",
    )
    unit: Literal["token", "span"] = Field(
        default="token",
        description="`token`: single tokens. `span`: runs of tokens (SpanBERT, arXiv 1907.10529).",
    )
    mean_span_length: float = Field(
        default=3.0,
        ge=1,
        description="Mean length of a span, in tokens; lengths are geometric. Only with unit "
        "`span`.",
    )
    replace: Literal["bert", "mask"] = Field(
        default="bert",
        description="`bert`: 80 % of the masked tokens become the mask token, 10 % a random one, "
        "10 % stay. `mask`: all become the mask token.",
    )

    @model_validator(mode="after")
    def _spans_have_a_length(self) -> "MaskingConfig":
        if self.unit != "span" and "mean_span_length" in self.model_fields_set:
            raise ValueError(
                f"mean_span_length={shown(self.mean_span_length)} belongs to unit 'span', but unit "
                f"is {self.unit!r}: remove it, or use unit 'span'"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_keys_of_the_unit(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        if self.unit != "span":
            del fields["mean_span_length"]
        return fields


class PairsConfig(StrictModel):
    """Sentence pairs, for an `encoder_decoder` that translates.

    DeepSpeed's sample is then a bin, some pairs of like lengths side by side: `train_batch_size` is
    the bins of a step, and `train_micro_batch_size_per_gpu` is 1.
    """

    bin_tokens: int = Field(
        default=8192,
        ge=16,
        description="Places of a bin: pairs * (source length + target length), padding included. "
        "At most so many; a step has at most train_batch_size * bin_tokens.",
    )
    temperature: float = Field(
        default=5.0,
        ge=1,
        description="T: a direction of n pairs is drawn with probability proportional to n^(1/T), "
        "where a pair of a table with weight w counts w times. 1: as many as there are; 5: small "
        "ones more often (arXiv 1907.05019).",
    )
    directions: list[str] | None = Field(
        default=None,
        description='What is learned, such as ["en-de", "de-en"]. null: every direction.',
    )
    too_long: Literal["drop", "truncate", "refuse"] = Field(
        default="drop",
        description="What happens to training pairs that are longer than seq_len or the targets' "
        "limit; how many there are is reported. A truncated side keeps its end. Validation "
        "truncates them.",
    )
    too_long_inference: Literal["split", "truncate", "refuse"] = Field(
        default="split",
        description="What magnetar translate does with a sentence longer than the model's "
        "positions, unless --too-long is given; how many there are is reported. split: each of its "
        "sentences alone. BLEU and chrF are of truncated ones.",
    )


class DataConfig(StrictModel):
    """What is read."""

    path: str = Field(
        min_length=1,
        description="Folder written by magnetar prepare, or with `pairs` by "
        "launchers.prepare_pairs.",
    )
    seq_len: int = Field(
        ge=1,
        description="Tokens in a training sequence; at most max_seq_len, and max_target_len. With "
        "`pairs` those of the longest source; targets have up to max_target_len.",
    )
    pairs: PairsConfig | None = Field(
        default=None, description="Sentence pairs in place of running text. null: text."
    )
    masking: MaskingConfig | None = Field(
        default=None,
        description="What is masked. null: all its defaults, with architecture `encoder` (a "
        "masked language model) and `encoder_decoder` (which learns to restore the text); a "
        "`decoder` has none, and with `pairs` nothing is masked.",
    )


class LRSchedule(StrictModel):
    """The learning rate over the steps: a linear warm-up to `optimizer.params.lr`, then this."""

    type: Literal["polynomial", "inverse_sqrt", "constant"] = Field(
        description="`polynomial`: down to end_lr at total_steps. `inverse_sqrt`: "
        "lr * sqrt(warmup_steps / step). `constant`: stays."
    )
    warmup_steps: int = Field(ge=0, description="Steps of the linear rise from 0.")
    total_steps: int | None = Field(
        default=None,
        ge=1,
        description="Step at which end_lr is reached. null: training.num_steps. Only with type "
        "`polynomial`.",
    )
    power: float = Field(
        default=1.0, gt=0, description="1: a straight line. Only with type `polynomial`."
    )
    end_lr: float = Field(
        default=0.0, ge=0, description="The last learning rate. Only with type `polynomial`."
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> "LRSchedule":
        lines = []
        if self.type != "polynomial":
            lines = [
                f"{name}={shown(getattr(self, name))} belongs to type 'polynomial', but type is "
                f"{self.type!r}: remove it, or use type 'polynomial'"
                for name in _POLYNOMIAL_ONLY
                if name in self.model_fields_set
            ]
        if self.type == "inverse_sqrt" and self.warmup_steps < 1:
            lines.append(
                "warmup_steps=0 leaves type 'inverse_sqrt' without a starting point: use "
                "warmup_steps 1 or more, or type 'constant'"
            )
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @model_serializer(mode="wrap")
    def _only_keys_of_the_type(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        if self.type != "polynomial":
            fields = {name: v for name, v in fields.items() if name not in _POLYNOMIAL_ONLY}
        return fields


class TrainingConfig(StrictModel):
    """The loop: how long, how often, where to."""

    run_dir: str = Field(min_length=1, description="Folder of the run's output.")
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="What the weights start from, for fine-tuning: another run's folder (its "
        "newest checkpoint), or a folder that magnetar convert has written. null: drawn anew.",
    )
    seed: int = Field(default=1, ge=0, description="Seed of weights, data order and dropout.")
    num_steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    z_loss_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean of log^2 Z, Z the sum of the exponentials of a target's "
        "logits (arXiv 2309.14322: 1e-4). Validation losses are without it.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each target's probability that is spread evenly over the vocabulary "
        "(arXiv 1512.00567). Reported and validation losses are without it.",
    )
    independent_weight_decay: bool = Field(
        default=False,
        description="Weights shrink by weight_decay times the schedule's factor, not times the "
        "learning rate as well (arXiv 2309.14322). Only with optimizer `AdamW`.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep only the input of each layer for the backward pass, and compute the "
        "layer again there: less memory, a third more work, the same numbers. It may change when "
        "a run goes on.",
    )
    compile: bool = Field(
        default=False,
        description="Compile attention, norms and dense networks with torch.compile: on a GPU some "
        "10 % more tokens a second, on either a minute before the first step. Numbers are rounded "
        "otherwise. Not with ZeRO 3.",
    )
    lr_schedule: LRSchedule = Field(description="The learning rate over the steps.")
    log_every: int = Field(default=10, ge=1, description="Steps between two lines of the log.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between two evaluations. null: none."
    )
    eval_sequences: int | None = Field(
        default=None,
        ge=1,
        description="Sequences of the validation split that count, from its start; with data.pairs "
        "those of each direction. null: all.",
    )
    eval_translations: int = Field(
        default=0,
        ge=0,
        description="Sentences of each direction that are translated greedily at every evaluation, "
        "and at the end by a beam of 4 as well, for BLEU and chrF, from the start of the "
        "validation split. 0: none. Only with data.pairs.",
    )
    save_every: SaveEvery = Field(
        default=None,
        description="Steps between two checkpoints. null: one at the end only, so that a run that "
        "is killed starts over. `never`: not even that one, so that a run leaves its numbers and "
        "no model.",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Checkpoints kept; older ones are removed."
    )
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="`auto`: go on from the newest checkpoint in run_dir, if there is one. "
        "`never`: start anew.",
    )
    sample_tokens: int = Field(
        default=60,
        ge=0,
        description="Tokens of each text shown at the end: what a decoder continues, what an "
        "encoder fills in. 0: none.",
    )

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainingConfig":
        schedule = self.lr_schedule
        if schedule.type != "polynomial":
            return self
        total = schedule.total_steps or self.num_steps
        name = "lr_schedule.total_steps" if schedule.total_steps else "num_steps"
        if schedule.warmup_steps > total:
            raise ValueError(
                f"lr_schedule.warmup_steps={schedule.warmup_steps} must not exceed {name}={total}: "
                f"use at most {total}, or more steps"
            )
        return self


class SparseClipConfig(StrictModel):
    """SparseClip (arXiv 2211.13184): clipping by a norm in which experts count 1/sqrt(E)."""

    enabled: bool = Field(
        default=True,
        description="true: gradient_clipping is SparseClip's threshold. false: it clips by the "
        "plain norm, in which every expert counts in full.",
    )


class GuardsConfig(StrictModel):
    """What a run does about faults. All of it may change when a run goes on."""

    max_bad_steps: int = Field(
        default=5,
        ge=1,
        description="A step whose loss or gradient norm is no finite number is left out: nothing "
        "is updated. After so many in a row the run goes back to its newest checkpoint, and "
        "leaves out the batches between.",
    )
    max_rollbacks: int = Field(
        default=3,
        ge=0,
        description="How often it goes back to one checkpoint. Once more, and the run ends as "
        "diverged.",
    )
    spike_deviations: float | None = Field(
        default=None,
        gt=0,
        description="A step is bad, too, if its loss is more than so many standard deviations "
        "above the mean of the last spike_window good ones. null: never.",
    )
    spike_window: int = Field(
        default=100, ge=2, description="Good steps that a loss is compared with."
    )
    hang_timeout_seconds: float | None = Field(
        default=1800.0,
        ge=1,
        description="A run that has done nothing for so long ends with status 3, naming the rank "
        "that the others wait for: more than the longest step, evaluation or compilation takes. "
        "null: it waits for ever.",
    )
    replica_check_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two comparisons of the weights that several ranks hold. Where "
        "they differ, the run ends with status 3. null: never.",
    )


class MagnetarConfig(StrictModel):
    """Everything that DeepSpeed's own keys do not say."""

    model: ModelConfig = Field(description="The model.")
    data: DataConfig = Field(description="What is read.")
    training: TrainingConfig = Field(description="The loop.")
    sparse_clip: SparseClipConfig = Field(default=SparseClipConfig(), description="SparseClip.")
    guards: GuardsConfig = Field(default=GuardsConfig(), description="Faults.")


class ConfigFile(DeepSpeedKeys):
    """A whole file: DeepSpeed's keys and `magnetar`."""

    magnetar: MagnetarConfig = Field(description="Model, data, training, SparseClip and guards.")


@dataclass(frozen=True)
class RunConfig:
    """A checked run: DeepSpeed's sections with defaults filled in, and Magnetar's."""

    deepspeed: dict[str, Any]
    magnetar: MagnetarConfig

    @property
    def model(self) -> ModelConfig:
        """The model's section."""
        return self.magnetar.model

    @property
    def data(self) -> DataConfig:
        """The data's section."""
        return self.magnetar.data

    @property
    def training(self) -> TrainingConfig:
        """The loop's section."""
        return self.magnetar.training

    @property
    def sparse_clip(self) -> SparseClipConfig:
        """SparseClip's section."""
        return self.magnetar.sparse_clip

    @property
    def guards(self) -> GuardsConfig:
        """The section of faults."""
        return self.magnetar.guards

    @property
    def dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """The type of weights and activations."""
        if self.deepspeed.get("bf16", {}).get("enabled"):
            return "bf16"
        return "fp16" if self.deepspeed.get("fp16", {}).get("enabled") else "fp32"

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage."""
        return self.deepspeed["zero_optimization"]["stage"]

    @property
    def gradient_clipping(self) -> float:
        """The threshold of the gradient norm; 0 means no clipping."""
        return self.deepspeed["gradient_clipping"]

    def to_dict(self) -> dict[str, Any]:
        """The whole resolved JSON; loading it again gives an equal RunConfig."""
        magnetar = self.magnetar.model_dump(mode="json")
        return {**copy.deepcopy(self.deepspeed), "magnetar": magnetar}


def _resolved(
    values: dict[str, Any], magnetar: MagnetarConfig, world_size: int | None
) -> dict[str, Any]:
    """DeepSpeed's sections as DeepSpeed will get them."""
    keys = DeepSpeedKeys.model_construct(**values)
    out = keys.model_dump(mode="json", exclude_none=True)
    if world_size is not None:
        sizes = filled(BatchSizes(values[TRAIN], values[MICRO], values[ACCUMULATION]), world_size)
        out |= {TRAIN: sizes.train, MICRO: sizes.micro, ACCUMULATION: sizes.accumulation}
    zero = out["zero_optimization"]
    if magnetar.model.moe is not None and zero["stage"] in (1, 2):
        zero.setdefault("parameter_alignment", True)
    return out


def load_config(
    path: Path, overrides: Sequence[str] = (), world_size: int | None = None
) -> RunConfig:
    """The run that a JSON file and `--set` overrides describe; UserError lists all that is wrong.

    With a world size the batch sizes are filled in and what depends on the ranks is checked.
    """
    raw, repeated = read_json_object(Path(path))
    set_paths, complaints = apply_overrides(raw, overrides)
    lines = repeated + complaints
    config, problems = check_config(raw, world_size)
    lines += [text + _set_note(where, set_paths, overrides) for where, text in problems]
    if lines or config is None:
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError("\n  ".join([f"{path} has {count}:", *lines]))
    return config


def _set_note(where: str, set_paths: Sequence[str], overrides: Sequence[str]) -> str:
    """Says which `--set` a problem came from."""
    for path, text in zip(set_paths, overrides, strict=True):
        # The key, one above it (an unknown section is refused as a whole), or one below it.
        if (
            where == path
            or path.startswith(f"{where}.")
            or where.startswith((f"{path}.", f"{path}["))
        ):
            return f" (from --set {text})"
    return ""


def _of_this_version(own: Any) -> Any:
    """The `magnetar` section, which a stored config may have from an earlier version."""
    model = own.get("model") if isinstance(own, dict) else None
    if not (isinstance(model, dict) and "moe" in model):
        return own
    return {**own, "model": {**model, "moe": without_retired_keys(model["moe"])}}


def check_config(
    raw: dict[str, Any], world_size: int | None = None
) -> tuple[RunConfig | None, list[Problem]]:
    """The run that a dict describes, or all that is wrong with it."""
    assert world_size is None or world_size >= 1
    if strange := strange_texts(raw):
        return None, strange
    raw = {key: value for key, value in raw.items() if key != "$schema"}
    elsewhere = key_paths(ConfigFile)
    own = _of_this_version(raw.pop("magnetar", None))
    values, problems = check_keys(DeepSpeedKeys, raw, "", elsewhere)
    if isinstance(own, dict):
        sections, more = check_keys(MagnetarConfig, own, "magnetar", elsewhere)
    elif own is None:
        sections, more = {}, [missing_key("magnetar", ConfigFile.model_fields["magnetar"])]
    else:
        sections, more = {}, [Problem("magnetar", f"magnetar={shown(own)} must be an object")]
    problems += more
    known = {**values, **sections}
    if world_size is not None:
        known["world_size"] = world_size
    problems += broken_rules(known)
    if all(name in values for name in (TRAIN, MICRO, ACCUMULATION)):
        sizes = BatchSizes(values[TRAIN], values[MICRO], values[ACCUMULATION])
        problems += batch_problems(sizes, world_size)
    if problems:
        return None, problems
    magnetar = MagnetarConfig.model_validate_json(json.dumps(own))
    if (
        magnetar.data.masking is None
        and magnetar.data.pairs is None
        and magnetar.model.architecture != "decoder"
    ):
        data = magnetar.data.model_copy(update={"masking": MaskingConfig()})
        magnetar = magnetar.model_copy(update={"data": data})
    return RunConfig(_resolved(values, magnetar, world_size), magnetar), []
