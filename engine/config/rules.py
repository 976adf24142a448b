"""The rules that tie keys of different sections together."""

from collections.abc import Callable
from typing import Any

from magnetar.engine.config.deepspeed import (
    EIGHT_BIT,
    Bf16Config,
    DataTypesConfig,
    Fp16Config,
    OptimizerConfig,
    ZeroConfig,
)
from magnetar.engine.config.errors import Problem, shown
from magnetar.models.config import ModelConfig


def _on(precision: Bf16Config | Fp16Config | None) -> bool:
    return precision is not None and precision.enabled


def adam_w_is_decoupled(optimizer: OptimizerConfig) -> list[Problem]:
    """AdamW with L2 penalty is a contradiction that DeepSpeed resolves silently."""
    if optimizer.type == "Adam" or optimizer.params.adam_w_mode:
        return []
    path = "optimizer.params.adam_w_mode"
    return [
        Problem(
            path,
            f'{path}=false contradicts optimizer.type="{optimizer.type}": remove it for decoupled '
            'weight decay, or use type "Adam" for an L2 penalty',
        )
    ]


def eight_bits_are_bitsandbytes(
    optimizer: OptimizerConfig, zero_optimization: ZeroConfig
) -> list[Problem]:
    """What AdamW8bit alone has, and what it has not."""
    params, offload = optimizer.params, zero_optimization.offload_optimizer
    path, own = "optimizer.params", shown(EIGHT_BIT)
    if optimizer.type != EIGHT_BIT:
        if params.min_8bit_size is None:
            return []
        return [
            Problem(
                f"{path}.min_8bit_size",
                f"{path}.min_8bit_size={params.min_8bit_size} belongs to type {own}, not to "
                f"{shown(optimizer.type)}, whose moments are all float32: remove it, or use {own}",
            )
        ]
    problems = []
    if params.torch_adam:
        problems.append(
            Problem(
                f"{path}.torch_adam",
                f"{path}.torch_adam=true contradicts optimizer.type={own}, which is of "
                'bitsandbytes: remove it, or use type "AdamW"',
            )
        )
    if offload is not None and offload.device != "none":
        path = "zero_optimization.offload_optimizer.device"
        problems.append(
            Problem(
                path,
                f"{path}={shown(offload.device)} does not go with optimizer.type={own}, "
                "which updates on the device: remove offload_optimizer (8-bit moments take a "
                'quarter of the memory), or use type "AdamW"',
            )
        )
    return problems


def clipping_has_a_threshold(gradient_clipping: float, sparse_clip: Any) -> list[Problem]:
    """SparseClip needs a threshold."""
    if gradient_clipping > 0 or not sparse_clip.enabled:
        return []
    return [
        Problem(
            "gradient_clipping",
            "gradient_clipping is 0 or absent while magnetar.sparse_clip.enabled=true: SparseClip "
            "has no threshold: set gradient_clipping (1.0, say), or "
            "magnetar.sparse_clip.enabled=false",
        )
    ]


def one_precision(
    bf16: Bf16Config | None, fp16: Fp16Config | None, zero_optimization: ZeroConfig
) -> list[Problem]:
    """Bf16 and fp16 exclude each other, and both need ZeRO 1, 2 or 3."""
    problems = []
    if _on(bf16) and _on(fp16):
        problems.append(
            Problem(
                "fp16.enabled",
                "bf16.enabled=true and fp16.enabled=true contradict each other: keep one of them",
            )
        )
    way_out = "set zero_optimization.stage=1 (on one rank it takes the same memory)"
    if _on(bf16) and zero_optimization.stage == 0:
        problems.append(
            Problem(
                "zero_optimization.stage",
                "zero_optimization.stage=0 does not go with bf16.enabled=true: DeepSpeed 0.19.8 "
                "takes a dummy optimizer step first there, which leaves Adam's counter one ahead "
                f"and decays the weights: {way_out}",
            )
        )
    if _on(fp16) and zero_optimization.stage == 0:
        problems.append(
            Problem(
                "zero_optimization.stage",
                "zero_optimization.stage=0 does not go with fp16.enabled=true: DeepSpeed 0.19.8 "
                "never scales the loss there, while its step divides by the scale: "
                f"{way_out}, or use bf16",
            )
        )
    return problems


