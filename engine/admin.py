"""The profile that an Admin model starts from: one batch through the initial model."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from data.errors import UserError
from engine.config import RunConfig
from engine.run_folder import write_whole
from models.admin import set_omegas

PROFILE_FILE = "admin_profile.json"


def profile_path(config: RunConfig) -> Path:
    """Where a run keeps its profile."""
    return Path(config.training.run_dir) / PROFILE_FILE


def profiled_model(config: RunConfig) -> dict[str, Any]:
    """What a profile depends on: the initial model, wherever its experts lie."""
    model = config.model.model_dump(mode="json")
    if model["moe"] is not None:
        model["moe"].pop("ep_size")
    return {"seed": config.training.seed, "model": model}


def require_admin(config: RunConfig) -> None:
    """Refuse to profile a model of another norm.

    Raises:
        UserError: naming the norm.
    """
    if config.model.norm != "admin":
        raise UserError(
            f"magnetar.model.norm={config.model.norm!r} needs no profile: start launchers.train, "
            "or use norm 'admin'"
        )


def require_profile(config: RunConfig) -> None:
    """Refuse an Admin model that starts anew without a profile of its own.

    Raises:
        UserError: if the run's folder has none, or one of another model.
    """
    if config.model.norm == "admin" and config.training.init_from is None:
        _read_profile(config)


def start_omegas(model: nn.Module, config: RunConfig) -> None:
    """Start an Admin model from the run's profile."""
    set_omegas(model, _read_profile(config)["variances"])


def _read_profile(config: RunConfig) -> dict[str, Any]:
    path = profile_path(config)
    command = "deepspeed --module launchers.profile_admin --deepspeed_config ..."
    if not path.is_file():
        raise UserError(
            f"magnetar.model.norm='admin' starts from a profile, and {path} is missing: make it "
            f"with the same JSON, {command}"
        )
    try:
        profile = json.loads(path.read_text())
        found = {key: profile[key] for key in ("seed", "model")}
        assert isinstance(profile["variances"], dict)
    except (json.JSONDecodeError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is no profile: delete it and make it again, {command}") from error
    if found != profiled_model(config):
        raise UserError(
            f"{path} is the profile of another model or training.seed: delete it and make it "
            f"again, {command}, or name another training.run_dir"
        )
    return profile


def write_profile(config: RunConfig, found: dict[str, list[float]]) -> None:
    """Keep a profile with the run: for each stack the variances of embedding and sublayers."""
    path = profile_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**profiled_model(config), "variances": found}, indent=1)
    write_whole(path, text + "\n")
