"""The rules that tie keys of different sections together.

A rule's parameters are the sections it needs, by name. It is asked only if each of them is valid by
itself, and yields a message for each contradiction.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from magnetar.engine.config.batch_sizes import BatchSizes, batch_problems
from magnetar.engine.config.deepspeed import (
    EIGHT_BIT,
    Bf16Config,
    DataTypesConfig,
    Fp16Config,
    OptimizerConfig,
    ZeroConfig,
)
from magnetar.engine.config.errors import Problem, problem, shown
from magnetar.models.config import ModelConfig

Problems = Iterator[Problem]


def _on(precision: Bf16Config | Fp16Config | None) -> bool:
    return precision is not None and precision.enabled


def adam_w_is_decoupled(optimizer: OptimizerConfig) -> Problems:
    """AdamW with an L2 penalty is a contradiction that DeepSpeed resolves silently."""
    if optimizer.type != "Adam" and not optimizer.params.adam_w_mode:
        yield problem(
            "optimizer.params.adam_w_mode",
            False,
            f'contradicts optimizer.type="{optimizer.type}": remove it for decoupled weight '
            'decay, or use type "Adam" for an L2 penalty',
        )


def eight_bits_are_bitsandbytes(
    optimizer: OptimizerConfig, zero_optimization: ZeroConfig
) -> Problems:
    """AdamW8bit has a key of its own, and some keys of other types do not go with it."""
    params, offload = optimizer.params, zero_optimization.offload_optimizer
    own = shown(EIGHT_BIT)
    if optimizer.type != EIGHT_BIT:
        if params.min_8bit_size is not None:
            yield problem(
                "optimizer.params.min_8bit_size",
                params.min_8bit_size,
                f"belongs to type {own}, not to {shown(optimizer.type)}, whose moments are all "
                f"float32: remove it, or use {own}",
            )
        return
    if params.torch_adam:
        yield problem(
            "optimizer.params.torch_adam",
            True,
            f"contradicts optimizer.type={own}, which is bitsandbytes' own: remove it, or use type "
            '"AdamW"',
        )
    if offload is not None and offload.device != "none":
        yield problem(
            "zero_optimization.offload_optimizer.device",
            offload.device,
            f"does not go with optimizer.type={own}, which updates on the device: remove "
            'offload_optimizer (8-bit moments take a quarter of the memory), or use type "AdamW"',
        )


def clipping_has_a_threshold(gradient_clipping: float, sparse_clip: Any) -> Problems:
    """SparseClip needs a threshold."""
    if gradient_clipping == 0 and sparse_clip.enabled:
        yield Problem(
            "gradient_clipping",
            "gradient_clipping is 0 or absent while magnetar.sparse_clip.enabled=true: SparseClip "
            "has no threshold: set gradient_clipping (1.0, say), or "
            "magnetar.sparse_clip.enabled=false",
        )


def one_precision(
    bf16: Bf16Config | None, fp16: Fp16Config | None, zero_optimization: ZeroConfig
) -> Problems:
    """Bf16 and fp16 exclude each other, and both need ZeRO 1, 2 or 3."""
    if _on(bf16) and _on(fp16):
        yield Problem(
            "fp16.enabled",
            "bf16.enabled=true and fp16.enabled=true contradict each other: keep one of them",
        )
    if zero_optimization.stage > 0:
        return
    way_out = "set zero_optimization.stage=1 (on one rank it takes the same memory)"
    if _on(bf16):
        yield problem(
            "zero_optimization.stage",
            0,
            "does not go with bf16.enabled=true: DeepSpeed 0.19.8 takes a dummy optimizer step "
            "first there, which leaves Adam's counter one ahead and decays the weights: "
            f"{way_out}",
        )
    if _on(fp16):
        yield problem(
            "zero_optimization.stage",
            0,
            "does not go with fp16.enabled=true: DeepSpeed 0.19.8 never scales the loss there, "
            f"while its step divides by the scale: {way_out}, or use bf16",
        )


def gradients_accumulate_in_a_fitting_type(
    data_types: DataTypesConfig | None, bf16: Bf16Config | None, fp16: Fp16Config | None
) -> Problems:
    """Gradients accumulate in the weights' type or in float32."""
    given = data_types.grad_accum_dtype if data_types else None
    weights = "bf16" if _on(bf16) else "fp16" if _on(fp16) else "fp32"
    if given not in (None, weights, "fp32"):
        choices = '"fp32" or leave it out' if weights == "fp32" else f'"{weights}" or "fp32"'
        yield problem(
            "data_types.grad_accum_dtype",
            given,
            f"does not go with weights in {weights}: use {choices}",
        )


