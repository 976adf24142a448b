"""Checkpoints of a run: written whole or not at all, found again, read without DeepSpeed.

    runs/NAME/checkpoints/step_00000400/
        manifest.json                 step, layout, resolved config, size of every file
        mp_rank_00_model_states.pt    dense parameters and the trainer's state
        layer_<L>_expert_<G>_mp_rank_00_model_states.pt      expert G of MoE layer L
        *_optim_states.pt             optimizer states, as DeepSpeed lays them out

A checkpoint is written under another name and renamed when every rank has written its part, so
a folder named step_* with a manifest is complete.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from pydantic import ValidationError
from torch import Tensor

from data.errors import UserError
from data.token_files import Prepared
from engine.config import RunConfig
from engine.run_folder import differing, flat_keys
from models.config import ModelConfig
from models.transformer import EncoderDecoder, Transformer, empty_model
from models.weights import check_tensors

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        manifest: `step`, `layout`, `config` (the resolved JSON), fingerprints of the data and
            `files` (name -> bytes).
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]


def save_checkpoint(
    engine: Any, step: int, config: RunConfig, prepared: Prepared, state: dict
) -> Path:
    """Write a checkpoint on every rank; only the newest `training.keep_checkpoints` remain.

    Args:
        engine: the DeepSpeed engine.
        step: optimizer steps done.
        config: the resolved config, kept in the manifest.
        prepared: the data; the manifest keeps its fingerprints, so that others are refused later.
        state: what the trainer needs to go on; plain numbers.

    Raises:
        UserError: on every rank alike if any of them could not write (a full disk, say). Older
            checkpoints are untouched then.
    """
    run_dir = Path(config.training.run_dir)
    folder = run_dir / "checkpoints"
    partial, final = folder / f"partial_{step:08d}", folder / f"step_{step:08d}"
    problem = ""
    if dist.get_rank() == 0:
        for leftover in folder.glob("partial_*"):
            shutil.rmtree(leftover)
        problem = _attempt(lambda: partial.mkdir(parents=True))
    _raise_on_every_rank(problem, partial)

    # DeepSpeed would leave zero_to_fp32.py beside the checkpoints, which refuses MoE models.
    engine._copy_recovery_script = lambda save_path: None
    writes = _GuardedWrites(engine.checkpoint_engine)
    with writes:
        engine.save_checkpoint(
            str(folder), tag=partial.name, client_state={"trainer": state}, save_latest=False
        )
    manifest = {
        "step": step,
        "layout": layout(config, dist.get_world_size()),
        "config": config.to_dict(),
        "tokenizer_fingerprint": prepared.manifest.tokenizer_fingerprint,
        "data_fingerprint": prepared.fingerprint,
    }
    try:
        _raise_on_every_rank(writes.problem, partial)
        if dist.get_rank() == 0:
            problem = _attempt(lambda: _commit(partial, final, manifest))
        _raise_on_every_rank(problem, partial)
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if dist.get_rank() == 0:
        for old in complete_checkpoints(run_dir)[: -config.training.keep_checkpoints]:
            shutil.rmtree(old.path)
    dist.barrier()
    return final


class _GuardedWrites:
    """Lets DeepSpeed's saver go on when a file cannot be written, and remembers why.

    An exception on one rank would leave the others waiting in DeepSpeed's barriers.
    """

    def __init__(self, checkpoint_engine: Any) -> None:
        self.checkpoint_engine, self.problem = checkpoint_engine, ""

    def __enter__(self) -> None:
        self.write = self.checkpoint_engine.save

        def save(state_dict: dict, path: str) -> None:
            self.problem = self.problem or _attempt(lambda: self.write(state_dict, path))

        self.checkpoint_engine.save = save

    def __exit__(self, *_exception: object) -> None:
        del self.checkpoint_engine.save  # the class's own method again


def _attempt(write: Any) -> str:
    """Run a write; return what went wrong, or nothing."""
    try:
        write()
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:
        # torch.save says so when a file did not grow as it should: a full disk, as a rule.
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            return "a file could not be written whole"
        return str(error).splitlines()[0]
    return ""


def _raise_on_every_rank(problem: str, path: Path) -> None:
    problems: list[str] = [""] * dist.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found:
            disk = next(p for p in (path, *path.parents) if p.exists())
            free = shutil.disk_usage(disk).free / 2**20
            raise UserError(
                f"{path.parent}: rank {rank} could not write the checkpoint ({found}; "
                f"{free:.0f} MiB free): older checkpoints are intact; free some space, or lower "
                "training.keep_checkpoints, and start the same command again",
                on_every_rank=True,
            )


def _commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Make sure that the files are on the disk, write the manifest, give the folder its name."""
    files = sorted(path for path in partial.iterdir())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    manifest = manifest | {"files": {path.name: path.stat().st_size for path in files}}
    with (partial / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # the same step, saved again after a resume
        shutil.rmtree(final)
    partial.rename(final)


def complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's complete checkpoints, oldest first, without those of damaged files."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError):  # no manifest, or half of one
            continue
        checkpoint = Checkpoint(path, manifest)
        if isinstance(manifest, dict) and not damaged_files(checkpoint):
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def damaged_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that are missing or of another size than the manifest says."""
    files = checkpoint.manifest.get("files") or {MANIFEST: -1}
    return [
        name
        for name, size in files.items()
        if not (checkpoint.path / name).is_file() or (checkpoint.path / name).stat().st_size != size
    ]


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest complete checkpoint of a run.

    Raises:
        UserError: if the run has none.
    """
    found = complete_checkpoints(run_dir)
    if not found:
        raise UserError(
            f"{run_dir}: holds no complete checkpoint (looked for checkpoints/step_*/"
            f"{MANIFEST}): name a run folder that training has saved to"
        )
    return found[-1]


def layout(config: RunConfig, world_size: int) -> dict[str, int]:
    """What DeepSpeed's files of optimizer states depend on."""
    return {
        "world_size": world_size,
        "ep_size": config.model.moe.ep_size if config.model.moe else 1,
        "zero_stage": config.zero_stage,
    }


def check_fits(
    checkpoint: Checkpoint, config: RunConfig, prepared: Prepared, world_size: int
) -> None:
    """Refuse to go on from a checkpoint of another model, layout or data.

    Raises:
        UserError: naming each key that differs.
    """
    manifest = checkpoint.manifest
    saved_model = with_defaults(manifest["config"]["magnetar"]["model"])
    model = config.model.model_dump(mode="json")
    data = {"fingerprint": prepared.fingerprint[:12]}
    for kind, saved, now in (
        ("layout", manifest["layout"], layout(config, world_size)),
        ("model", dict(flat_keys(saved_model)), dict(flat_keys(model))),
        ("data set", {"fingerprint": manifest["data_fingerprint"][:12]}, data),
    ):
        different = [
            f"{key} {value} there and {own} here" for key, value, own in differing(saved, now)
        ]
        if different:
            raise UserError(
                f"{checkpoint.path} was saved with another {kind}: {', '.join(different)}: go on "
                f"with the {kind} that it was saved with, or start in another training.run_dir"
            )


def with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """A saved model section with the keys added since, if this version can read it."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model


def load_checkpoint(engine: Any, checkpoint: Checkpoint) -> dict:
    """Load weights, optimizer states and schedule into the engine; return the trainer's state.

    Raises:
        UserError: on every rank alike, if another version has named or ordered the tensors.
    """
    model = {name: value for name, value in engine.module.state_dict().items() if _is_dense(name)}
    _require_same_tensors(checkpoint, model, _read_dense(checkpoint.path, mmap=True))
    path, state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    assert path is not None, f"DeepSpeed did not load {checkpoint.path}"
    return state


def load_model(checkpoint: Checkpoint) -> Transformer | EncoderDecoder:
    """The model of a checkpoint with its weights, every expert in this one process.

    Raises:
        UserError: if a file is not what the manifest says, or another version has saved it.
    """
    damaged = damaged_files(checkpoint)
    if damaged:
        raise UserError(
            f"{checkpoint.path / damaged[0]}: missing or not of the size that the manifest "
            "says: use another checkpoint"
        )
    config = ModelConfig.model_validate(checkpoint.manifest["config"]["magnetar"]["model"])
    if config.moe is not None:
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"ep_size": 1})})
    model = empty_model(config)
    weights = _read_dense(checkpoint.path)
    dense = {name: value for name, value in model.state_dict().items() if _is_dense(name)}
    _require_same_tensors(checkpoint, dense, weights)
    for file in checkpoint.path.glob("layer_*_expert_*_model_states.pt"):
        weights |= _read(file)
    model.load_state_dict(weights)
    return model


def _require_same_tensors(
    checkpoint: Checkpoint, model: dict[str, Tensor], saved: dict[str, Tensor]
) -> None:
    """Refuse other names or shapes, and another order: the optimizer's states follow it."""
    problem = ""
    try:
        check_tensors(
            {name: value.shape for name, value in model.items()},
            {name: value.shape for name, value in saved.items()},
        )
    except ValueError as error:
        problem = str(error)
    if not problem and list(model) != list(saved):
        problem = "the tensors are in another order"
    if problem:
        raise UserError(
            f"{checkpoint.path} was saved by a version with another model inside ({problem}): use "
            "that version of Magnetar, or train anew in another training.run_dir",
            on_every_rank=True,
        )


def _is_dense(name: str) -> bool:
    return ".deepspeed_experts." not in name


def _read_dense(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """All but the experts' parameters; with mmap, values are read from the disk when used."""
    return dict(_read(path / "mp_rank_00_model_states.pt", mmap)["module"])


def _read(file: Path, mmap: bool = False) -> dict:
    # DeepSpeed pickles plain Python objects beside the tensors; the file is the user's own.
    return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)
