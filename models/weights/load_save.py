"""A model on disk that needs neither DeepSpeed nor a run: a folder with two files.

config.json          {"model": {...}, "sha256": {...}}: the keys of `magnetar.model`, and a hash of
                     each tensor and of config.json itself, which reading compares
model.safetensors    every parameter under its name in the state dict, with each expert apart under
                     its global index; or shards of it, see models.weights.files
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from magnetar.data.atomic import atomic_folder
from magnetar.data.errors import UserError, first_problem, read_json_object
from magnetar.models.config import ModelConfig, on_one_rank
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import EncoderDecoder, Transformer, empty_model
from magnetar.models.weights.files import (
    WEIGHTS_FILE,
    LazyTensors,
    Watch,
    has_weights,
    in_memory,
    open_files,
    write_files,
)

CONFIG_FILE = "config.json"


def save_weights(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder of weights, atomically.

    Args:
        folder: name of a folder that is empty or does not exist.
        config: config of the model, vocab_size not None.
        tensors: state dict of the model, with tied tensors under one of their names or each.

    Raises:
        ValueError: if the folder is not empty, or a tensor is missing, unknown or of another
            shape.
    """
    with torch.device("meta"):
        tied = tied_names(empty_model(on_one_rank(config)))
    untied = {name: tensor for name, tensor in tensors.items() if name not in tied}
    write_weights(folder, config, in_memory(untied))


def write_weights(
    folder: Path,
    config: ModelConfig,
    tensors: LazyTensors,
    *,
    shard_bytes: int | None = None,
    about: Mapping[str, Any] | None = None,
    other_files: Mapping[str, bytes] | None = None,
    watch: Watch | None = None,
) -> None:
    """Write a folder of weights with one tensor in memory at a time, and read it back.

    Args:
        folder: name of a folder that is empty or does not exist; it is replaced atomically.
        config: config of the model, vocab_size not None.
        tensors: tensors of the model in any order, tied ones once.
        shard_bytes: largest size of a file's tensors in bytes, see `write_files`.
        about: further keys of config.json.
        other_files: name -> content of the folder's other files.
        watch: progress display.

    Raises:
        ValueError: if the folder is not empty, a tensor is missing, unknown or of another shape, or
            the bytes read back differ.
        OSError: naming the folder, if it cannot be written.
    """
    require_free(folder)
    shapes = tensor_shapes(config)
    check_tensors(shapes, tensors.shapes)
    in_order = LazyTensors({name: tensors.specs[name] for name in shapes}, tensors.read)
    with atomic_folder(folder) as path:
        digests = write_files(path, in_order, shard_bytes, watch)
        keys = {"model": config.model_dump(mode="json"), **(about or {}), "sha256": digests}
        digests[CONFIG_FILE] = _config_digest(keys)
        text = json.dumps(keys, indent=1)
        (path / CONFIG_FILE).write_text(text + "\n")
        for name, content in (other_files or {}).items():
            (path / name).write_bytes(content)


