"""How ZeRO lays out parameters: which shard of each this rank keeps, whatever the stage.

| stage | master weights and Adam's moments of a parameter |
|---|---|
| ZeRO 0 (fp32) | whole, in the parameter itself, on each rank that holds it |
| ZeRO 1, 2 | a stretch of it, on one rank of its data-parallel group, in a flat buffer |
| ZeRO 3 | an even shard of it on every rank, padded at the end, in a flat buffer |

Parameters that do not train have no states but their weights.

Under ZeRO 3 the weights themselves are sharded, too. DeepSpeed collects those of a module when the
module is called, and frees them afterwards. All that reads a shard's attributes is in this file.
What else in the code depends on the stage:
    engine/sparse_clip.py       replaces the norm and the clipping of each stage's optimizer
    models/moe/deepspeed.py     has the MoE layer that DeepSpeed accepts under each stage
    engine/memory_planner.py    reckons bytes a rank
    engine/config/schema.py     reads the stage; engine/config refuses what a stage lacks
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from magnetar.engine.checkpoint.format import WEIGHT, evenly_cut
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.optim.adam import MOMENTS, Moment, moments, round_to_8_bits
from magnetar.engine.optim.ema import ema_of
from magnetar.engine.optim.lion import Lion
from magnetar.models.moe.deepspeed import join_expert_groups, moe_class
from magnetar.models.moe.experts import Experts
from magnetar.models.moe.layer import MoE


def trained_moe_class(config: RunConfig) -> type[MoE]:
    """The class of the MoE layers of a model that trains."""
    moe = config.model.moe
    return moe_class(config.zero_stage, moe is None or moe.frozen != "router_and_experts")


def device_of_build(config: RunConfig, device: torch.device) -> torch.device:
    """The device on which to build the model: the rank's own, or the CPU to shard it there."""
    return torch.device("cpu") if config.zero_stage == 3 else device