def norm_is_computed(zero_optimization: ZeroConfig) -> Problems:
    """Clipping and the logs need the gradient norm."""
    if not zero_optimization.compute_grad_norm:
        yield problem(
            "zero_optimization.compute_grad_norm",
            False,
            "leaves SparseClip and the logs without a norm: remove it",
        )


def experts_under_zero(zero_optimization: ZeroConfig, model: ModelConfig) -> Problems:
    """Under ZeRO 1 and 2 DeepSpeed moves and reduces experts rightly with some settings alone."""
    stage = zero_optimization.stage
    if model.moe is None or stage not in (1, 2):
        return
    if zero_optimization.parameter_alignment is False:
        yield problem(
            "zero_optimization.parameter_alignment",
            False,
            f"misaligns the experts' weights under ZeRO {stage}, where grouped matrix products "
            "need multiples of 16 bytes: set it to true, or remove it",
        )
    for name in ("contiguous_gradients", "reduce_scatter"):
        if not getattr(zero_optimization, name):
            yield problem(
                f"zero_optimization.{name}",
                False,
                f"with MoE layers under ZeRO {stage} averages the gradients of different experts, "
                "or stops: DeepSpeed 0.19.8 reduces experts rightly only with it on: remove it",
            )


def offloading_needs_zero(zero_optimization: ZeroConfig) -> Problems:
    """DeepSpeed moves nothing to the host without ZeRO."""
    offload = zero_optimization.offload_optimizer
    if zero_optimization.stage == 0 and offload is not None and offload.device != "none":
        yield problem(
            "zero_optimization.offload_optimizer.device",
            offload.device,
            "needs ZeRO, but zero_optimization.stage=0: set stage 1, 2 or 3, or remove "
            "offload_optimizer",
        )


def experts_fit_grouped_matmuls(
    model: ModelConfig, bf16: Bf16Config | None, fp16: Fp16Config | None
) -> Problems:
    """A row of a grouped matrix product is a multiple of 16 bytes."""
    multiple = 8 if _on(bf16) or _on(fp16) else 4
    for name, width in (("d_model", model.d_model), ("d_ff", model.d_ff)):
        if model.moe is not None and width % multiple:
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


def a_decoder_masks_nothing(data: Any, model: ModelConfig) -> Problems:
    """A causal model sees the tokens before, and no masks."""
    if data.masking is not None and model.architecture == "decoder":
        yield Problem(
            "magnetar.data.masking",
            "magnetar.data.masking={...} belongs to magnetar.model.architecture 'encoder' or "
            "'encoder_decoder', but architecture is 'decoder', which predicts each token from "
            "those before it: remove it, or use another architecture",
        )


def pairs_are_translated(data: Any, model: ModelConfig) -> Problems:
    """Pairs have two sides, no masks, and bins of many shapes."""
    if data.pairs is None:
        return
    path = "magnetar.data.pairs"
    if model.architecture != "encoder_decoder":
        yield Problem(
            path,
            f"{path}={{...}} needs magnetar.model.architecture 'encoder_decoder', which reads one "
            f"side and writes the other, but architecture is {model.architecture!r}: use that, or "
            "remove pairs to train on text",
        )
    if data.masking is not None:
        yield Problem(
            "magnetar.data.masking",
            f"magnetar.data.masking={{...}} contradicts {path}, whose sources are read as they "
            "are: keep one of them",
        )
    if model.moe is not None and model.moe.dispatch == "capacity":
        yield problem(
            "magnetar.model.moe.dispatch",
            "capacity",
            f"does not go with {path}, whose bins differ in shape, so that an expert's room would "
            'depend on which bins meet: use "dropless"',
        )
    longest = data.seq_len + (model.max_target_len or model.max_seq_len)
    if data.pairs.bin_tokens < longest:
        yield problem(
            f"{path}.bin_tokens",
            data.pairs.bin_tokens,
            f"does not hold the longest pair, of magnetar.data.seq_len={data.seq_len} and "
            f"{longest - data.seq_len} target tokens: use at least {longest}, or shorter sequences",
        )


