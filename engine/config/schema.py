"""The run's JSON: read, checked and resolved before any process group exists."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from magnetar.data.errors import UserError
from magnetar.engine.config.batch_sizes import ACCUMULATION, MICRO, TRAIN, BatchSizes, filled
from magnetar.engine.config.deepspeed import DeepSpeedKeys
from magnetar.engine.config.errors import (
    Problem,
    apply_overrides,
    problems_of,
    read_config_file,
    shown,
    strange_texts,
)
from magnetar.engine.config.rules import broken_rules
from magnetar.models.config import ModelConfig
from magnetar.models.section import (
    Count,
    NonNegative,
    Positive,
    Share,
    StrictModel,
    WholeNumber,
    one_problem,
)

# Earlier versions stored this section, which did nothing.
_RETIRED_SECTIONS = [("checkpoint", {"tag_validation": v}) for v in ("Ignore", "Warn", "Fail")]

SaveEvery = Annotated[Count | Literal["never"] | None, WrapValidator(one_problem)]
Text = Annotated[str, Field(min_length=1)]


class _KeysOfAKind(StrictModel):
    """A section with keys that belong to some values of another of its keys.

    Attributes:
        kind: the other key, and the values to which each of the keys belongs.
    """

    kind: ClassVar[tuple[str, dict[str, tuple[str, ...]]]]

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> Self:
        name, values_of = self.kind
        given = getattr(self, name)
        lines = []
        for key, values in values_of.items():
            if given not in values and key in self.model_fields_set:
                kinds = " or ".join(map(repr, values))
                lines.append(
                    f"{key}={shown(getattr(self, key))} belongs to {name} {kinds}, but {name} is "
                    f"{given!r}: remove it, or use {name} {kinds}"
                )
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @model_serializer(mode="wrap")
    def _only_keys_of_the_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        name, values_of = self.kind
        fields = handler(self)
        given = fields[name]
        return {k: v for k, v in fields.items() if given in values_of.get(k, (given,))}


class MaskingConfig(_KeysOfAKind):
    """What an encoder, or the encoder of an encoder-decoder, is not shown."""

    kind: ClassVar = ("unit", {"mean_span_length": ("span",)})

    probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of each sequence's tokens that is masked, rounded; at least one token."""
    unit: Literal["token", "span"] = "token"
    """What is masked at a time: single tokens, or runs of tokens (SpanBERT, arXiv 1907.10529)."""
    mean_span_length: float = Field(default=3.0, ge=1)
    """Mean length of a span, in tokens; lengths are geometric. Only with `span`."""
    replace: Literal["bert", "mask"] = "bert"
    """What masked tokens become. `bert`: 80 % become the mask token, 10 % a random one, 10 % stay.
    `mask`: all become the mask token."""


class PairsConfig(StrictModel):
    """Sentence pairs, for an `encoder_decoder` that translates.

    A sample of DeepSpeed's is then a bin: pairs of similar length side by side. `train_batch_size`
    is the bins of a step, and `train_micro_batch_size_per_gpu` is 1.
    """

    bin_tokens: int = Field(default=8192, ge=16)
    """Largest size of a bin: pairs * (source length + target length), in tokens with padding."""
    temperature: float = Field(default=5.0, ge=1)
    """Temperature T: a direction of n pairs is drawn with probability proportional to n^(1/T)
    (arXiv 1907.05019). A pair of a table with weight w counts w times. 1: directions are drawn in
    proportion to their pairs. Larger: small directions are drawn more often."""
    directions: list[str] | None = None
    """Directions to learn, such as ["en-de", "de-en"]. null: every direction."""
    too_long: Literal["drop", "truncate", "refuse"] = "drop"
    """Treatment of training pairs longer than seq_len or the targets' limit; their number is
    reported. A truncated side keeps its end. Validation always truncates."""
    too_long_inference: Literal["split", "truncate", "refuse"] = "split"
    """Treatment of a sentence longer than the model's positions in magnetar translate without
    --too-long; their number is reported. `split`: each sentence in it is translated alone. BLEU and
    chrF are measured with truncation."""


class DataConfig(StrictModel):
    """What is read."""

    path: Text
    """Folder written by magnetar prepare, or with `pairs` by magnetar prepare-pairs."""
    seq_len: Count
    """Tokens in a training sequence, up to max_seq_len and max_target_len. With `pairs`: tokens of
    the longest source; targets have up to max_target_len."""
    pairs: PairsConfig | None = None
    """Sentence pairs in place of running text. null: text."""
    masking: MaskingConfig | None = None
    """Masking of the encoder's input. null: the section's defaults with architecture `encoder` (a
    masked language model) and `encoder_decoder` (which learns to restore the text). A `decoder` has
    none, and with `pairs` nothing is masked."""


