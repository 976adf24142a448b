"""Tensors in .safetensors files with one in memory at a time: one file, or shards and their index.

model.safetensors                        all tensors, or
model-00001-of-00003.safetensors, ...    some of them each, and
model.safetensors.index.json             {"metadata": {"total_size": bytes},
                                          "weight_map": {name: file}}

The bytes equal those of safetensors' own `save_file`, which needs all tensors of a file at once.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from magnetar.data.errors import UserError, read_json_object

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"

# safetensors' names of the dtypes, in the order in which it writes tensors to a file.
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ORDER = list(_CODES)
_ALIGNMENT = 8  # bytes, alignment of the first tensor

# A progress display: (what is done, names of the tensors) -> the names, one by one.
Watch = Callable[[str, Sequence[str]], Iterable[str]]


class Spec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LazyTensors:
    """Tensors that are read or computed one at a time.

    Attributes:
        specs: name -> dtype and shape.
        read: function from a name to its tensor on the CPU.
    """

    specs: Mapping[str, Spec]
    read: Callable[[str], Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: spec.shape for name, spec in self.specs.items()}


def in_memory(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """LazyTensors of tensors in memory."""
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return LazyTensors(specs, lambda name: tensors[name].detach().cpu().contiguous())


def as_type(tensors: LazyTensors, dtype: torch.dtype) -> LazyTensors:
    """The same tensors in another dtype; reading raises ValueError if a number overflows."""

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        converted = tensor.to(dtype)
        if not torch.equal(converted.isfinite(), tensor.isfinite()):
            raise UserError(
                f"{name} reaches {tensor.abs().max().item():g}, and {str(dtype)[6:]} ends at "
                f"{torch.finfo(dtype).max:g}: use float32 or bfloat16"
            )
        return converted

    return LazyTensors({name: Spec(dtype, s.shape) for name, s in tensors.specs.items()}, read)


def grouped(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in order, cut into groups of up to `limit` bytes; a larger tensor is alone."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if limit is not None and groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def has_weights(folder: Path) -> bool:
    """Whether a folder holds model.safetensors, or its index, or any shard."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)) or any(
        folder.glob(_SHARDS)
    )


def write_files(
    folder: Path, tensors: LazyTensors, shard_bytes: int | None = None, watch: Watch | None = None
) -> dict[str, str]:
    """The sha256 of each tensor's bytes, after writing all into a folder and reading them back.

    Args:
        folder: existing folder.
        tensors: tensors in the order of the shards.
        shard_bytes: largest size of a file's tensors in bytes, unless one tensor is larger; None
            writes one file.
        watch: progress display.

    Raises:
        ValueError: if the bytes read back differ.
        OSError: if they cannot be written.
    """
    watch = watch or (lambda _doing, names: names)
    sizes = {name: spec.num_bytes for name, spec in tensors.specs.items()}
    groups = grouped(sizes, shard_bytes)
    count = len(groups)
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        files = [WEIGHTS_FILE]
    # Sorted by dtype, the widest first, which aligns every tensor; then by name.
    laid_out = [
        sorted(names, key=lambda name: (_ORDER.index(tensors.specs[name].dtype), name))
        for names in groups
    ]
    coming = iter(watch("writing", [name for names in laid_out for name in names]))
    digests: dict[str, str] = {}
    for file_name, names in zip(files, laid_out, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: tensors.specs[name] for name in names}))
            for name in islice(coming, len(names)):
                tensor, spec = tensors.read(name), tensors.specs[name]
                assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} is not {spec}"
                digests[name] = digest(tensor)
                file.write(_bytes(tensor))
    next(coming, None)  # ends the progress display
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                n: file for file, names in zip(files, groups, strict=True) for n in names
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    written = open_files(folder)
    for name in watch("checking", list(tensors.specs)):
        if digest(written.read(name)) != digests[name]:
            raise UserError(f"{folder}: {name} is not what was written: use another disk")
    return digests


def _header(specs: Mapping[str, Spec]) -> bytes:
    """The start of a file, whose tensors follow in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's values, in the type that it has."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def open_files(folder: Path, digests: Mapping[str, str] | None = None) -> LazyTensors:
    """The tensors of a folder; opening reads only the headers of its files.

    Args:
        folder: folder of the files.
        digests: sha256 of the tensors by name, which reading compares.

    Raises:
        ValueError: if a file is missing or damaged, or the index does not fit the files; on
            reading, if a tensor is not what was written.
    """
    places = _weight_map(folder)
    files = {name: _open(folder / name) for name in sorted(set(places.values()))}
    held = {(name, file) for file, opened in files.items() for name in opened.keys()}  # noqa: SIM118
    for name, file in sorted(set(places.items()) ^ held):
        what = "holds" if (name, file) in held else "does not hold"
        raise UserError(
            f"{folder / file} {what} {name}, and {INDEX_FILE} says otherwise: copy them again, or "
            "convert it again"
        )
    specs = {}
    for name, file in places.items():
        entry = files[file].get_slice(name)
        code = entry.get_dtype()
        if code not in _DTYPES:
            raise UserError(
                f"{folder / file}: {name} is of type {code}, where a model has "
                f"{', '.join(_DTYPES)}: convert it again"
            )
        specs[name] = Spec(_DTYPES[code], tuple(entry.get_shape()))

    def read(name: str) -> Tensor:
        tensor = files[places[name]].get_tensor(name)
        if digests and name in digests and digest(tensor) != digests[name]:
            raise UserError(
                f"{folder}: {name} is not what was written (its sha256 differs): copy the folder "
                "again, or convert it again"
            )
        return tensor

    return LazyTensors(specs, read)


def _weight_map(folder: Path) -> dict[str, str]:
    """Name -> file of every tensor."""
    if (folder / WEIGHTS_FILE).is_file():
        return dict.fromkeys(_open(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)
    index = folder / INDEX_FILE
    try:
        places = read_json_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        problem = (
            "is missing, which says which shard holds which tensor"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({error})"
        )
        raise UserError(f"{index} {problem}: copy it again, or convert it again") from None
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise UserError(
            f"{index} has no object weight_map of tensors' names and the files beside it: copy it "
            "again, or convert it again"
        )
    return places


def _open(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors says "No such file" of every one that it cannot open
        return safe_open(path, framework="pt")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): make it readable, or copy it again"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read ({error}): copy it again, or convert it again"
        ) from error
