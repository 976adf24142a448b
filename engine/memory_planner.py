"""The memory that a layout needs on a GPU, and the layouts that can hold a model.

The planner counts the states that a rank keeps as long as it trains: weights, gradients at their
largest, master weights and Adam's moments. It does not count activations, communication buffers,
the weights that ZeRO 3 gathers for the current layer, padding, and the allocator's slack. So a
layout that is refused for its memory cannot run, and one that is accepted may still be too large.

Letters: P parameters that a rank holds; w bytes of a weight, 4, or 2 in bf16 and fp16; g bytes of
a summed gradient, w unless data_types.grad_accum_dtype differs; n ranks that share a parameter's
states, which are all ranks or, for experts, those that hold the same experts.

| ZeRO | weights | gradients | master | moments |
|---|---|---|---|---|
| 0 | w P | w P | - | 8 P |
| 1 | w P | w P, without accumulation g P/n | 4 P/n | 8 P/n |
| 2 | w P | g P/n | 4 P/n | 8 P/n |
| 3 | w P/n, and w P of those up to stage3_param_persistence_threshold | g P/n | 4 P/n | 8 P/n |

Lion has one moment, of 4 bytes. An EMA of the weights (training.ema_decay) counts as one more.
Moments of 8 bits (`optimizer.type` AdamW8bit) take 2 bytes and 1/32 more for their scales, not 8.
bf16 that accumulates in float32 under ZeRO 1 keeps both kinds of gradients, (2 + 4) P. With
offload_optimizer, master weights and moments are in the host's memory. The summed gradients are
there as well under ZeRO 1 and 2.
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from magnetar.data.errors import UserError
from magnetar.engine.cluster.environment import launched_local_size
from magnetar.engine.config.batch_sizes import ACCUMULATION, MICRO, TRAIN
from magnetar.engine.config.deepspeed import EIGHT_BIT, LION
from magnetar.engine.config.schema import Layout, RunConfig, check_config
from magnetar.engine.optim.adam import BLOCK, MIN_8BIT_SIZE, takes_8_bits
from magnetar.models.config import ModelConfig, on_one_rank
from magnetar.models.moe.config import ON_ONE_RANK
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import empty_model

GIB = 2**30
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MASTER_BYTES, _MOMENT_BYTES = 4, 4


class Parameter(NamedTuple):
    """A parameter of the whole model. A layer's experts have their tensors stacked into one.

    Attributes:
        numel: number of elements.
        is_experts: True for stacked tensors of experts.
        trains: True if it has gradients and optimizer states.
        own_numel: number of elements of one expert's tensor; numel for other parameters.
        is_embedding: True for an embedding's table.
    """

    numel: int
    is_experts: bool
    trains: bool
    own_numel: int
    is_embedding: bool


class Memory(NamedTuple):
    """Bytes that a rank keeps on its GPU; they are added up by `sum`."""

    weights: int
    gradients: int
    master: int
    moments: int


def parameters_of(model: ModelConfig) -> list[Parameter]:
    """Every parameter of a model; tied ones are listed once."""
    with torch.device("meta"):
        built = empty_model(on_one_rank(model))
    of_experts = {
        id(parameter)
        for module in built.modules()
        if isinstance(module, MoE)
        for parameter in module.deepspeed_moe.experts.parameters()
    }
    of_embeddings = {id(m.weight) for m in built.modules() if isinstance(m, nn.Embedding)}
    return [
        Parameter(
            numel=p.numel(),
            is_experts=id(p) in of_experts,
            trains=p.requires_grad,
            own_numel=p[0].numel() if id(p) in of_experts else p.numel(),
            is_embedding=id(p) in of_embeddings,
        )
        for p in built.parameters()
    ]


def memory_of_rank(parameters: Sequence[Parameter], config: RunConfig, world_size: int) -> Memory:
    """Bytes that each rank keeps by the table above; the parameters are those of config.model."""
    stage, zero = config.zero_stage, config.deepspeed["zero_optimization"]
    ep_size = config.model.moe.ep_size if config.model.moe else 1
    width = _BYTES[config.dtype]
    given = config.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    sum_width = _BYTES[given] if given else width
    offloads = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    accumulates = config.deepspeed[ACCUMULATION] > 1
    section = config.deepspeed["optimizer"]
    min_8bit_size = math.inf
    if section["type"] == EIGHT_BIT:
        min_8bit_size = section["params"].get("min_8bit_size", MIN_8BIT_SIZE)
    num_moments = 1 if section["type"] == LION else 2
    num_averages = config.training.ema_decay is not None
    weights = gradients = master = moments = 0
    for numel, is_experts, trains, own_numel, is_embedding in parameters:
        ranks = world_size // ep_size if is_experts else world_size
        held = numel // ep_size if is_experts else numel
        share = -(-held // ranks) if stage else held
        weights += width * (share if stage == 3 else held)
        if stage == 3 and ranks > 1 and held <= zero["stage3_param_persistence_threshold"]:
            weights += width * held
        if not trains:
            continue
        if stage == 1 and config.dtype == "bf16" and sum_width > width:
            gradients += (width + sum_width) * held
        elif stage == 0 or (stage == 1 and accumulates):
            gradients += width * held
        elif stage == 3 or not offloads:
            gradients += sum_width * share
        if not offloads:
            master += _MASTER_BYTES * share if stage else 0
            if takes_8_bits(own_numel, is_embedding, min_8bit_size):
                moments += 2 * share + 2 * _MOMENT_BYTES * -(-share // BLOCK)  # two scales a block
            else:
                moments += num_moments * _MOMENT_BYTES * share
            moments += num_averages * _MOMENT_BYTES * share
    return Memory(weights, gradients, master, moments)


def require_host_memory(config: RunConfig, world_size: int) -> None:
    """Refuse a model that does not fit into the memory of a machine without GPUs.

    Linux would promise the ranks all the memory they ask for, and then kill one of them. A GPU
    refuses by itself.
    """
    if torch.cuda.is_available():
        return
    local_size = launched_local_size() if "WORLD_SIZE" in os.environ else 1
    needed = memory_of_rank(parameters_of(config.model), config, world_size)
    there, total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), sum(needed)
    if total * local_size > there:
        raise UserError(
            f"this machine has {there / GIB:.3g} GiB of memory, and its "
            f"rank{'s' * (local_size > 1)} would keep {total * local_size / GIB:.3g} "
            f"({_in_words(needed)} each) without activations: use a smaller model, a higher "
            "zero_optimization.stage, or more machines"
        )


def _in_words(needed: Memory) -> str:
    parts = needed._asdict().items()
    return ", ".join(f"{name} {value / GIB:.3g}" for name, value in parts if value)


def with_layout(saved: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A resolved config for another layout: the same global batch, accumulation and model.

    With sentence pairs a micro-batch is one bin, so accumulation follows from the ranks.
    """
    result = copy.deepcopy(dict(saved))
    # The third size follows from the other two and the ranks.
    has_pairs = result["magnetar"]["data"].get("pairs") is not None
    result.pop(ACCUMULATION if has_pairs else MICRO, None)
    zero = result["zero_optimization"]
    zero["stage"] = layout.zero_stage
    moe = result["magnetar"]["model"]["moe"]
    if moe is not None:
        moe |= ON_ONE_RANK if layout.ep_size == 1 else {}
        moe["ep_size"] = layout.ep_size
        zero.pop("parameter_alignment", None)  # follows from the stage
    return result


