"""The files of a checkpoint, which belongs to no layout: who wrote them does not matter.

    step_00000400/
        manifest.json            what there is: see below
        rank_00000.safetensors   the share of everything that one rank kept
        rank_00001.safetensors   ...

Every parameter has its name in the whole model's state dict, every expert its global index. Of each
there are up to three states: `weight` (the float32 master weights), `exp_avg` and `exp_avg_sq`
(Adam's). A state is a flat float32 vector cut into pieces `[start, stop)`; a piece lies in one file
under the key `state/name/start`. Whoever reads asks for a range and gets it from the pieces that
hold it, so a rank of another layout reads its own share and no more.

The manifest holds `format`, `step`, `layout`, `config`, fingerprints, `trainer`, `optimizer`,
`files` (name -> bytes and sha256), `tensors` (name -> shape, states, pieces) and `sha256` of all
that. It is written last, before the folder gets its name.
"""

import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A stretch of one tensor.

    Attributes:
        name: the tensor's in the whole model's state dict.
        start: index of the stretch's first element in the flattened tensor.
        values: state -> (n,) float32, all of one length.
    """

    name: str
    start: int
    values: Mapping[str, Tensor]

    @property
    def stop(self) -> int:
        """Index after the last element."""
        return self.start + next(iter(self.values.values())).numel()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are there; `damaged_files` says whether they are whole.

    Attributes:
        path: its folder.
        manifest: see above.
    """

    path: Path
    manifest: dict[str, Any]
    _files: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in the model's order."""
        return {name: tuple(t["shape"]) for name, t in self.manifest["tensors"].items()}

    def states(self, name: str) -> tuple[str, ...]:
        """The states that there are of a tensor: its moments only if it trains."""
        return tuple(self.manifest["tensors"][name]["states"])

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, float32, a copy."""
        pieces = self.manifest["tensors"][name]["pieces"]
        values = torch.empty(stop - start)
        index = bisect_right(pieces, start, key=lambda piece: piece[0]) - 1
        position = start
        while position < stop:
            first, last, file = pieces[index]
            end = min(last, stop)
            stored = self._open(file).get_slice(f"{state}/{name}/{first}")
            values[position - start : end - start] = stored[position - first : end - first]
            position, index = end, index + 1
        return values

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """A whole tensor, float32, in its shape."""
        shape = self.shapes[name]
        return self.read(name, state, 0, prod(shape)).view(shape)

    def files_of(self, name: str) -> list[str]:
        """The files in which a tensor lies."""
        return sorted({file for _, _, file in self.manifest["tensors"][name]["pieces"]})

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Hex digest of all of a manifest's entries but that of the digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder; only its manifest is read.

    Raises:
        UserError: if the manifest is missing, altered, or of another version.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing, so {path} is not a checkpoint: name a folder step_... of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): use another checkpoint") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{file} cannot be read (no JSON object): use another checkpoint")
    is_ours = "sha256" in manifest or manifest.get("format") == FORMAT  # format 1 had no hash
    if is_ours and manifest.get("sha256") != manifest_digest(manifest):
        raise UserError(
            f"{file} is not what was saved (its own sha256 differs): use another checkpoint"
        )
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{file}: checkpoint format {manifest.get('format', 1)}, where this version reads "
            f"{FORMAT}: use the version of Magnetar that wrote it, or another checkpoint"
        )
    return Checkpoint(path, manifest)


def damaged_files(
    checkpoint: Checkpoint, part: int = 0, num_parts: int = 1, content: bool = True
) -> list[str]:
    """What is wrong with the files, a line for each: missing, of another size, or altered.

    Args:
        checkpoint: whose files are looked at.
        part: which share of them, so that ranks can divide the work.
        num_parts: how many shares there are.
        content: also compare the hashes, which reads everything.
    """
    lines = []
    for name, saved in list(checkpoint.manifest["files"].items())[part::num_parts]:
        path = checkpoint.path / name
        if not path.is_file():
            problem = "is missing"
        elif (size := path.stat().st_size) != saved["bytes"]:
            problem = f"has {size:,} bytes where {saved['bytes']:,} were saved"
        elif content and sha256(path) != saved["sha256"]:
            problem = "is not what was saved (its sha256 differs)"
        else:
            continue
        lines.append(f"{path} {problem}; it holds {_held(checkpoint, name)}")
    return lines


def _held(checkpoint: Checkpoint, file: str) -> str:
    """`embedding.weight and 17 more tensors`: what lies in a file."""
    held = [name for name in checkpoint.shapes if file in checkpoint.files_of(name)]
    if not held:
        return "nothing"
    return held[0] + (f" and {len(held) - 1} more tensors" if len(held) > 1 else "")


def require_whole(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with a damaged file.

    Raises:
        UserError: naming every damaged file.
    """
    damaged = damaged_files(checkpoint)
    if damaged:
        raise UserError("\n  ".join([*damaged, "use another checkpoint"]))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first, damaged ones included."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())


def complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's checkpoints, oldest first, but for those of missing or truncated files.

    Raises:
        UserError: for a checkpoint of another version.
    """
    found = []
    for path in checkpoint_folders(run_dir):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            if "checkpoint format" in str(error):
                raise
            continue
        if not damaged_files(checkpoint, content=False):
            found.append(checkpoint)
    return found


class CheckpointWriter:
    """Writes a checkpoint under another name, and gives it its own when it is whole.

    Several processes may each write parts; one of them commits.
    """

    def __init__(self, final: Path) -> None:
        """Nothing is written yet."""
        self.final = final
        self.partial = final.with_name(f"partial_{final.name}")

    def write_part(self, name: str, pieces: Sequence[Piece]) -> None:
        """Write one .safetensors file and, when it is on the disk, a note about it.

        Raises:
            OSError: if it cannot be written.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        path = self.partial / name
        tensors = {
            f"{state}/{piece.name}/{piece.start}": values
            for piece in pieces
            for state, values in piece.values.items()
        }
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # safetensors writes for the owner alone; a person's umask says who else may read.
        path.chmod(0o666 & ~_umask())
        _flush(path)
        note = {
            "file": {"bytes": path.stat().st_size, "sha256": sha256(path)},
            "pieces": [[p.name, p.start, p.stop, list(p.values)] for p in pieces],
        }
        partial_note = path.with_suffix(".partial")
        partial_note.write_text(json.dumps(note))
        partial_note.rename(path.with_suffix(".json"))

    def has_part(self, name: str) -> bool:
        """Whether a part is on the disk."""
        return (self.partial / name).with_suffix(".json").is_file()

    def commit(
        self, parts: Iterable[str], shapes: Mapping[str, Iterable[int]], about: Mapping[str, Any]
    ) -> Checkpoint:
        """Join the parts: write the manifest, give the folder its name.

        Args:
            parts: names of the files.
            shapes: of every tensor, in the model's order.
            about: the manifest's other entries: step, layout, config, ...

        Raises:
            OSError: if the manifest cannot be written.
            ValueError: if the parts do not make up each tensor exactly once.
        """
        files: dict[str, Any] = {}
        pieces: dict[str, list[tuple[int, int, str]]] = {name: [] for name in shapes}
        states: dict[str, list[str]] = {}
        for file in sorted(parts):
            note_path = (self.partial / file).with_suffix(".json")
            note = json.loads(note_path.read_text())
            files[file] = note["file"]
            for name, start, stop, of in note["pieces"]:
                pieces[name].append((start, stop, file))
                states[name] = of
            note_path.unlink()
        tensors = {}
        for name, shape in shapes.items():
            pieces[name].sort()
            _require_whole_tensor(name, prod(shape), pieces[name])
            tensors[name] = {"shape": list(shape), "states": states[name], "pieces": pieces[name]}
        manifest = {"format": FORMAT, **about, "files": files, "tensors": tensors}
        manifest["sha256"] = manifest_digest(manifest)
        path = self.partial / MANIFEST
        path.write_text(json.dumps(manifest, indent=1) + "\n")
        _flush(path)
        if self.final.exists():  # the same step, saved again after a resume
            shutil.rmtree(self.final)
        self.partial.rename(self.final)
        _flush(self.final.parent)
        return read_checkpoint(self.final)

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _require_whole_tensor(name: str, numel: int, pieces: Sequence[tuple[int, int, str]]) -> None:
    position = 0
    for start, stop, _ in pieces:
        if start != position:
            raise ValueError(f"{name}: elements {position} to {start} were saved never or twice")
        position = stop
    if position != numel:
        raise ValueError(f"{name}: {position} of {numel} elements were saved")


def _umask() -> int:
    """The process's, read without changing it: other threads make files too."""
    status = Path("/proc/self/status").read_text()
    (umask,) = re.findall(r"^Umask:\s*(\d+)", status, re.MULTILINE)
    return int(umask, 8)


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def evenly_cut(numel: int, part: int, num_parts: int) -> tuple[int, int]:
    """The part-th of num_parts stretches of nearly equal length."""
    return numel * part // num_parts, numel * (part + 1) // num_parts


def whole_tensors(checkpoint: Checkpoint, state: str = WEIGHT) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state, one after the other."""
    for name in checkpoint.shapes:
        if state in checkpoint.states(name):
            yield name, checkpoint.tensor(name, state)
