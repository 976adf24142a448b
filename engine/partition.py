"""ZeRO 3: a model's weights are divided among the ranks before it gets its engine."""

import copy
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn

from models.deepspeed_moe import join_expert_groups


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