def problems_of(
    saved: Mapping[str, Any],
    layout: Layout,
    parameters: Sequence[Parameter],
    gpu_memory: float | None,
) -> tuple[RunConfig | None, list[str]]:
    """The config of a run in a layout, or lines about why the layout cannot hold it.

    Args:
        saved: a resolved config, in any layout.
        layout: the layout that is asked for.
        parameters: the parameters of the model.
        gpu_memory: bytes of each rank's GPU; None if memory is not compared.
    """
    ranks = f"{layout.world_size} rank{'s' * (layout.world_size > 1)}"
    lines = []
    moe = saved["magnetar"]["model"]["moe"]
    if moe is None and layout.ep_size > 1:
        lines.append(f"ep_size={layout.ep_size} needs experts, and the model is dense: use 1")
    train, accumulation = saved[TRAIN], saved[ACCUMULATION]
    if train % (accumulation * layout.world_size):
        lines.append(
            f"{TRAIN}={train} with {ACCUMULATION}={accumulation} cannot be divided among {ranks}: "
            f"it must be a multiple of {accumulation * layout.world_size}"
        )
    if moe is not None and any(count % layout.ep_size for count in _expert_counts(moe)):
        counts = " or ".join(map(str, _expert_counts(moe)))
        lines.append(
            f"{counts} experts cannot be divided into ep_size={layout.ep_size} equal parts"
        )
    config, found = check_config(with_layout(saved, layout), layout.world_size)
    said = (TRAIN, "magnetar.model.moe.num_experts")  # the lines above say it better
    lines += [problem.text for problem in found if problem.path not in said]
    if lines or config is None:
        return None, lines
    if gpu_memory is not None:
        needed = memory_of_rank(parameters, config, layout.world_size)
        if sum(needed) > gpu_memory:
            return None, [
                f"a rank needs {sum(needed) / GIB:.3g} GiB ({_in_words(needed)}) without "
                f"activations, more than the {gpu_memory / GIB:.3g} GiB of its GPU"
            ]
    return config, []


def nearest_layout(
    saved: Mapping[str, Any],
    layout: Layout,
    parameters: Sequence[Parameter],
    gpu_memory: float | None,
) -> Layout | None:
    """The layout nearest to one that cannot hold a run; None if there is none.

    The stage changes first, then the ep_size, and the world size only if no stage and ep_size make
    it fit. The distance of two sizes is their ratio, that of two stages their difference. Of two
    that are equally near the larger is taken. Only world sizes that divide the batch count.
    """
    moe = saved["magnetar"]["model"]["moe"]
    num_experts = math.gcd(*_expert_counts(moe)) if moe else 1
    candidates = (
        Layout(world_size, ep_size, stage)
        for world_size in _divisors(saved[TRAIN] // saved[ACCUMULATION])
        for ep_size in _divisors(num_experts)
        if world_size % ep_size == 0
        for stage in range(4)
    )

    def distance(other: Layout) -> tuple[float, ...]:
        found: list[float] = []
        for asked, size in zip(layout[:2], other[:2], strict=True):
            found += [max(asked, size) / min(asked, size), -size]
        return *found, abs(layout.zero_stage - other.zero_stage), -other.zero_stage

    for candidate in sorted(candidates, key=distance):
        if problems_of(saved, candidate, parameters, gpu_memory)[0] is not None:
            return candidate
    return None


def _expert_counts(moe: Mapping[str, Any]) -> list[int]:
    """num_experts as a list, from keys that are not checked yet; see MoEConfig."""
    counts = moe["num_experts"]
    return counts if isinstance(counts, list) else [counts]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