def prepare_for_zero(
    model: nn.Module, deepspeed_config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Prepare a model and DeepSpeed's JSON for the ZeRO stage, before DeepSpeed's engine.

    Args:
        model: Model with the initial weights, on the device of `device_of_build`.
        deepspeed_config: DeepSpeed's JSON, changed in place.
        dtype: Type of the weights in training.
    """
    section = deepspeed_config["zero_optimization"]
    if section["stage"] == 3:
        _partition(model, deepspeed_config, dtype)
    elif section["stage"] > 0:
        # These stages allocate such a bucket in each backward pass, however small the model is.
        numel = sum(parameter.numel() for parameter in model.parameters())
        section["reduce_bucket_size"] = min(section.get("reduce_bucket_size", numel), numel)


def _partition(model: nn.Module, deepspeed_config: dict[str, Any], dtype: torch.dtype) -> None:
    """Shard a model for ZeRO 3 that every rank has built on the CPU.

    DeepSpeed's engine would move the whole model to the device first. Here one tensor at a time is
    there, so a process needs host memory for the model in float32 (with the experts of its rank
    alone), and device memory for its shards, whose weights have the dtype.
    """
    join_expert_groups(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        if (name := getattr(parameter, "ds_zero_partition_group_name", None)) is not None:
            # Without it the experts would be divided among ranks that hold different ones.
            edp_group = groups._get_expert_data_parallel_group(name)
            parameter.ds_zero_partition_process_group = edp_group  # type: ignore[attr-defined]
    init = deepspeed.zero.Init(
        module=model, config_dict_or_path=copy.deepcopy(deepspeed_config), dtype=dtype
    )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(init.local_device)


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO 3 has divided a parameter among the ranks."""
    return hasattr(parameter, "ds_id")


@contextmanager
def small_parameters_sharded(engine: Any) -> Iterator[None]:
    """A block in which the shard of every parameter can be written.

    ZeRO 3 keeps small parameters whole between uses (stage3_param_persistence_threshold). They are
    sharded for the block, and collected again after it, so that they have the new values.
    """
    persistent = getattr(engine.optimizer, "persistent_parameters", [])
    if persistent:
        persistent[0].partition(persistent)
    yield
    if persistent:
        persistent[0].all_gather(persistent)


class Tensors(NamedTuple):
    """The tensors of the whole model that a parameter of this rank consists of.

    Attributes:
        names: Names of the tensors, which lie one after the other: one for a dense parameter, one
            for each local expert of a stacked one.
        numel: Number of elements of each tensor.
    """

    names: list[str]
    numel: int

    def stretches(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """Elements [start, stop) of the parameter, tensor by tensor.

        Yields:
            Name of the tensor, index of the first element in the tensor, index of the first element
            in the parameter, number of elements.
        """
        for index, name in enumerate(self.names):
            first = index * self.numel
            begin, end = max(start, first), min(stop, first + self.numel)
            if begin < end:
                yield name, begin - first, begin, end - begin


class Share(NamedTuple):
    """The shard of a parameter that this rank keeps.

    Attributes:
        tensors: The tensors that the parameter consists of.
        start: Index of the first element of the shard in the flattened parameter.
        values: state -> (n,) view of the shard, which may be read and written. 8-bit moments may
            only be read.
        saved: Stretch [start, stop) of the parameter that this rank saves: its shard, or an even
            part of it if several ranks keep the same.
    """

    tensors: Tensors
    start: int
    values: dict[str, Moment]
    saved: tuple[int, int]


def named_tensors(model: nn.Module) -> Iterator[tuple[Any, Tensors]]:
    """Every parameter of this rank's model with the tensors it consists of, in their order."""
    first_experts = {
        f"{name}.deepspeed_moe.experts.": module.first_expert
        for name, module in model.named_modules()
        if hasattr(module, "first_expert")
    }
    for name, parameter in model.named_parameters():
        prefix = next((p for p in first_experts if name.startswith(p)), None)
        numel = getattr(parameter, "ds_numel", parameter.numel())
        if prefix is None:
            yield parameter, Tensors([name], numel)
            continue
        experts = model.get_submodule(prefix.removesuffix("."))
        assert isinstance(experts, Experts)
        count, first = experts.num_local_experts, first_experts[prefix]
        names = [
            f"{prefix}deepspeed_experts.{first + local}.{name.removeprefix(prefix)}"
            for local in range(count)
        ]
        yield parameter, Tensors(names, numel // count)


def shares(engine: Any) -> Iterator[Share]:
    """This rank's shard of every parameter that it keeps anything of."""
    optimizer = engine.optimizer
    for parameter, tensors in named_tensors(engine.module):
        if not parameter.requires_grad or optimizer is engine.basic_optimizer:
            start, weights = _kept_weights(parameter)
            values: dict[str, Moment] = {WEIGHT: weights}
            values |= _further_states(engine, parameter)
            saved = (start, start + len(weights))
            if not is_sharded(parameter):
                saved = _own_part(parameter)
            yield Share(tensors, start, values, saved)
        elif is_sharded(parameter):
            start, numel = _zero3_stretch(parameter)
            if numel > 0:
                group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                flat = optimizer.fp32_partitioned_groups_flat[group]
                values = _states(engine, flat, offset, numel)
                yield Share(tensors, start, values, (start, start + numel))
        elif (mapping := parameter._hp_mapping) is not None:
            flat = _flat_groups(optimizer)[mapping.param_group_index]
            place, kept = mapping.hp_fragment_address, mapping.lp_fragment_address
            values = _states(engine, flat, place.start, place.numel)
            yield Share(tensors, kept.start, values, (kept.start, kept.start + kept.numel))


def whole_weights(engine: Any) -> Iterator[tuple[Tensors, int, Tensor]]:
    """The weights in the model's dtype, which the forward pass reads.

    Yields:
        Tensors of a parameter, index of the first element kept, (n,) view of the values.
    """
    for parameter, tensors in named_tensors(engine.module):
        yield tensors, *_kept_weights(parameter)


def _kept_weights(parameter: Any) -> tuple[int, Tensor]:
    """Index of the first element of a parameter that this rank keeps, (n,) view of the values."""
    if not is_sharded(parameter):
        return 0, parameter.data.view(-1)
    start, numel = _zero3_stretch(parameter)
    return start, parameter.ds_tensor.data[:numel]


def _zero3_stretch(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's shard, without the padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * dist.get_rank(group=parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def _own_part(parameter: Any) -> tuple[int, int]:
    """The part that this rank saves of a parameter that several ranks keep alike."""
    name = getattr(parameter, "group_name", None)
    group = None if name is None else groups._get_expert_data_parallel_group(name)
    rank, size = dist.get_rank(group=group), dist.get_world_size(group=group)
    return evenly_cut(parameter.numel(), rank, size)


def _flat_groups(optimizer: Any) -> list[Tensor]:
    """The flat float32 buffers of ZeRO 1 and 2, one per parameter group."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_groups_flat_partition  # BF16_Optimizer


def _states(engine: Any, flat: Tensor, start: int, numel: int) -> dict[str, Moment]:
    """Views of the master weights and the other states of a stretch of a flat buffer."""
    states = {WEIGHT: flat.data} | _further_states(engine, flat)
    return {name: value.narrow(0, start, numel) for name, value in states.items()}


def _further_states(engine: Any, tensor: Tensor) -> dict[str, Moment]:
    """The moments of a tensor of the optimizer, and its EMA if there is one."""
    optimizer = engine.basic_optimizer
    return moments(optimizer.state.get(tensor, {})) | ema_of(optimizer, tensor)


def adam_step(engine: Any) -> int:
    """Number of updates that Adam has done."""
    return max((int(s["step"]) for s in engine.basic_optimizer.state.values() if s), default=0)


def start_adam(engine: Any, step: int) -> None:
    """Give every parameter the states that Adam makes at its first update, and a count of updates.

    Values that are then written into the shards reach the optimizer with `finish_adam`.
    """
    adam = engine.basic_optimizer
    names = MOMENTS[:1] if isinstance(adam, Lion) else MOMENTS
    for group, flat in tensors_of_optimizer(engine):
        if "optim_bits" in group:
            adam.make_states(group, flat, step)
            continue
        count: int | Tensor = step  # Lion and DeepSpeed's own Adams count in Python
        if isinstance(adam, torch.optim.Adam):  # PyTorch's fused one, beside the states
            count = torch.tensor(float(step), device=flat.device)
        elif isinstance(adam, torch.optim.RAdam):  # on the host
            count = torch.tensor(float(step))
        states = {state: torch.zeros_like(flat.data) for state in names}
        adam.state[flat] = {"step": count, **states}


def finish_adam(engine: Any) -> None:
    """Round what was written into the shards since `start_adam` to 8 bits, where moments have 8."""
    round_to_8_bits(engine.basic_optimizer)


def tensors_of_optimizer(engine: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """Every tensor that is a key of Adam's states, with its parameter group."""
    optimizer = engine.optimizer
    groups = engine.basic_optimizer.param_groups
    if optimizer is engine.basic_optimizer:
        return [(group, p) for group in groups for p in group["params"]]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        flats = optimizer.fp32_partitioned_groups_flat
        return [(groups[optimizer.sub_group_to_group_id[i]], flat) for i, flat in enumerate(flats)]
    return list(zip(groups, _flat_groups(optimizer), strict=True))
