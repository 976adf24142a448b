"""What the config.json of an exported folder says about the run that its weights are from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from data.errors import UserError
from engine.config import RunConfig, check_config
from engine.run_folder import differing, flat_keys
from models.config import ModelConfig
from models.moe_config import StrictModel
from models.weights import CONFIG_FILE

RUN_KEY = "run"
# An exported model belongs to no layout.
_FREE_KEYS = {"moe.ep_size"}


class ExportedRun(StrictModel):
    """The key `run` of config.json: entries of a checkpoint's manifest."""

    step: int = Field(ge=0)
    config: dict[str, Any]
    tokenizer_fingerprint: str
    data_fingerprint: str
    trainer: dict[str, Any]
    optimizer: dict[str, Any]


def exported_run(
    folder: Path, model: ModelConfig, about: Mapping[str, Any]
) -> tuple[ExportedRun, RunConfig]:
    """The run of an exported folder, and its config.

    Args:
        folder: a folder of weights.
        model: its model.
        about: the further keys of its config.json, `RUN_KEY` among them.

    Raises:
        UserError: if the run is not described, not one that this version can read, or of another
            model.
    """
    file = folder / CONFIG_FILE
    try:
        run = ExportedRun.model_validate(about[RUN_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (RUN_KEY, *first["loc"])))
        raise UserError(f"{file}: {key}: {first['msg']}: export it again") from None
    config, problems = check_config(run.config)
    if config is None:
        listed = "\n  ".join(problem.text for problem in problems)
        raise UserError(
            f"{file}: its run.config is not one that this version can read:\n  {listed}"
        )
    there, here = (
        dict(flat_keys(section.model_dump(mode="json"))) for section in (config.model, model)
    )
    for key, in_run, in_model in differing(there, here, _FREE_KEYS):
        raise UserError(
            f"{file} contradicts itself: model.{key} is {in_model}, and {in_run} in run.config: "
            "export it again"
        )
    return run, config
