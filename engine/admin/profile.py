"""The profile that an Admin model starts from: variances of one batch in the initial model."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import nn

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError, first_problem
from magnetar.engine.checkpoint.format import checkpoint_folders
from magnetar.engine.config.schema import RunConfig
from magnetar.models.admin import set_omegas
from magnetar.models.moe.config import ON_ONE_RANK
from magnetar.models.section import StrictModel

PROFILE_FILE = "admin_profile.json"


def profile_path(config: RunConfig) -> Path:
    """The file of a run's profile."""
    return Path(config.training.run_dir) / PROFILE_FILE


class Profile(StrictModel):
    """What admin_profile.json holds.

    Attributes:
        seed: seed of the initial weights.
        model: the model's section without the keys of its layout.
        data: the data's section without its path.
        variances: variances of the embedding and of each sublayer's output, by stack.
    """

    seed: int
    model: dict[str, Any]
    data: dict[str, Any]
    variances: dict[str, list[Annotated[float, Field(gt=0)]]]


def new_profile(config: RunConfig, variances: dict[str, list[float]]) -> Profile:
    """A profile, and all that it depends on."""
    model = config.model.model_dump(mode="json")
    if model["moe"] is not None:
        for key in ON_ONE_RANK:
            model["moe"].pop(key)
    data = config.data.model_dump(mode="json", exclude={"path"})
    return Profile(seed=config.training.seed, model=model, data=data, variances=variances)


def require_admin(config: RunConfig) -> None:
    """Refuse to profile a model of another norm."""
    if config.model.norm != "admin":
        raise UserError(
            f"magnetar.model.norm={config.model.norm!r} needs no profile: start magnetar train, "
            "or use norm 'admin'"
        )


def needs_profile(config: RunConfig) -> bool:
    """Whether omegas start from the profile, since neither checkpoint nor weights hold them."""
    begun = checkpoint_folders(Path(config.training.run_dir))
    return config.model.norm == "admin" and config.training.init_from is None and not begun


def require_profile(config: RunConfig) -> None:
    """Refuse an Admin model that starts anew without a profile of its own."""
    if needs_profile(config):
        _read_profile(config)


def start_omegas(model: nn.Module, config: RunConfig) -> None:
    """Start an Admin model from the run's profile."""
    set_omegas(model, _read_profile(config).variances)


def _read_profile(config: RunConfig) -> Profile:
    path = profile_path(config)
    command = (
        "deepspeed --module magnetar.launchers.profile_admin --deepspeed_config ... with the same "
        "JSON and --set"
    )
    if not path.is_file():
        raise UserError(
            f"magnetar.model.norm='admin' starts from a profile, and {path} is missing: make it, "
            f"{command}"
        )
    again = f"delete it and make it again, {command}"
    try:
        profile = Profile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is no profile ({first_problem(error)}): {again}") from error
    expected = new_profile(config, profile.variances)
    different = [name for name, value in expected if getattr(profile, name) != value]
    if different:
        raise UserError(
            f"{path} was made with another {' and another '.join(different)}: {again}, or name "
            "another training.run_dir"
        )
    depths = {"encoder": config.model.encoder_depth, "decoder": config.model.decoder_depth}
    per_layer = {"encoder": 2, "decoder": 3 if depths["encoder"] else 2}  # sublayers
    sizes = {name: 1 + depth * per_layer[name] for name, depth in depths.items() if depth}
    if {name: len(values) for name, values in profile.variances.items()} != sizes:
        raise UserError(
            f"{path} is no profile (variances: must be {sizes} numbers for this model): {again}"
        )
    return profile


def write_profile(config: RunConfig, variances: dict[str, list[float]]) -> None:
    """Write the profile of a run; `variances` are those of `Profile`."""
    path = profile_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, new_profile(config, variances).model_dump_json(indent=1) + "\n")
