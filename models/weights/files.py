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


def unwatched(_doing: str, names: Sequence[str]) -> Iterable[str]:
    """A Watch that shows nothing."""
    return names


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
    folder: Path, tensors: LazyTensors, shard_bytes: int | None = None, watch: Watch = unwatched
) -> dict[str, str]:
    """Write all tensors into a folder, then read them back and compare.

    Args:
        folder: existing folder.
        tensors: tensors in the order of the shards.
        shard_bytes: largest size of a file's tensors in bytes, unless one tensor is larger; None
            writes one file.
        watch: progress display.

    Returns:
        Name -> sha256 of each tensor's bytes.

    Raises:
        ValueError: if the bytes read back differ.
        OSError: if they cannot be written.
    """
    groups = grouped({name: spec.num_bytes for name, spec in tensors.specs.items()}, shard_bytes)
    count = len(groups)
    files = (
        {WEIGHTS_FILE: groups[0]}
        if count == 1
        else {
            f"model-{number:05d}-of-{count:05d}.safetensors": names
            for number, names in enumerate(groups, start=1)
        }
    )
    laid_out = {file: _laid_out(names, tensors.specs) for file, names in files.items()}
    coming = iter(watch("writing", [name for names in laid_out.values() for name in names]))
    digests: dict[str, str] = {}
    for file, names in laid_out.items():
        _write_file(folder / file, names, islice(coming, len(names)), tensors, digests)
    next(coming, None)  # ends the progress display
    if count > 1:
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in tensors.specs.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    written = open_files(folder)
    for name in watch("checking", list(tensors.specs)):
        if _digest(written.read(name)) != digests[name]:
            raise UserError(f"{folder}: {name} is not what was written: use another disk")
    return digests


def checked(folder: Path, tensors: LazyTensors, digests: Mapping[str, str]) -> LazyTensors:
    """The same tensors, with each sha256 compared on reading.

    Raises:
        ValueError: on reading, if a tensor is not what was written.
    """

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        if name in digests and _digest(tensor) != digests[name]:
            raise UserError(
                f"{folder}: {name} is not what was written (its sha256 differs): copy the folder "
                "again, or convert it again"
            )
        return tensor

    return LazyTensors(tensors.specs, read)


def _laid_out(names: Iterable[str], specs: Mapping[str, Spec]) -> list[str]:
    """Names sorted by dtype, the widest first, which aligns every tensor; then by name."""
    return sorted(names, key=lambda name: (_ORDER.index(specs[name].dtype), name))


def _write_file(
    path: Path,
    names: Sequence[str],
    coming: Iterable[str],
    tensors: LazyTensors,
    digests: dict[str, str],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        spec = tensors.specs[name]
        end = position + spec.num_bytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in coming:
            tensor, spec = tensors.read(name), tensors.specs[name]
            assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} is not {spec}"
            digests[name] = _digest(tensor)
            file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def open_files(folder: Path) -> LazyTensors:
    """The tensors of a folder; opening reads only the headers of its files.

    Raises:
        ValueError: if a file is missing or damaged, or the index does not fit the files.
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
    return LazyTensors(specs, lambda name: files[places[name]].get_tensor(name))


def _weight_map(folder: Path) -> dict[str, str]:
    """Name -> file of every tensor."""
    if (folder / WEIGHTS_FILE).is_file():
        return dict.fromkeys(_open(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)
    index = folder / INDEX_FILE
    try:
        places = read_json_object(index).get("weight_map")
    except FileNotFoundError:
        raise UserError(
            f"{index} is missing, which says which shard holds which tensor: copy it again, or "
            "convert it again"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{index} cannot be read ({error}): copy it again, or convert it again"
        ) from error
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
