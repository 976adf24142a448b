"""A MoE model as a dense one: each MoE layer keeps one expert, or the mean of all."""

from pathlib import Path

import torch
from torch import Tensor

from magnetar.convert.expert_tensors import Place, experts_of_layers, name_at, place_of, turned
from magnetar.convert.folders import (
    how_to_load,
    how_to_start,
    open_whole,
    vocabulary_file,
    write_folder,
)
from magnetar.data.errors import UserError
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors, Spec
from magnetar.models.weights.load_save import tensor_shapes


def densify(path: Path, out: Path, expert: int | None, shard_bytes: int | None) -> list[str]:
    """A report in lines, after writing the dense model to a new folder.

    Args:
        path: the MoE model, see `open_run`.
        out: new folder; it must not exist, or be empty.
        expert: index of the expert that remains; None: the mean of all.
        shard_bytes: largest size of a file, see `write_files`.

    Raises:
        UserError: if the source cannot be read or has no experts, the expert does not exist, or the
            folder holds something.
    """
    source = open_whole(path, out)
    moe = source.config.moe
    if moe is None:
        raise UserError(f"{path} is dense already: name a model with MoE layers")
    fewest = min(moe.expert_counts)
    if expert is not None and not 0 <= expert < fewest:
        raise UserError(
            f"--expert {expert}: the experts of {path} are 0 to {fewest - 1}: use one of "
            "these, or --mean"
        )
    config = source.config.model_copy(update={"moe": None})
    tensors = dense_tensors(source.tensors, config, expert)
    write_folder(out, config, tensors, shard_bytes, other_files=vocabulary_file(source))
    return [
        f"densified  {source.path}",
        f"remains    {'the mean of' if expert is None else f'expert {expert} of'} "
        f"{', '.join(map(str, moe.expert_counts))} in each MoE layer",
        f"train      {how_to_start(out, {'moe': None})}",
        "",
        *how_to_load(out, config.architecture),
    ]


def dense_tensors(sparse: LazyTensors, config: ModelConfig, expert: int | None) -> LazyTensors:
    """The dense model's tensors.

    Args:
        sparse: the MoE model's tensors.
        config: the dense model's config.
        expert: index of the expert that remains; None: the mean of all.
    """

    num_experts = experts_of_layers(sparse.specs)

    def expert_name(place: Place, index: int) -> str:
        return name_at(place._replace(expert=index))

    def read(name: str) -> Tensor:
        if name in sparse.specs:
            return sparse.read(name)
        place = place_of(name)
        assert place is not None, name
        if expert is not None:
            return turned(sparse.read(expert_name(place, expert)))
        # Summed in float64: equal experts give the expert itself, to the last bit.
        total = torch.zeros(tuple(reversed(specs[name].shape)), dtype=torch.float64)
        for index in range(num_experts[place.ffn]):
            total += sparse.read(expert_name(place, index))
        return turned(total.div_(num_experts[place.ffn]).to(specs[name].dtype))

    specs = {}
    for name, shape in tensor_shapes(config).items():
        place = place_of(name)
        kept = name if name in sparse.specs or place is None else expert_name(place, expert or 0)
        specs[name] = Spec(sparse.specs[kept].dtype, tuple(shape))
    return LazyTensors(specs, read)
