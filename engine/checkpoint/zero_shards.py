"""What this rank keeps of each parameter, whatever the ZeRO stage: DeepSpeed's layouts, read once.

| mode | master weights and Adam's moments of a parameter |
|---|---|
| ZeRO 0 (fp32) | whole, in the parameter itself, on each rank that holds it |
| ZeRO 1, 2 | a stretch of it, on one rank of its data-parallel group, in a flat buffer |
| ZeRO 3 | the rank's even share of it, padded at the end, in a flat buffer |

Parameters that do not train have no states but their weights.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from magnetar.engine.checkpoint.format import WEIGHT, evenly_cut
from magnetar.engine.optim.adam import MOMENTS, Moment, moments, round_to_8_bits, start_8_bit
from magnetar.models.moe.deepspeed import join_expert_groups
from magnetar.models.moe.experts import Experts


def partition(model: nn.Module, deepspeed_config: dict[str, Any], dtype: torch.dtype) -> None:
    """Leave every rank its part of a model that all of them have built on the CPU.

    The engine would do the same with a model that lies on the device as a whole. Here only one
    tensor at a time does, so each process needs host memory for the model in float32 (of the
    experts, those of its rank), and the device only what ZeRO 3 leaves on it.

    Args:
        model: with the initial weights, on the CPU.
        deepspeed_config: DeepSpeed's JSON.
        dtype: of the weights in training.
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


