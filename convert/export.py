"""A checkpoint as a folder of weights with its origin, so that `import` can turn it back.

config.json            model, and run: see engine.checkpoint.exported_run
model.safetensors      or shards of it, see models.weights.files
tokenizer.model|json   the vocabulary
load.py                loads the model and computes logits
"""

from pathlib import Path
from typing import Any

import torch

from magnetar.convert.folders import open_whole, vocabulary_file, write_folder
from magnetar.engine.checkpoint.exported_run import RUN_KEY, ExportedRun
from magnetar.engine.checkpoint.open_run import SavedModel
from magnetar.models.weights.files import as_type
from magnetar.models.weights.load_save import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOAD = '''\
"""Logits of some token ids: python load.py 5 17 3, with Magnetar's folder in PYTHONPATH."""

import sys
from pathlib import Path
import torch
from magnetar.models.weights.load_save import load_model

model = load_model(Path(__file__).parent)
tokens = torch.tensor([[int(token) for token in sys.argv[1:]]])
print(model({arguments}).logits){comment}
'''


def export(
    path: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    ema: bool = False,
    tokenizer: Path | None = None,
    dtype: str = "float32",
    shard_bytes: int | None = None,
) -> list[str]:
    """A report in lines, after writing a run's weights to a new folder.

    Args:
        path: a run's folder, a checkpoint's, or a folder of weights, which is written anew.
        out: new folder.
        checkpoint: name of the checkpoint; None: the newest complete one.
        ema: True for the average of the weights.
        tokenizer: path of the vocabulary, if it is no longer where the run found it.
        dtype: type of the written weights, a key of DTYPES; float32 is what was saved, bit by bit.
        shard_bytes: largest size of a file, see `write_files`.
    """
    source = open_whole(path, out, checkpoint, ema)
    about = _about(source)
    files: dict[str, bytes]
    if source.checkpoint is None and tokenizer is None:
        files = vocabulary_file(source)  # imported weights may have none
    else:
        found = source.require_tokenizer(tokenizer, "--tokenizer")
        files = {found.file_name: found.file_content}
    both = source.config.architecture == "encoder_decoder"
    load = _LOAD.replace("{arguments}", "tokens, tokens" if both else "tokens").replace(
        "{comment}", "  # the source, and the same tokens as the target" if both else ""
    )
    files["load.py"] = load.encode()
    tensors = as_type(source.tensors, DTYPES[dtype])
    step = about.get(RUN_KEY, {}).get("step")
    size = sum(spec.num_bytes for spec in tensors.specs.values())
    rows = [
        ("exported", str(source.path) + (f", step {step}" if step is not None else "")),
        *([("weights", "their average, by magnetar.training.ema_decay")] if ema else []),
        ("tensors", f"{len(tensors.specs)}, {size:,} bytes of {dtype}"),
    ]
    lines = write_folder(
        out,
        source.config,
        tensors,
        rows,
        shard_bytes=shard_bytes,
        about=about,
        other_files=files,
    )
    lines.insert(len(rows), f"wrote     {out} ({', '.join(_shown_files(out))})")
    return lines


def _shown_files(folder: Path) -> list[str]:
    """The names of a folder's files; shards count as one."""
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    if len(shards) > 1:
        names = [name for name in names if name not in shards]
        names.append(f"{shards[0]} and {len(shards) - 1} more")
    return names


def _about(source: SavedModel) -> dict[str, Any]:
    """The origin of the weights, as further keys of config.json."""
    if source.checkpoint is None:
        return read_config(source.path)[1]
    entries = {key: source.checkpoint.manifest[key] for key in ExportedRun.model_fields}
    # An export has no moments, so Adam starts anew; the schedule continues.
    adams = {key: value for key, value in entries["optimizer"].items() if key != "step"}
    return {RUN_KEY: entries | {"optimizer": adams}}
