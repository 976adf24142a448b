"""A decoder of the transformers package, dense or sparse, as a Magnetar folder of weights.

The model of that folder has the same logits and gradients. Weights keep their type.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnetar.convert.folders import checked_model, require_new, write_folder
from magnetar.convert.huggingface.names import NOT_WEIGHTS, recipe
from magnetar.convert.huggingface.options import model_keys
from magnetar.data.errors import UserError, read_json_object
from magnetar.data.text.tokenizer import load_tokenizer
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors, Spec, open_files
from magnetar.models.weights.load_save import CONFIG_FILE, tensor_shapes


def from_hf(path: Path, out: Path, shard_bytes: int | None) -> list[str]:
    """A report in lines, after writing a transformers model to a new folder.

    Args:
        path: folder that `save_pretrained` has written.
        out: new folder, see `require_new`.
        shard_bytes: largest size of a file, see `write_files`.
    """
    require_new(out, path)
    file = path / CONFIG_FILE
    try:
        options = read_json_object(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): name a folder that save_pretrained has written"
        ) from None
    config, tensors = translate(options, open_files(path), str(path))
    files, remark = _vocabulary(path, config)
    rows = [
        ("was", f"{options['model_type']} of transformers"),
        ("is", f"{config.architecture}, norm {config.norm}, {config.norm_type}"),
        ("vocabulary", remark),
        ("wrote", str(out)),
    ]
    return write_folder(out, config, tensors, rows, shard_bytes=shard_bytes, other_files=files)


def _vocabulary(path: Path, config: ModelConfig) -> tuple[dict[str, bytes], str]:
    """Name and content of the model's tokenizer file, and its place or why there is none."""
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        return {}, f"not copied: {error}"
    assert config.vocab_size is not None
    if tokenizer.vocab_size > config.vocab_size:
        entries = f"{tokenizer.vocab_size} entries for {config.vocab_size} rows of the embedding"
        return {}, f"not copied: {tokenizer.path} has {entries}"
    return {tokenizer.file_name: tokenizer.file_content}, f"{tokenizer.path}"


def translate(
    options: Mapping[str, Any], tensors: LazyTensors, path: str
) -> tuple[ModelConfig, LazyTensors]:
    """Config and tensors of a transformers model in Magnetar's terms.

    Args:
        options: keys of its config.json, or `config.to_dict()`.
        tensors: its tensors under the names that `save_pretrained` gives them.
        path: name of the model, for messages.

    Raises:
        UserError: if an option or a tensor has no counterpart.
    """
    keys = model_keys(options, f"{path}/{CONFIG_FILE}")
    config = checked_model(keys, f"{path}: its options make no model of Magnetar's")
    shapes = tensor_shapes(config)
    recipes = {name: recipe(name, options["model_type"], config) for name in shapes}
    stored = _with_prefix(tensors, recipes["embedding.weight"].sources[0])
    sources = {source for each in recipes.values() for source in each.sources}
    for name in stored.specs:
        # Tied models of earlier versions hold the output's copy of the embedding.
        is_tied_copy = config.tie_embeddings and name == "lm_head.weight"
        if name not in sources and not is_tied_copy and not NOT_WEIGHTS.fullmatch(name):
            raise UserError(f"{path}: {name} is a tensor that the model of its options lacks")
    specs = {}
    for name, shape in shapes.items():
        parts = []
        for source in recipes[name].sources:
            if source not in stored.specs:
                raise UserError(f"{path}: {source} is missing: copy the folder again")
            spec = stored.specs[source]
            parts.append(torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        try:
            made = recipes[name].make(parts)
        except RuntimeError:
            made = parts[0]
        if made.shape != shape:
            raise UserError(
                f"{path}: {' and '.join(recipes[name].sources)} have shapes "
                f"{[tuple(part.shape) for part in parts]}, which do not make {tuple(shape)}: its "
                "options are those of another model"
            )
        specs[name] = Spec(made.dtype, tuple(shape))

    def read(name: str) -> Tensor:
        return recipes[name].make([stored.read(source) for source in recipes[name].sources])

    return config, LazyTensors(specs, read)


def _with_prefix(tensors: LazyTensors, embedding: str) -> LazyTensors:
    """The tensors under their names in a model with an output, if they come from one without."""
    prefix = embedding.partition(".")[0] + "."
    if embedding in tensors.specs or embedding.removeprefix(prefix) not in tensors.specs:
        return tensors
    specs = {prefix + name: spec for name, spec in tensors.specs.items()}
    return LazyTensors(specs, lambda name: tensors.read(name.removeprefix(prefix)))