class Tensors(NamedTuple):
    """How a parameter of this rank is called in the whole model.

    Attributes:
        names: its tensors' names, each `numel` elements of the parameter one after the other: one
            for a dense parameter, one for each local expert of a stacked one.
        numel: elements of each.
    """

    names: list[str]
    numel: int

    def stretches(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """Elements [start, stop) of the parameter, tensor by tensor.

        Yields:
            The tensor's name, the stretch's first element in it and in the parameter, its length.
        """
        for index, name in enumerate(self.names):
            first = index * self.numel
            begin, end = max(start, first), min(stop, first + self.numel)
            if begin < end:
                yield name, begin - first, begin, end - begin


class Share(NamedTuple):
    """What this rank keeps of a parameter.

    Attributes:
        tensors: the parameter's names.
        start: index in the flattened parameter of the first element kept.
        values: state -> (n,) views of what is kept, which may be read and written; moments of 8
            bits may be read.
        saved: the stretch of the parameter that this rank saves: what it keeps, or its part of
            that where several ranks keep the same.
    """

    tensors: Tensors
    start: int
    values: dict[str, Moment]
    saved: tuple[int, int]


def named_tensors(model: nn.Module) -> Iterator[tuple[Any, Tensors]]:
    """Every parameter of this rank's model with its tensors' names, in the model's order."""
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
    """This rank's share of every parameter that it keeps anything of."""
    for parameter, tensors in named_tensors(engine.module):
        if not parameter.requires_grad:
            yield _frozen_share(parameter, tensors)
        elif hasattr(parameter, "ds_id"):
            yield from _zero3_share(engine.optimizer, parameter, tensors)
        elif engine.optimizer is engine.basic_optimizer:
            values = {WEIGHT: parameter.data.view(-1)} | _adam_states(engine, parameter)
            yield Share(tensors, 0, values, _own_part(parameter, 0, parameter.numel()))
        elif (mapping := parameter._hp_mapping) is not None:
            flat = _flat_groups(engine.optimizer)[mapping.param_group_index]
            place, kept = mapping.hp_fragment_address, mapping.lp_fragment_address
            values = _narrowed(engine, flat, place.start, place.numel)
            yield Share(tensors, kept.start, values, (kept.start, kept.start + kept.numel))


def _frozen_share(parameter: Any, tensors: Tensors) -> Share:
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        saved = _own_part(parameter, 0, parameter.numel())
        return Share(tensors, 0, {WEIGHT: parameter.data.view(-1)}, saved)
    start, numel = _zero3_stretch(parameter)
    return Share(tensors, start, {WEIGHT: partition.data[:numel]}, (start, start + numel))


def _zero3_share(optimizer: Any, parameter: Any, tensors: Tensors) -> Iterator[Share]:
    start, numel = _zero3_stretch(parameter)
    if numel > 0:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        values: dict[str, Moment] = {WEIGHT: flat.data.narrow(0, offset, numel)}
        states = moments(optimizer.optimizer.state[flat])
        values |= {state: value.narrow(0, offset, numel) for state, value in states.items()}
        yield Share(tensors, start, values, (start, start + numel))


def _zero3_stretch(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's share, without the padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * dist.get_rank(group=parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def _own_part(parameter: Any, start: int, stop: int) -> tuple[int, int]:
    """This rank's part of what several ranks keep alike."""
    group_name = getattr(parameter, "group_name", None)
    if group_name is None:
        return evenly_cut(stop - start, dist.get_rank(), dist.get_world_size())
    from deepspeed.utils import groups

    group = groups._get_expert_data_parallel_group(group_name)
    rank, size = dist.get_rank(group=group), dist.get_world_size(group=group)
    return evenly_cut(stop - start, rank, size)


def _flat_groups(optimizer: Any) -> list[Tensor]:
    """The flat float32 buffers of ZeRO 1 and 2, one for each parameter group."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_groups_flat_partition  # BF16_Optimizer


def _narrowed(engine: Any, flat: Tensor, start: int, numel: int) -> dict[str, Moment]:
    values: dict[str, Moment] = {WEIGHT: flat.data.narrow(0, start, numel)}
    states = _adam_states(engine, flat)
    return values | {state: value.narrow(0, start, numel) for state, value in states.items()}


def _adam_states(engine: Any, key: Tensor) -> dict[str, Moment]:
    return moments(engine.basic_optimizer.state.get(key, {}))


def adam_step(engine: Any) -> int:
    """Updates that Adam has done; 0 before the first."""
    return max((int(s["step"]) for s in engine.basic_optimizer.state.values() if s), default=0)


def start_adam(engine: Any, step: int) -> None:
    """Give every parameter the states that Adam would make at its first update, and its count.

    What is then written into the shares is the optimizer's after `finish_adam`.
    """
    adam = engine.basic_optimizer
    is_torchs = isinstance(adam, torch.optim.Adam)
    for group, flat in tensors_of_optimizer(engine):
        if "optim_bits" in group:
            start_8_bit(adam, group, flat, step)
            continue
        adam.state[flat] = {
            # DeepSpeed's own Adams count in Python; PyTorch's fused one, beside the states.
            "step": torch.tensor(float(step), device=flat.device) if is_torchs else step,
            **{state: torch.zeros_like(flat.data) for state in MOMENTS},
        }


def finish_adam(engine: Any) -> None:
    """Take over what was written into the shares since `start_adam`."""
    round_to_8_bits(engine.basic_optimizer)


def tensors_of_optimizer(engine: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """The tensors by which Adam finds its states, each with its parameter group."""
    optimizer = engine.optimizer
    groups = engine.basic_optimizer.param_groups
    if optimizer is engine.basic_optimizer:
        return [(group, p) for group in groups for p in group["params"]]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        flats = optimizer.fp32_partitioned_groups_flat
        return [(groups[optimizer.sub_group_to_group_id[i]], flat) for i, flat in enumerate(flats)]
    return list(zip(groups, _flat_groups(optimizer), strict=True))


def whole_weights(engine: Any) -> Iterator[tuple[Tensors, int, Tensor]]:
    """What the forward pass reads on this rank, beside the master weights.

    Yields:
        A parameter's tensors, the first element kept and (n,) a view of the values, in the
        model's dtype.
    """
    for parameter, tensors in named_tensors(engine.module):
        if hasattr(parameter, "ds_id"):
            start, numel = _zero3_stretch(parameter)
            yield tensors, start, parameter.ds_tensor.data[:numel]
        else:
            yield tensors, 0, parameter.data.view(-1)