_ENDING = ("polynomial", "cosine", "wsd")


class LRSchedule(_KeysOfAKind):
    """The learning rate over the steps: a linear warm-up to `optimizer.params.lr`, then this."""

    kind: ClassVar = (
        "type",
        {
            "total_steps": _ENDING,
            "end_lr": _ENDING,
            "power": ("polynomial",),
            "decay_steps": ("wsd",),
            "decay": ("wsd",),
        },
    )

    type: Literal["polynomial", "inverse_sqrt", "constant", "cosine", "wsd"]
    """Shape after the warm-up. `polynomial`: falls to end_lr at total_steps. `cosine`: the same
    along half a cosine (arXiv 1608.03983). `wsd`: stays, and falls to end_lr in the decay_steps
    before total_steps (arXiv 2404.06395). `inverse_sqrt`: lr * sqrt(warmup_steps / step).
    `constant`: stays."""
    warmup_steps: WholeNumber
    """Steps of the linear rise from warmup_start_lr."""
    warmup_start_lr: NonNegative = 0.0
    """Learning rate from which the warm-up rises; its first step is above it."""
    total_steps: Count | None = None
    """Step at which end_lr is reached. null: training.num_steps. Only with types `polynomial`,
    `cosine` and `wsd`."""
    power: Positive = 1.0
    """Power of the polynomial. 1: a straight line. Only with it."""
    end_lr: NonNegative = 0.0
    """Last learning rate. Only with types `polynomial`, `cosine` and `wsd`."""
    decay_steps: Count | None = None
    """Steps of the fall to end_lr. Required by type `wsd`, and only with it."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """Shape of the fall over its share t: 1 - t, or 1 - sqrt(t) (arXiv 2405.18392). Only with type
    `wsd`."""

    @property
    def ends(self) -> bool:
        """Whether total_steps ends it."""
        return self.type in _ENDING

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Self:
        if self.type == "inverse_sqrt" and self.warmup_steps < 1:
            raise ValueError(
                "warmup_steps=0 leaves type 'inverse_sqrt' without a starting point: use "
                "warmup_steps 1 or more, or type 'constant'"
            )
        if self.warmup_start_lr and self.warmup_steps < 2:
            raise ValueError(
                f"warmup_start_lr={self.warmup_start_lr:g} needs a warm-up of 2 steps or more, and "
                f"warmup_steps is {self.warmup_steps}: use more, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _decay_has_steps(self) -> Self:
        if self.type == "wsd" and self.decay_steps is None:
            raise ValueError(
                "decay_steps is missing: type 'wsd' needs the number of steps in which the rate "
                "falls, or use type 'constant'"
            )
        return self


class TrainingConfig(StrictModel):
    """The loop: how long, how often, where to."""

    run_dir: Text
    """Folder of the run's output."""
    init_from: Text | None = None
    """Source of the first weights, for fine-tuning: another run's folder (its newest checkpoint),
    or a folder that magnetar convert has written. null: random weights."""
    seed: WholeNumber = 1
    """Seed of weights, data order and dropout."""
    num_steps: Count
    """Optimizer steps of the whole run."""
    z_loss_weight: NonNegative = 0.0
    """Weight of the mean of log^2 Z, where Z is the sum of the exponentials of a target's logits
    (arXiv 2309.14322: 1e-4). Validation losses do not include it."""
    label_smoothing: Share = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary (arXiv
    1512.00567). Reported and validation losses do not include it."""
    independent_weight_decay: bool = False
    """Whether weights shrink by weight_decay times the schedule's factor alone, and not times the
    learning rate as well (arXiv 2309.14322). Only with optimizer `AdamW`."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay d of an exponential moving average of the weights, which becomes d * average + (1 - d)
    * weights after each update. It is in the checkpoints, and the option --ema of commands that
    read a run uses it. null: none."""
    activation_checkpointing: bool = False
    """Whether the backward pass keeps only the input of each layer and computes the layer again:
    less memory, a third more work, the same numbers. It may change when a run goes on."""
    compile: bool = False
    """Whether torch.compile compiles attention, norms and dense networks: about 10 % more tokens a
    second on a GPU, a minute before the first step, and other rounding. Not with ZeRO 3. It may
    change when a run goes on, which then has other last digits."""
    lr_schedule: LRSchedule
    """Learning rate over the steps."""
    log_every: Count = 10
    """Steps between two lines of the log."""
    eval_every: Count | None = None
    """Steps between two evaluations. null: none."""
    eval_sequences: Count | None = None
    """Sequences evaluated, from the start of the validation split; with data.pairs, pairs of each
    direction. null: all."""
    eval_translations: WholeNumber = 0
    """Sentences of each direction, from the start of the validation split, that every evaluation
    translates greedily for BLEU and chrF; the last one uses a beam of 4 too. Only with
    data.pairs."""
    save_every: SaveEvery = None
    """Steps between two checkpoints. null: one at the end only, so a run that is killed starts
    over. `never`: none at all, so a run leaves its numbers and no model."""
    keep_checkpoints: Count = 2
    """Checkpoints kept; older ones are removed."""
    resume: Literal["auto", "never"] = "auto"
    """Whether a run goes on from the newest checkpoint in run_dir. `auto`: if there is one.
    `never`: it starts anew."""
    sample_tokens: WholeNumber = 60
    """Tokens of each text shown at the end: a decoder writes, an encoder fills in. 0: none."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        schedule = self.lr_schedule
        if not schedule.ends:
            return self
        total = schedule.total_steps or self.num_steps
        name = "lr_schedule.total_steps" if schedule.total_steps else "num_steps"
        if schedule.warmup_steps > total:
            raise ValueError(
                f"lr_schedule.warmup_steps={schedule.warmup_steps} must not exceed {name}={total}: "
                f"use at most {total}, or more steps"
            )
        room = total - schedule.warmup_steps
        if (schedule.decay_steps or 0) > room:
            raise ValueError(
                f"lr_schedule.decay_steps={schedule.decay_steps} must not exceed the {room} steps "
                f"between the warm-up and {name}={total}: use at most {room}, or more steps"
            )
        return self


