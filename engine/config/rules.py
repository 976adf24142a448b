"""The rules that tie keys of different sections together.

A rule names the sections that it needs as parameters. It is asked only if each of them is valid by
itself.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

from pydantic import BaseModel

from magnetar.engine.config.batch_sizes import BatchSizes, batch_problems, multiples_near
from magnetar.engine.config.deepspeed import EIGHT_BIT, LION, RADAM, AdamParams, DataTypesConfig
from magnetar.engine.config.errors import Problem, problem, shown
from magnetar.models.config import ModelConfig


class Contradiction(NamedTuple):
    """A value that does not go with another one.

    Attributes:
        path: Key at fault. The message begins with it and its value.
        is_there: Function of sections, by their names: whether they contradict each other.
        words: Rest of the message. Names of valid keys in braces stand for their values.
    """

    path: str
    is_there: Callable[..., Any]
    words: str


def _on(section: Any) -> bool:
    return section is not None and section.enabled


def _offloads(zero_optimization: Any) -> bool:
    offload = zero_optimization.offload_optimizer
    return offload is not None and offload.device != "none"


def _experts_are_reduced(zero_optimization: Any, model: ModelConfig) -> bool:
    """Whether DeepSpeed's ZeRO 1 or 2 moves and reduces experts' gradients."""
    return model.moe is not None and zero_optimization.stage in (1, 2)


def _misdirected(name: str) -> Contradiction:
    return Contradiction(
        f"zero_optimization.{name}",
        lambda zero_optimization, model: (
            _experts_are_reduced(zero_optimization, model) and not getattr(zero_optimization, name)
        ),
        "with MoE layers under ZeRO {zero_optimization.stage} averages the gradients of different "
        "experts, or stops: DeepSpeed 0.19.8 reduces experts rightly only with it on: remove it",
    )


_STAGE_1 = "set zero_optimization.stage=1 (on one rank it takes the same memory)"
_8BIT = shown(EIGHT_BIT)

CONTRADICTIONS = (
    Contradiction(  # DeepSpeed would decouple the decay without a word
        "optimizer.params.adam_w_mode",
        lambda optimizer: optimizer.type != "Adam" and not optimizer.params.adam_w_mode,
        'contradicts optimizer.type="{optimizer.type}": remove it for decoupled weight decay, or '
        'use type "Adam" for an L2 penalty',
    ),
    Contradiction(
        "optimizer.params.min_8bit_size",
        lambda optimizer: optimizer.type != EIGHT_BIT and optimizer.params.min_8bit_size,
        f'belongs to type {_8BIT}, not to "{{optimizer.type}}", whose moments are all float32: '
        f"remove it, or use {_8BIT}",
    ),
    Contradiction(
        "optimizer.params.torch_adam",
        lambda optimizer: optimizer.type == EIGHT_BIT and optimizer.params.torch_adam,
        f"contradicts optimizer.type={_8BIT}, which is bitsandbytes' own: remove it, or use type "
        '"AdamW"',
    ),
    Contradiction(
        "optimizer.params.torch_adam",
        lambda optimizer: (
            optimizer.type in (RADAM, LION) and optimizer.params.torch_adam is not None
        ),
        'belongs to types "Adam" and "AdamW", not to "{optimizer.type}", which has one '
        "implementation: remove it",
    ),
    Contradiction(
        "optimizer.params.eps",
        lambda optimizer: (
            optimizer.type == LION
            and optimizer.params.eps != AdamParams.model_fields["eps"].default
        ),
        'says nothing with optimizer.type="Lion", whose update has no denominator: remove it',
    ),
    Contradiction(
        "zero_optimization.offload_optimizer.device",
        lambda optimizer, zero_optimization: (
            optimizer.type == EIGHT_BIT and _offloads(zero_optimization)
        ),
        f"does not go with optimizer.type={_8BIT}, which updates on the device: remove "
        'offload_optimizer (8-bit moments take a quarter of the memory), or use type "AdamW"',
    ),
    Contradiction(
        "gradient_clipping",
        lambda gradient_clipping, sparse_clip: gradient_clipping == 0 and sparse_clip.enabled,
        "or absent while magnetar.sparse_clip.enabled=true: SparseClip has no threshold: set "
        "gradient_clipping (1.0, say), or magnetar.sparse_clip.enabled=false",
    ),
    Contradiction(
        "bf16.enabled",
        lambda bf16, fp16: _on(bf16) and _on(fp16),
        "and fp16.enabled=true contradict each other: keep one of them",
    ),
    Contradiction(
        "zero_optimization.stage",
        lambda bf16, zero_optimization: _on(bf16) and zero_optimization.stage == 0,
        "does not go with bf16.enabled=true: DeepSpeed 0.19.8 takes a dummy optimizer step first "
        "there, which leaves Adam's counter one ahead and decays the weights: " + _STAGE_1,
    ),
    Contradiction(
        "zero_optimization.stage",
        lambda fp16, zero_optimization: _on(fp16) and zero_optimization.stage == 0,
        "does not go with fp16.enabled=true: DeepSpeed 0.19.8 never scales the loss there, while "
        f"its step divides by the scale: {_STAGE_1}, or use bf16",
    ),
    Contradiction(
        "zero_optimization.compute_grad_norm",
        lambda zero_optimization: not zero_optimization.compute_grad_norm,
        "leaves SparseClip and the logs without a norm: remove it",
    ),
    Contradiction(
        "zero_optimization.parameter_alignment",
        lambda zero_optimization, model: (
            _experts_are_reduced(zero_optimization, model)
            and zero_optimization.parameter_alignment is False
        ),
        "misaligns the experts' weights under ZeRO {zero_optimization.stage}, where grouped matrix "
        "products need multiples of 16 bytes: set it to true, or remove it",
    ),
    _misdirected("contiguous_gradients"),
    _misdirected("reduce_scatter"),
    Contradiction(
        "zero_optimization.offload_optimizer.device",
        lambda zero_optimization: zero_optimization.stage == 0 and _offloads(zero_optimization),
        "needs ZeRO, but zero_optimization.stage=0: set stage 1, 2 or 3, or remove "
        "offload_optimizer",
    ),
    Contradiction(
        "magnetar.data.masking",
        lambda data, model: data.masking is not None and model.architecture == "decoder",
        "belongs to magnetar.model.architecture 'encoder' or 'encoder_decoder', but architecture "
        "is 'decoder', which predicts each token from those before it: remove it, or use another "
        "architecture",
    ),
    Contradiction(
        "magnetar.data.pairs",
        lambda data, model: data.pairs is not None and model.architecture != "encoder_decoder",
        "needs magnetar.model.architecture 'encoder_decoder', which reads one side and writes the "
        "other, but architecture is '{model.architecture}': use that, or remove pairs to train on "
        "text",
    ),
    Contradiction(
        "magnetar.data.masking",
        lambda data, model: data.masking is not None and data.pairs is not None,
        "contradicts magnetar.data.pairs, whose sources are read as they are: keep one of them",
    ),
    Contradiction(
        "magnetar.model.moe.dispatch",
        lambda data, model: data.pairs and model.moe and model.moe.dispatch == "capacity",
        "does not go with magnetar.data.pairs, whose bins differ in shape, so that an expert's "
        'room would depend on which bins meet: use "dropless"',
    ),
    Contradiction(
        "train_micro_batch_size_per_gpu",
        lambda data, train_micro_batch_size_per_gpu: (
            data.pairs is not None and train_micro_batch_size_per_gpu != 1
        ),
        "must be 1 with magnetar.data.pairs, where a sample is a bin of many sentences: set 1, and "
        "bin_tokens to what the memory holds",
    ),
    Contradiction(
        "magnetar.training.eval_translations",
        lambda data, training: data.pairs is None and training.eval_translations,
        "needs magnetar.data.pairs, and there is text alone: remove it, or prepare pairs",
    ),
    Contradiction(
        "magnetar.model.output_projection",
        lambda model: not model.output_projection,
        "leaves training without logits, so without a loss: remove it",
    ),
    Contradiction(
        "magnetar.model.multiway",
        lambda model: model.multiway,
        "needs two modalities, and a prepared folder holds text alone: half of the parameters "
        "would never get a gradient: remove it (such a model is built in Python, or imported)",
    ),
    Contradiction(
        "magnetar.training.independent_weight_decay",
        lambda optimizer, training: training.independent_weight_decay and optimizer.type == "Adam",
        'needs optimizer.type "AdamW", whose decay stands beside the gradient\'s update, not '
        '"Adam": use type "AdamW", or remove it',
    ),
    Contradiction(
        "activation_checkpointing",
        lambda activation_checkpointing, training: (
            activation_checkpointing is not None and not training.activation_checkpointing
        ),
        "says how, but magnetar.training.activation_checkpointing=false says that there is none: "
        "set that to true, or remove the section",
    ),
    Contradiction(  # compiled blocks do not call the hooks of modules
        "magnetar.training.compile",
        lambda zero_optimization, training: training.compile and zero_optimization.stage == 3,
        "contradicts zero_optimization.stage=3, which collects each module's weights when it is "
        "called: use stage 1 or 2, or remove it",
    ),
)

Problems = Iterator[Problem]


def gradients_accumulate_in_a_fitting_type(
    data_types: DataTypesConfig | None, bf16: Any, fp16: Any
) -> Problems:
    """Gradients accumulate in the weights' type or in float32."""
    given = data_types.grad_accum_dtype if data_types else None
    weights = "bf16" if _on(bf16) else "fp16" if _on(fp16) else "fp32"
    if given not in (None, weights, "fp32"):
        choices = '"fp32" or leave it out' if weights == "fp32" else f'"{weights}" or "fp32"'
        words = f"does not go with weights in {weights}: use {choices}"
        yield problem("data_types.grad_accum_dtype", given, words)