def a_bin_is_a_sample(data: Any, train_micro_batch_size_per_gpu: int | None) -> Problems:
    """Bins differ in shape, so a forward pass has one."""
    if data.pairs is not None and train_micro_batch_size_per_gpu != 1:
        yield problem(
            "train_micro_batch_size_per_gpu",
            train_micro_batch_size_per_gpu,
            "must be 1 with magnetar.data.pairs, where a sample is a bin of many sentences: set 1, "
            "and bin_tokens to what the memory holds",
        )


def translations_need_pairs(data: Any, training: Any) -> Problems:
    """Running text has nothing to translate."""
    if data.pairs is None and training.eval_translations:
        yield problem(
            "magnetar.training.eval_translations",
            training.eval_translations,
            "needs magnetar.data.pairs, and there is text alone: remove it, or prepare pairs",
        )


def the_model_can_train_on_text(model: ModelConfig) -> Problems:
    """Keys that only serve imported models leave training without a loss or without gradients."""
    if not model.output_projection:
        yield problem(
            "magnetar.model.output_projection",
            False,
            "leaves training without logits, so without a loss: remove it",
        )
    if model.multiway:
        yield problem(
            "magnetar.model.multiway",
            True,
            "needs two modalities, and a prepared folder holds text alone: half of the parameters "
            "would never get a gradient: remove it (such a model is built in Python, or imported)",
        )


def independent_decay_is_adam_ws(optimizer: OptimizerConfig, training: Any) -> Problems:
    """Only a decoupled decay can be independent of the learning rate."""
    if training.independent_weight_decay and optimizer.type == "Adam":
        yield problem(
            "magnetar.training.independent_weight_decay",
            True,
            'needs optimizer.type "AdamW", whose decay stands beside the gradient\'s update, not '
            '"Adam": use type "AdamW", or remove it',
        )


def checkpointing_is_switched_on(activation_checkpointing: Any, training: Any) -> Problems:
    """DeepSpeed's section has the details; Magnetar's key switches it on."""
    if activation_checkpointing is not None and not training.activation_checkpointing:
        yield Problem(
            "activation_checkpointing",
            "activation_checkpointing={...} says how, but "
            "magnetar.training.activation_checkpointing=false says that there is none: set that to "
            "true, or remove the section",
        )


def compiled_blocks_keep_their_weights(zero_optimization: Any, training: Any) -> Problems:
    """Sharded weights are collected in hooks of modules, which compiled blocks do not call."""
    if training.compile and zero_optimization.stage == 3:
        yield problem(
            "magnetar.training.compile",
            True,
            "contradicts zero_optimization.stage=3, which collects each module's weights when it "
            "is called: use stage 1 or 2, or remove it",
        )


def ranks_hold_experts(model: ModelConfig, world_size: int | None) -> Problems:
    """ep_size divides the number of ranks."""
    if world_size is None or model.moe is None or world_size % model.moe.ep_size == 0:
        return
    ep_size = model.moe.ep_size
    sizes = [size for size in model.moe.possible_ep_sizes if world_size % size == 0]
    below = world_size // ep_size * ep_size
    ranks = f"{below} or {below + ep_size}" if below else f"{ep_size}"
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
    adam_w_is_decoupled,
    eight_bits_are_bitsandbytes,
    clipping_has_a_threshold,
    one_precision,
    gradients_accumulate_in_a_fitting_type,
    norm_is_computed,
    experts_under_zero,
    offloading_needs_zero,
    experts_fit_grouped_matmuls,
    sequences_fit,
    a_decoder_masks_nothing,
    pairs_are_translated,
    a_bin_is_a_sample,
    translations_need_pairs,
    the_model_can_train_on_text,
    independent_decay_is_adam_ws,
    checkpointing_is_switched_on,
    compiled_blocks_keep_their_weights,
    ranks_hold_experts,
    batch_sizes_fit,
)


def broken_rules(valid: dict[str, Any]) -> list[Problem]:
    """The messages of every rule whose sections are all valid."""
    problems: list[Problem] = []
    for rule in RULES:
        needed = inspect.signature(rule).parameters
        if needed.keys() <= valid.keys():
            problems += rule(**{name: valid[name] for name in needed})
    return problems