class SparseClipConfig(StrictModel):
    """SparseClip (arXiv 2211.13184): clipping by a norm in which experts count 1/sqrt(E)."""

    enabled: bool = True
    """Whether gradient_clipping is SparseClip's threshold. false: it is a threshold of the plain
    norm, in which every expert counts in full."""


class GuardsConfig(StrictModel):
    """What a run does about faults. All of it may change when a run goes on."""

    max_bad_steps: Count = 5
    """Bad steps in a row before the run goes back to its newest checkpoint and leaves out the
    batches between. A step is bad if its loss or gradient norm is not finite; it updates
    nothing."""
    max_rollbacks: WholeNumber = 3
    """Returns to one checkpoint; if one more is needed, the run ends as diverged."""
    spike_deviations: Positive | None = None
    """Distance of a loss, in standard deviations above the mean of the last spike_window good ones,
    from which its step is bad too. null: no step is bad because of it."""
    spike_window: int = Field(default=100, ge=2)
    """Good steps that a loss is compared with."""
    hang_timeout_seconds: float | None = Field(default=1800.0, ge=1)
    """Seconds without progress after which the run ends with status 3 and names the rank that the
    others wait for: more than the longest step, evaluation or compilation takes. null: the run
    waits for ever."""
    replica_check_every: Count | None = None
    """Steps between two comparisons of the weights that several ranks hold. If they differ, the run
    ends with status 3. null: never."""