def experts_fit_grouped_matmuls(model: ModelConfig, bf16: Any, fp16: Any) -> Problems:
    """A row of a grouped matrix product is a multiple of 16 bytes."""
    multiple = 8 if _on(bf16) or _on(fp16) else 4
    if model.moe is None:
        return
    widths = {"d_model": model.d_model, "d_ff": model.d_ff}
    if model.moe.expert_d_ff is not None:
        widths = {"d_model": model.d_model, "moe.expert_d_ff": model.moe.expert_d_ff}
    for name, width in widths.items():
        if width % multiple:
            yield problem(
                f"magnetar.model.{name}",
                width,
                f"must be a multiple of {multiple} in a model with MoE layers, whose grouped "
                f"matrix products need rows of 16 bytes: use {-(-width // multiple) * multiple}",
            )


def sequences_fit(data: Any, model: ModelConfig) -> Problems:
    """The data's windows are no longer than the model's positions, on either side."""
    limits = {"max_seq_len": model.max_seq_len}
    is_one_length = data.pairs is None  # targets of pairs have a length of their own
    if model.architecture == "encoder_decoder" and model.max_target_len and is_one_length:
        limits["max_target_len"] = model.max_target_len
    for name, limit in limits.items():
        if data.seq_len > limit:
            yield problem(
                "magnetar.data.seq_len",
                data.seq_len,
                f"must not exceed magnetar.model.{name}={limit}: use seq_len "
                f"{min(limits.values())}, or {name} {data.seq_len}",
            )


