"""The files of a checkpoint. They belong to no layout: any number of ranks reads them.

    step_00000400/
        manifest.json            what there is: see below
        rank_00000.safetensors   what the first rank saved
        rank_00001.safetensors   ...

Every parameter has its name in the whole model's state dict, every expert its global index. Of each
there are up to four states: `weight` (the float32 master weights), `exp_avg` and `exp_avg_sq`
(Adam's), and `ema` (the average of the weights, with training.ema_decay). A state is a flat float32
vector cut into pieces `[start, stop)`. A piece lies in one file under the key `state/name/start`.
`Checkpoint.read` takes a range from the pieces that hold it, so a rank of another layout reads its
own shard and no more.

The manifest holds `format`, `step`, `layout`, `config`, fingerprints, `trainer`, `optimizer`,
`files` (name -> bytes and sha256), `tensors` (name -> shape, states, pieces) and `sha256` (of all
the other entries). It is written last. Then the folder is renamed from partial_step_... to step_...
"""

import hashlib
import json
import os
import re
import shutil
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from magnetar.data.atomic import rename_durably, sync, write_atomically
from magnetar.data.errors import UserError, read_json_object

MANIFEST = "manifest.json"
FORMAT = 2
WEIGHT = "weight"
PARTIAL = "partial_"  # prefix of a folder that is being written or removed
CHECKPOINTS = "checkpoints"  # in a run's folder
_STEP = re.compile(r"step_\d+")


class Piece(NamedTuple):
    """A stretch of one tensor.

    Attributes:
        name: Name of the tensor in the whole model's state dict.
        start: Index of the first element in the flattened tensor.
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
    """A checkpoint on disk. `damaged_files` says whether its files are whole.

    Attributes:
        path: Folder of the checkpoint.
        manifest: Content of manifest.json, described above.
    """

    path: Path
    manifest: dict[str, Any]
    _files: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.manifest["step"]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in the model's order."""
        return {name: tuple(t["shape"]) for name, t in self.manifest["tensors"].items()}

    def states(self, name: str) -> tuple[str, ...]:
        """The states saved of a tensor. A frozen one has no moments."""
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
            if file not in self._files:
                self._files[file] = safe_open(self.path / file, framework="pt")
            stored = self._files[file].get_slice(f"{state}/{name}/{first}")
            values[position - start : end - start] = stored[position - first : end - first]
            position, index = end, index + 1
        return values

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """A whole tensor, float32, in its shape."""
        shape = self.shapes[name]
        return self.read(name, state, 0, prod(shape)).view(shape)

    def files_of(self, name: str) -> list[str]:
        """Names of the files that hold a tensor."""
        return sorted({file for _, _, file in self.manifest["tensors"][name]["pieces"]})


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Hex digest of a manifest's entries, without the entry of the digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _open(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint of a folder, or what is wrong with its manifest."""
    file = path / MANIFEST
    try:
        manifest = read_json_object(file)
    except FileNotFoundError:
        if path.is_symlink() and not path.exists():
            return None, f"{path} is a link to {os.readlink(path)}, which is not there"
        return None, f"{file} is missing"
    except (OSError, ValueError) as error:
        return None, f"{file} cannot be read ({getattr(error, 'strerror', None) or error})"
    is_ours = "sha256" in manifest or manifest.get("format") == FORMAT  # format 1 had no hash
    if is_ours and manifest.get("sha256") != manifest_digest(manifest):
        return None, f"{file} is not what was saved (its own sha256 differs)"
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{file}: checkpoint format {manifest.get('format', 1)}, where this version reads "
            f"{FORMAT}: use the version of Magnetar that wrote it, or another checkpoint"
        )
    if _STEP.fullmatch(path.name) and step_of(path) != manifest["step"]:
        return None, f"{file} is of step {manifest['step']}, not of the folder's {step_of(path)}"
    return Checkpoint(path, manifest), ""


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder; only its manifest is read.

    Raises:
        UserError: if the manifest is missing, altered, of another version or of another step.
    """
    checkpoint, problem = _open(path)
    if checkpoint is None:
        raise UserError(f"{problem}: {instead_of(path)}")
    return checkpoint


def looked_at(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of a folder, or a line for each file that is missing or of another size.

    Raises:
        UserError: if it is of another version.
    """
    checkpoint, problem = _open(path)
    problems = damaged_files(checkpoint, content=False) if checkpoint else [problem]
    return (None if problems else checkpoint), problems