def require_free(folder: Path) -> None:
    """Refuse a folder that is not empty, and a link, which writing would replace.

    Raises:
        ValueError: if the name is taken.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {os.readlink(folder)}: name that, or another one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name another one")


def open_weights(folder: Path) -> tuple[ModelConfig, LazyTensors, dict[str, Any]]:
    """The config, the tensors and the further keys of config.json of a folder of weights.

    Raises:
        ValueError: if a file is missing or damaged, or a tensor is missing, unknown or of another
            shape.
    """
    config, about = read_config(folder)
    tensors = open_files(folder, about.pop("sha256", {}))
    shapes = tensor_shapes(config)
    try:
        check_tensors(shapes, tensors.shapes)
    except ValueError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: {error}") from None
    in_order = {name: tensors.specs[name] for name in shapes}
    return config, LazyTensors(in_order, tensors.read), about


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the further keys of config.json of a folder of weights.

    Raises:
        ValueError: if a file is missing, or it describes no model.
    """
    is_there = {CONFIG_FILE: (folder / CONFIG_FILE).is_file(), WEIGHTS_FILE: has_weights(folder)}
    for name in is_there:
        if not is_there[name]:
            raise UserError(
                f"{folder / name} is missing, so {folder} is not a folder of weights: name one "
                "that magnetar convert has written"
            )
    file = folder / CONFIG_FILE
    try:
        about = read_json_object(file)
        if not isinstance(about.get("model"), dict):
            raise ValueError("it has no key model with an object")
        config = ModelConfig.model_validate_json(json.dumps(about["model"]))
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is null, and must be a number")
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): make it readable, or copy it again"
        ) from error
    except ValueError as error:
        problem = first_problem(error, "model") if isinstance(error, ValidationError) else error
        raise UserError(
            f"{file} does not describe a model ({problem}): convert it again"
        ) from error
    digests = about.get(
        "sha256", {}
    )  # older versions and other programs write none, or not its own
    if not isinstance(digests, dict):
        raise UserError(f"{file}: sha256 is no object: convert it again")
    if CONFIG_FILE in digests and digests[CONFIG_FILE] != _config_digest(about):
        raise UserError(
            f"{file} is not what was written (its own sha256 differs): copy the folder again, or "
            "convert it again; if you have changed it on purpose, remove the entry "
            f'"{CONFIG_FILE}" of its key sha256'
        )
    del about["model"]
    return config, about


def _config_digest(keys: Mapping[str, Any]) -> str:
    """Hex sha256 of all that config.json says, but for this hash itself."""
    digests = {name: value for name, value in keys["sha256"].items() if name != CONFIG_FILE}
    text = json.dumps({**keys, "sha256": digests}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_weights(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the tensors of a folder of weights.

    Raises:
        ValueError: see `open_weights`.
    """
    config, tensors, _ = open_weights(folder)
    return config, {name: tensors.read(name) for name in tensors.specs}


def load_model(folder: Path | str) -> Transformer | EncoderDecoder:
    """The model of a folder of weights, in evaluation mode, in the saved dtype.

    Raises:
        ValueError: see `load_weights`.
    """
    return model_of_tensors(*load_weights(Path(folder)))


def model_of_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor]
) -> Transformer | EncoderDecoder:
    """A model with the given tensors, in evaluation mode.

    Args:
        config: Config of the model.
        tensors: Every tensor by its name, tied ones at least once. The model has their type if they
            have one, and float32 otherwise.
    """
    model = empty_model(on_one_rank(config))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    load_tensors(model, tensors)
    return model.eval()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a whole model's tensors into a model that may hold only some of the experts.

    Args:
        model: model of the same config; its expert parallelism may differ.
        tensors: tensors with each expert under its global index, tied ones at least once.
    """
    state = dict(tensors)
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            prefix = f"{name}.deepspeed_moe.experts.deepspeed_experts."
            experts = {key: state.pop(key) for key in tuple(state) if key.startswith(prefix)}
            for key, tensor in experts.items():
                expert, _, parameter = key[len(prefix) :].partition(".")
                local = int(expert) - module.first_expert
                if 0 <= local < module.num_local_experts:
                    state[f"{prefix}{local}.{parameter}"] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= tied_names(model), missing


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every tensor of a model, by name; tied ones once, under their first name."""
    with torch.device("meta"):
        model = empty_model(on_one_rank(config))
    tied = tied_names(model)
    return {name: t.shape for name, t in model.state_dict().items() if name not in tied}


def tied_names(model: nn.Module) -> set[str]:
    """All names but the first of each tied parameter."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names - {name for name, _ in model.named_parameters()}


def check_tensors(
    expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]
) -> None:
    """Compare names and shapes of tensors.

    Raises:
        ValueError: naming the first tensor of each kind that is missing, unexpected or of another
            shape, and how many there are.
    """
    wrong = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name}, {tuple(found[name])} where the model has {tuple(expected[name])}"
            for name in expected
            if name in found and tuple(found[name]) != tuple(expected[name])
        ],
    }
    lines = [f"{len(n)} {kind}, the first is {n[0]}" for kind, n in wrong.items() if n]
    if lines:
        raise UserError("the tensors do not fit the model: " + "; ".join(lines))