class _TopLevel(StrictModel):
    """A model whose valid values are known even if others are not.

    Each of them is put into the validation's context under its name, defaults included.
    """

    model_config = ConfigDict(validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _record(cls, value: Any, info: ValidationInfo) -> Any:
        if info.context is not None:
            info.context[info.field_name] = value
        return value


class MagnetarConfig(_TopLevel):
    """Everything that DeepSpeed's own keys do not say."""

    model: ModelConfig
    """Model."""
    data: DataConfig
    """Data."""
    training: TrainingConfig
    """Training loop."""
    sparse_clip: SparseClipConfig = SparseClipConfig()
    """SparseClip."""
    guards: GuardsConfig = GuardsConfig()
    """Faults."""


class ConfigFile(_TopLevel, DeepSpeedKeys):
    """A whole file: DeepSpeed's keys and `magnetar`."""

    magnetar: MagnetarConfig
    """Model, data, training, SparseClip and guards."""


class Layout(NamedTuple):
    """Number of ranks, ranks that share one set of experts, and the ZeRO stage."""

    world_size: int
    ep_size: int
    zero_stage: int

    @classmethod
    def stored(cls, manifest: Mapping[str, Any]) -> Self:
        """The layout that wrote a checkpoint, from its manifest. No reader depends on it."""
        return cls(*(manifest["layout"][field] for field in cls._fields))

    def __str__(self) -> str:
        """The layout as options of a command."""
        return (
            f"--world-size {self.world_size} --ep-size {self.ep_size} "
            f"--zero-stage {self.zero_stage}"
        )

    def in_words(self) -> str:
        """`2 ranks, ep_size 2, ZeRO 1`: what runs where."""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        return f"{ranks}, ep_size {self.ep_size}, ZeRO {self.zero_stage}"


class RunConfig(MagnetarConfig):
    """A checked run: Magnetar's sections, and DeepSpeed's with defaults filled in."""

    deepspeed: dict[str, Any]

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

    def layout(self, world_size: int) -> Layout:
        """The layout of this run on so many ranks."""
        return Layout(world_size, self.model.moe.ep_size if self.model.moe else 1, self.zero_stage)

    @property
    def gradient_clipping(self) -> float:
        """The threshold of the gradient norm; 0 means no clipping."""
        return self.deepspeed["gradient_clipping"]

    def to_dict(self) -> dict[str, Any]:
        """The whole resolved JSON; loading it again gives an equal RunConfig."""
        magnetar = self.model_dump(mode="json", exclude={"deepspeed"})
        return {**copy.deepcopy(self.deepspeed), "magnetar": magnetar}


def load_config(
    path: Path, overrides: Sequence[str] = (), world_size: int | None = None
) -> RunConfig:
    """The run that a JSON file and `--set` overrides describe.

    Args:
        path: JSON file.
        overrides: texts of the form `path=value`.
        world_size: number of ranks, None if it is not known; with it the batch sizes are filled in
            and what depends on the ranks is checked.

    Raises:
        UserError: all that is wrong.
    """
    raw, lines = read_config_file(Path(path))
    set_paths, complaints = apply_overrides(raw, overrides)
    lines += complaints
    config, problems = check_config(raw, world_size)
    lines += [text + _set_note(where, set_paths, overrides) for where, text in problems]
    if lines or config is None:
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError("\n  ".join([f"{path} has {count}:", *lines]))
    return config


def _set_note(where: str, set_paths: Sequence[str], overrides: Sequence[str]) -> str:
    """The `--set` that a problem came from, as the end of its message."""
    for path, text in zip(set_paths, overrides, strict=True):
        # The key, one above it (an unknown section is refused as a whole), or one below it.
        if f"{path}.".startswith(f"{where}.") or where.startswith((f"{path}.", f"{path}[")):
            return f" (from --set {text})"
    return ""


def check_config(
    raw: dict[str, Any], world_size: int | None = None
) -> tuple[RunConfig | None, list[Problem]]:
    """The run that a dict describes, or all that is wrong with it."""
    assert world_size is None or world_size >= 1
    if strange := strange_texts(raw):
        return None, strange
    raw = {k: v for k, v in raw.items() if k != "$schema" and (k, v) not in _RETIRED_SECTIONS}
    valid: dict[str, Any] = {"world_size": world_size}  # filled by _TopLevel
    problems: list[Problem] = []
    try:
        file = ConfigFile.model_validate_json(json.dumps(raw), context=valid)
    except ValidationError as error:
        problems = problems_of(error, ConfigFile)
    problems += broken_rules(valid)
    if problems:
        return None, problems
    sections = dict(file.magnetar)
    data = file.magnetar.data
    reads_text = data.pairs is None and file.magnetar.model.architecture != "decoder"
    if reads_text and data.masking is None:
        sections["data"] = data.model_copy(update={"masking": MaskingConfig()})
    return RunConfig.model_construct(**sections, deepspeed=_resolved(file, world_size)), []


def _resolved(file: ConfigFile, world_size: int | None) -> dict[str, Any]:
    """DeepSpeed's sections as DeepSpeed will get them."""
    out = file.model_dump(mode="json", exclude={"magnetar"}, exclude_none=True)
    if world_size is not None:
        names = (TRAIN, MICRO, ACCUMULATION)
        out |= zip(names, filled(BatchSizes(*map(out.get, names)), world_size), strict=True)
    zero = out["zero_optimization"]
    if file.magnetar.model.moe is not None and zero["stage"] in (1, 2):
        zero.setdefault("parameter_alignment", True)
    return out