def gradients_accumulate_in_a_fitting_type(
    data_types: DataTypesConfig | None,
    bf16: Bf16Config | None,
    fp16: Fp16Config | None,
    zero_optimization: ZeroConfig,
) -> list[Problem]:
    """Gradients accumulate in the weights' type or, under ZeRO, in float32."""
    given = data_types.grad_accum_dtype if data_types else None
    weights = "bf16" if _on(bf16) else "fp16" if _on(fp16) else "fp32"
    if given is None or given == weights or given == "fp32":
        return []
    path = "data_types.grad_accum_dtype"
    choices = '"fp32" or leave it out' if weights == "fp32" else f'"{weights}" or "fp32"'
    return [
        Problem(
            path,
            f"{path}={shown(given)} does not go with weights in {weights}: use {choices}",
        )
    ]


def norm_is_computed(zero_optimization: ZeroConfig) -> list[Problem]:
    """The gradient norm is needed for clipping and for the logs."""
    if zero_optimization.compute_grad_norm:
        return []
    path = "zero_optimization.compute_grad_norm"
    return [Problem(path, f"{path}=false leaves SparseClip and the logs without a norm: remove it")]


def experts_are_aligned(zero_optimization: ZeroConfig, model: ModelConfig) -> list[Problem]:
    """Grouped matrix products need weights that start at multiples of 16 bytes."""
    if model.moe is None or zero_optimization.parameter_alignment is not False:
        return []
    if zero_optimization.stage not in (1, 2):
        return []
    path = "zero_optimization.parameter_alignment"
    return [
        Problem(
            path,
            f"{path}=false misaligns the experts' weights under ZeRO "
            f"{zero_optimization.stage}, where grouped matrix products need multiples of 16 "
            "bytes: set it to true, or remove it",
        )
    ]


def expert_gradients_are_reduced_apart(
    zero_optimization: ZeroConfig, model: ModelConfig
) -> list[Problem]:
    """DeepSpeed keeps different experts' gradients apart on one of its paths alone."""
    if model.moe is None or zero_optimization.stage not in (1, 2):
        return []
    return [
        Problem(
            f"zero_optimization.{name}",
            f"zero_optimization.{name}=false with MoE layers under ZeRO "
            f"{zero_optimization.stage} averages the gradients of different experts, or stops: "
            "DeepSpeed 0.19.8 reduces experts rightly only with it on: remove it",
        )
        for name in ("contiguous_gradients", "reduce_scatter")
        if getattr(zero_optimization, name) is False
    ]


def offloading_needs_zero(zero_optimization: ZeroConfig) -> list[Problem]:
    """DeepSpeed moves nothing to the host without ZeRO."""
    offload = zero_optimization.offload_optimizer
    if offload is None or offload.device == "none" or zero_optimization.stage > 0:
        return []
    path = "zero_optimization.offload_optimizer.device"
    return [
        Problem(
            path,
            f'{path}="{offload.device}" needs ZeRO, but zero_optimization.stage=0: set stage 1, 2 '
            "or 3, or remove offload_optimizer",
        )
    ]


def experts_fit_grouped_matmuls(
    model: ModelConfig, bf16: Bf16Config | None, fp16: Fp16Config | None
) -> list[Problem]:
    """A row of a grouped matrix product is a multiple of 16 bytes."""
    multiple = 8 if _on(bf16) or _on(fp16) else 4
    if model.moe is None:
        return []
    return [
        Problem(
            f"magnetar.model.{name}",
            f"magnetar.model.{name}={width} must be a multiple of {multiple} in a model with MoE "
            f"layers, whose grouped matrix products need rows of 16 bytes: use "
            f"{-(-width // multiple) * multiple}",
        )
        for name, width in (("d_model", model.d_model), ("d_ff", model.d_ff))
        if width % multiple
    ]