def damaged_files(
    checkpoint: Checkpoint, part: int = 0, num_parts: int = 1, content: bool = True
) -> list[str]:
    """A line for each file that is missing, unreadable, of another size, or altered.

    Args:
        checkpoint: The checkpoint.
        part: Index of the part of the files to look at, so that ranks can divide the work.
        num_parts: Number of parts.
        content: True to compare hashes too, which reads everything.
    """
    lines = []
    for name, saved in list(checkpoint.manifest["files"].items())[part::num_parts]:
        if problem := _file_problem(checkpoint.path / name, saved, content):
            held = [tensor for tensor in checkpoint.shapes if name in checkpoint.files_of(tensor)]
            more = f" and {len(held) - 1} more tensors" if len(held) > 1 else ""
            what = f"{held[0]}{more}" if held else "nothing"
            lines.append(f"{checkpoint.path / name} {problem}; it holds {what}")
    return lines


def _file_problem(path: Path, saved: Mapping[str, Any], content: bool) -> str:
    """What is wrong with a file of bytes and sha256 as `saved`; "" if nothing is."""
    try:
        with path.open("rb") as file:  # it must be readable even if nobody reads it now
            size = os.fstat(file.fileno()).st_size
            if size != saved["bytes"]:
                return f"has {size:,} bytes where {saved['bytes']:,} were saved"
            if content and hashlib.file_digest(file, "sha256").hexdigest() != saved["sha256"]:
                return "is not what was saved (its sha256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def require_whole(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with a damaged file.

    Raises:
        UserError: if a file is damaged; the message names each.
    """
    if damaged := damaged_files(checkpoint):
        raise UserError("\n  ".join([*damaged, instead_of(checkpoint.path)]))


def instead_of(damaged: Path) -> str:
    """Way out of a damaged checkpoint: the newest other one of the run that is complete."""
    others: list[Path] = []
    if damaged.parent.name == CHECKPOINTS:
        complete = complete_checkpoints(damaged.parent.parent)
        others = [checkpoint.path for checkpoint in complete if checkpoint.path != damaged]
    newest = f": the newest complete one is {others[-1]}" if others else ""
    return f"bring it back, readable and as it was saved, or use another checkpoint{newest}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step_"))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Everything under the name of a checkpoint of a run, oldest first, unreadable or not.

    Raises:
        UserError: if the folder of the checkpoints cannot be read. None of them may be taken to
            be missing then.
    """
    folder = run_dir / CHECKPOINTS
    try:
        names = os.listdir(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        raise UserError(
            f"{folder} cannot be read ({error.strerror}), so that nobody can say which checkpoints "
            "the run has: make it readable, mount its disk, or name another run folder"
        ) from None
    return sorted((folder / name for name in names if _STEP.fullmatch(name)), key=step_of)


def complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's checkpoints whose files are all there in their sizes, oldest first.

    Raises:
        UserError: if a checkpoint is of another version, or see `checkpoint_folders`.
    """
    found = (looked_at(path)[0] for path in checkpoint_folders(run_dir))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run.

    Raises:
        UserError: if the run has none, or a file of it is missing or truncated.
    """
    folders = checkpoint_folders(run_dir)
    if not folders:
        raise UserError(
            f"{run_dir}: holds no complete checkpoint (looked for {CHECKPOINTS}/step_*): name a "
            "run folder that training has saved to"
        )
    checkpoint, problems = looked_at(folders[-1])
    if checkpoint is None:
        raise UserError("\n  ".join([*problems, instead_of(folders[-1])]))
    return checkpoint


def remove(path: Path) -> None:
    """Remove a folder, or the link or the file that has its name. What a link names stays.

    What cannot be removed is named on stderr. It costs space, and no checkpoint.
    """
    try:
        if not path.name.startswith(PARTIAL):
            # Renamed first: a kill in here must not leave half a checkpoint under its name.
            path = path.rename(path.with_name(f"{PARTIAL}{path.name}"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        words = f"warning: {path} cannot be removed ({error.strerror}): remove it by hand"
        print(words, file=sys.stderr, flush=True)


def remove_old(run_dir: Path, step: int, keep: int, whole: Collection[int]) -> None:
    """Remove old checkpoints. What cannot be reached, such as a link to another disk, stays.

    Args:
        run_dir: Folder of the run.
        step: Step of the newest checkpoint. Folders of later steps are not touched.
        keep: Number of checkpoints that remain.
        whole: Steps of checkpoints that are known to be whole. Others, whose files may be altered,
            remain only if there are fewer than `keep` of these.
    """
    folders = [p for p in checkpoint_folders(run_dir) if step_of(p) <= step and os.path.isdir(p)]
    kept = [path for path in folders if step_of(path) in whole][-keep:]
    if len(kept) < keep:
        others = [c.path for c in complete_checkpoints(run_dir) if c.path in folders]
        kept += [path for path in others if path not in kept][len(kept) - keep :]
    for path in folders:
        if path not in kept:
            remove(path)


class CheckpointWriter:
    """Writes a checkpoint into a partial folder, and renames that when it is whole.

    Several processes may each write parts. One of them commits.
    """

    def __init__(self, final: Path) -> None:
        """Choose the partial folder; nothing is written yet."""
        self.final = final
        self.partial = final.with_name(f"{PARTIAL}{final.name}")

    def write_part(self, name: str, pieces: Sequence[Piece]) -> None:
        """Write one .safetensors file and, when it is on the disk, a note about it.

        Raises:
            OSError: if the file cannot be written.
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
            raise _system_error(error, path) from error
        # safetensors lets only the owner read. The folder has what the umask leaves.
        path.chmod(self.partial.stat().st_mode & 0o666)
        sync(path)
        note = {
            "file": {"bytes": path.stat().st_size, "sha256": sha256(path)},
            "pieces": [[p.name, p.start, p.stop, list(p.values)] for p in pieces],
        }
        write_atomically(path.with_suffix(".json"), json.dumps(note))

    def has_part(self, name: str) -> bool:
        """Whether a part and its note are on the disk."""
        return (self.partial / name).with_suffix(".json").is_file()

    def commit(
        self, parts: Iterable[str], shapes: Mapping[str, Iterable[int]], about: Mapping[str, Any]
    ) -> Checkpoint:
        """Join the parts: write the manifest, then rename the folder.

        Args:
            parts: Names of the files.
            shapes: Name -> shape of every tensor, in the model's order.
            about: Other entries of the manifest: step, layout, config, ...

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
        write_atomically(self.partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        replaced = self._make_way()
        rename_durably(self.partial, self.final)
        if replaced is not None:
            remove(replaced)
        return read_checkpoint(self.final)

    def _make_way(self) -> Path | None:
        """Rename what has the checkpoint's name.

        Returns:
            A checkpoint of the same step, saved before a resume, which is to be removed. A kill
            must not leave half of it under its name, so it has another one. None: nothing, or
            something that is no checkpoint and stays.
        """
        path = self.final
        if not os.path.lexists(path):
            return None
        if path.is_dir() and not path.is_symlink() and all(map(_is_ours, path.iterdir())):
            return path.rename(path.with_name(f"{PARTIAL}replaced_{path.name}"))
        count = 1
        while os.path.lexists(aside := path.with_name(f"other_{count}_{path.name}")):
            count += 1
        path.rename(aside)
        print(
            f"warning: {path} holds what no checkpoint does: it is {aside.name} now, and the "
            "checkpoint has its name",
            file=sys.stderr,
            flush=True,
        )
        return None

    def abandon(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether a file is one that a checkpoint consists of."""
    return path.is_file() and (path.name == MANIFEST or path.suffix == ".safetensors")


def _require_whole_tensor(name: str, numel: int, pieces: Sequence[tuple[int, int, str]]) -> None:
    position = 0
    for start, stop, _ in pieces:
        if start != position:
            raise ValueError(f"{name}: elements {position} to {start} were saved never or twice")
        position = stop
    if position != numel:
        raise ValueError(f"{name}: {position} of {numel} elements were saved")


def _system_error(error: SafetensorError, path: Path) -> OSError:
    """The OSError behind a SafetensorError, which has the number in its text alone."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return OSError(f"{path}: {error}")
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def evenly_cut(numel: int, part: int, num_parts: int) -> tuple[int, int]:
    """Start and stop of the part-th of num_parts stretches of nearly equal length."""
    return numel * part // num_parts, numel * (part + 1) // num_parts
