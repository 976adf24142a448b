"""Whether the ranks that hold the same weights still do.

Dense weights are the same on every rank, and an expert's on every rank that has it. Memory that
flips a bit, or a library that is not the same everywhere, makes them drift apart without a word.
"""

from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.utils import groups
from torch import nn

from data.errors import MachineError
from engine.shares import named_tensors


@torch.no_grad()
def require_equal_replicas(model: nn.Module, step: int, run_dir: Path) -> None:
    """Compare hashes of weights; every rank calls this.

    ZeRO 3 keeps every weight once, so there is nothing to compare.

    Raises:
        MachineError: on every rank alike, naming a tensor and the ranks that differ.
    """
    about, hashes = [], []
    for parameter, tensors in named_tensors(model):
        if not hasattr(parameter, "ds_id"):
            about.append((tensors.names[0], _replicas(getattr(parameter, "group_name", None))))
            hashes.append(torch.hash_tensor(parameter.data).view(torch.int64))
    if not hashes:
        return
    mine = torch.stack(hashes)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    hashes_of = torch.stack(gathered).tolist()  # [rank][tensor]
    about_of: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(about_of, about)
    for rank, tensors_of_rank in enumerate(about_of):
        for index, (name, replicas) in enumerate(tensors_of_rank):
            if hashes_of[rank][index] != hashes_of[replicas[0]][index]:
                raise MachineError(
                    f"the weights {name} of rank {rank} are no longer those of rank {replicas[0]}, "
                    f"found at step {step}: a fault of memory, of a GPU, or of a library that "
                    "differs between them. A checkpoint saved since the last check may hold it: "
                    f"delete such a one from {run_dir / 'checkpoints'}, look at the hosts of these "
                    "ranks (python -m launchers.doctor), and start the same command again",
                    on_every_rank=True,
                )


def _replicas(group_name: str | None) -> list[int]:
    """The ranks of the job that hold the same as this one."""
    if group_name is None:
        return list(range(dist.get_world_size()))
    group = groups._get_expert_data_parallel_group(group_name)
    return torch.distributed.get_process_group_ranks(group)