def sequences_fit(data: Any, model: ModelConfig) -> list[Problem]:
    """The data's windows are no longer than the model's positions, on either side."""
    limits = {"max_seq_len": model.max_seq_len}
    is_one_length = data.pairs is None  # pairs have targets of a length of their own
    if model.architecture == "encoder_decoder" and model.max_target_len and is_one_length:
        limits["max_target_len"] = model.max_target_len
    return [
        Problem(
            "magnetar.data.seq_len",
            f"magnetar.data.seq_len={data.seq_len} must not exceed magnetar.model.{name}={limit}: "
            f"use seq_len {min(limits.values())}, or {name} {data.seq_len}",
        )
        for name, limit in limits.items()
        if data.seq_len > limit
    ]


def a_decoder_masks_nothing(data: Any, model: ModelConfig) -> list[Problem]:
    """A causal model sees what comes before, and no masks."""
    if data.masking is None or model.architecture != "decoder":
        return []
    path = "magnetar.data.masking"
    return [
        Problem(
            path,
            f"{path}={{...}} belongs to magnetar.model.architecture 'encoder' or "
            "'encoder_decoder', but architecture is 'decoder', which predicts each token from "
            "those before it: remove it, or use another architecture",
        )
    ]


def pairs_are_translated(data: Any, model: ModelConfig) -> list[Problem]:
    """Pairs have two sides, nothing to hide, and bins of many shapes."""
    if data.pairs is None:
        return []
    path, problems = "magnetar.data.pairs", []
    if model.architecture != "encoder_decoder":
        problems.append(
            Problem(
                path,
                f"{path}={{...}} needs magnetar.model.architecture 'encoder_decoder', which reads "
                f"one side and writes the other, but architecture is {model.architecture!r}: use "
                "that, or remove pairs to train on text",
            )
        )
    if data.masking is not None:
        problems.append(
            Problem(
                "magnetar.data.masking",
                f"magnetar.data.masking={{...}} contradicts {path}, whose sources are read as they "
                "are: keep one of them",
            )
        )
    if model.moe is not None and model.moe.dispatch == "capacity":
        problems.append(
            Problem(
                "magnetar.model.moe.dispatch",
                f'magnetar.model.moe.dispatch="capacity" does not go with {path}, whose bins '
                "differ in shape, so that an expert's room would depend on which bins meet: use "
                '"dropless"',
            )
        )
    longest = data.seq_len + (model.max_target_len or model.max_seq_len)
    if data.pairs.bin_tokens < longest:
        problems.append(
            Problem(
                f"{path}.bin_tokens",
                f"{path}.bin_tokens={data.pairs.bin_tokens} does not hold the longest pair, of "
                f"magnetar.data.seq_len={data.seq_len} and {longest - data.seq_len} target tokens: "
                f"use at least {longest}, or shorter sequences",
            )
        )
    return problems


def a_bin_is_a_sample(data: Any, train_micro_batch_size_per_gpu: int | None) -> list[Problem]:
    """Bins differ in shape, so a forward pass has one."""
    if data.pairs is None or train_micro_batch_size_per_gpu == 1:
        return []
    path = "train_micro_batch_size_per_gpu"
    return [
        Problem(
            path,
            f"{path}={shown(train_micro_batch_size_per_gpu)} must be 1 with magnetar.data.pairs, "
            "where a sample is a bin of many sentences: set 1, and bin_tokens to what the memory "
            "holds",
        )
    ]


def translations_need_pairs(data: Any, training: Any) -> list[Problem]:
    """There is nothing to translate in running text."""
    if data.pairs is not None or not training.eval_translations:
        return []
    path = "magnetar.training.eval_translations"
    return [
        Problem(
            path,
            f"{path}={training.eval_translations} needs magnetar.data.pairs, and there is text "
            "alone: remove it, or prepare pairs",
        )
    ]


def the_model_can_train_on_text(model: ModelConfig) -> list[Problem]:
    """What only serves imported models leaves training without a loss or without gradients."""
    problems = []
    if not model.output_projection:
        path = "magnetar.model.output_projection"
        problems.append(
            Problem(
                path, f"{path}=false leaves training without logits, so without a loss: remove it"
            )
        )
    if model.multiway:
        path = "magnetar.model.multiway"
        problems.append(
            Problem(
                path,
                f"{path}=true needs two modalities, and a prepared folder holds text alone: "
                "half of the parameters would never get a gradient: remove it (such a model is "
                "built in Python, or imported)",
            )
        )
    return problems