def a_bin_holds_the_longest_pair(data: Any, model: ModelConfig) -> Problems:
    """Every pair fits into a bin."""
    longest = data.seq_len + (model.max_target_len or model.max_seq_len)
    if data.pairs is not None and data.pairs.bin_tokens < longest:
        yield problem(
            "magnetar.data.pairs.bin_tokens",
            data.pairs.bin_tokens,
            f"does not hold the longest pair, of magnetar.data.seq_len={data.seq_len} and "
            f"{longest - data.seq_len} target tokens: use at least {longest}, or shorter sequences",
        )


def ranks_hold_experts(model: ModelConfig, world_size: int | None) -> Problems:
    """ep_size divides the number of ranks."""
    if world_size is None or model.moe is None or world_size % model.moe.ep_size == 0:
        return
    ep_size = model.moe.ep_size
    sizes = [size for size in model.moe.possible_ep_sizes if world_size % size == 0]
    ranks = multiples_near(world_size, ep_size)
    yield problem(
        "magnetar.model.moe.ep_size",
        ep_size,
        f"must divide the {world_size} ranks: use one of the ep_size {sizes}, or {ranks} ranks",
    )


def batch_sizes_fit(
    train_batch_size: int | None,
    train_micro_batch_size_per_gpu: int | None,
    gradient_accumulation_steps: int | None,
    world_size: int | None,
) -> Problems:
    """The sizes and the ranks multiply."""
    sizes = (train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)
    yield from batch_problems(BatchSizes(*sizes), world_size)


RULES: tuple[Callable[..., Problems], ...] = (
    gradients_accumulate_in_a_fitting_type,
    experts_fit_grouped_matmuls,
    sequences_fit,
    a_bin_holds_the_longest_pair,
    ranks_hold_experts,
    batch_sizes_fit,
)


def broken_rules(valid: dict[str, Any]) -> list[Problem]:
    """The messages of every rule whose sections are all valid."""

    def sections(rule: Callable[..., Any]) -> dict[str, Any] | None:
        needed = inspect.signature(rule).parameters
        return {name: valid[name] for name in needed} if needed.keys() <= valid.keys() else None

    problems: list[Problem] = []
    for path, is_there, words in CONTRADICTIONS:
        if (known := sections(is_there)) is not None and is_there(**known):
            first, *rest = path.removeprefix("magnetar.").split(".")
            value = reduce(getattr, rest, valid[first])
            given = "{...}" if isinstance(value, BaseModel) else shown(value)
            problems.append(Problem(path, f"{path}={given} {words.format(**valid)}"))
    for rule in RULES:
        if (known := sections(rule)) is not None:
            problems += rule(**known)
    return problems