def independent_decay_is_adam_ws(optimizer: OptimizerConfig, training: Any) -> list[Problem]:
    """Only a decoupled decay can be freed of the learning rate."""
    if not training.independent_weight_decay or optimizer.type != "Adam":
        return []
    path = "magnetar.training.independent_weight_decay"
    return [
        Problem(
            path,
            f'{path}=true needs optimizer.type "AdamW", whose decay stands beside the gradient\'s '
            f'update, not {shown(optimizer.type)}: use type "AdamW", or remove it',
        )
    ]


def checkpointing_is_switched_on(activation_checkpointing: Any, training: Any) -> list[Problem]:
    """DeepSpeed's section says how; whether is Magnetar's key."""
    if activation_checkpointing is None or training.activation_checkpointing:
        return []
    path = "activation_checkpointing"
    return [
        Problem(
            path,
            f"{path}={{...}} says how, but magnetar.training.activation_checkpointing=false says "
            "that there is none: set that to true, or remove the section",
        )
    ]


def compiled_blocks_keep_their_weights(zero_optimization: Any, training: Any) -> list[Problem]:
    """ZeRO 3 collects weights in hooks of modules, which compiled blocks do not call."""
    if not training.compile or zero_optimization.stage != 3:
        return []
    path = "magnetar.training.compile"
    return [
        Problem(
            path,
            f"{path}=true contradicts zero_optimization.stage=3, which collects each module's "
            "weights when it is called: use stage 1 or 2, or remove it",
        )
    ]


def ranks_hold_experts(model: ModelConfig, world_size: int) -> list[Problem]:
    """ep_size divides the number of ranks."""
    if model.moe is None or world_size % model.moe.ep_size == 0:
        return []
    ep_size = model.moe.ep_size
    sizes = [size for size in model.moe.possible_ep_sizes if world_size % size == 0]
    below = world_size // ep_size * ep_size
    ranks = f"{below} or {below + ep_size}" if below else f"{ep_size}"
    return [
        Problem(
            "magnetar.model.moe.ep_size",
            f"magnetar.model.moe.ep_size={ep_size} must divide the {world_size} ranks: use one "
            f"of the ep_size {sizes}, or {ranks} ranks",
        )
    ]


RULES: tuple[tuple[Callable[..., list[Problem]], tuple[str, ...]], ...] = (
    (adam_w_is_decoupled, ("optimizer",)),
    (eight_bits_are_bitsandbytes, ("optimizer", "zero_optimization")),
    (clipping_has_a_threshold, ("gradient_clipping", "sparse_clip")),
    (one_precision, ("bf16", "fp16", "zero_optimization")),
    (
        gradients_accumulate_in_a_fitting_type,
        ("data_types", "bf16", "fp16", "zero_optimization"),
    ),
    (norm_is_computed, ("zero_optimization",)),
    (experts_are_aligned, ("zero_optimization", "model")),
    (expert_gradients_are_reduced_apart, ("zero_optimization", "model")),
    (offloading_needs_zero, ("zero_optimization",)),
    (experts_fit_grouped_matmuls, ("model", "bf16", "fp16")),
    (sequences_fit, ("data", "model")),
    (a_decoder_masks_nothing, ("data", "model")),
    (pairs_are_translated, ("data", "model")),
    (a_bin_is_a_sample, ("data", "train_micro_batch_size_per_gpu")),
    (translations_need_pairs, ("data", "training")),
    (the_model_can_train_on_text, ("model",)),
    (independent_decay_is_adam_ws, ("optimizer", "training")),
    (checkpointing_is_switched_on, ("activation_checkpointing", "training")),
    (compiled_blocks_keep_their_weights, ("zero_optimization", "training")),
    (ranks_hold_experts, ("model", "world_size")),
)


def broken_rules(values: dict[str, Any]) -> list[Problem]:
    """The problems of every rule whose sections are all there."""
    problems: list[Problem] = []
    for rule, needs in RULES:
        if all(name in values for name in needs):
            problems += rule(*(values[name] for name in needs))
    return problems
