"""What the config.json of an exported folder says about the run that its weights are from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError

from magnetar.data.errors import UserError
from magnetar.data.text.tokenizer import TokenizerFile
from magnetar.engine.checkpoint.format import sha256
from magnetar.engine.checkpoint.run_folder import differing, flat_keys
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import ON_ONE_RANK
from magnetar.models.section import StrictModel
from magnetar.models.weights.load_save import CONFIG_FILE, first_problem

RUN_KEY = "run"
# An exported model belongs to no layout.
_FREE_KEYS = {f"moe.{key}" for key in ON_ONE_RANK}


# As it was written, whatever a validation or a loss scale came to.
_Number = int | Annotated[float, Field(allow_inf_nan=True)]


class TrainerEntry(StrictModel):
    """What `engine.trainer` goes on with."""

    seconds: float = 0.0
    num_clipped: int = 0
    num_targets: int = 0
    num_bad: int = 0
    batch_offset: int = 0
    recent_losses: list[float] = Field(default_factory=list)
    before: dict[str, _Number] = Field(default_factory=dict)
    after: dict[str, _Number] = Field(default_factory=dict)
    examples: list[list[str]] = Field(default_factory=list)


class OptimizerEntry(StrictModel):
    """What the schedule and the loss scale are set to when a run goes on; Adam starts anew."""

    schedule_step: int = Field(ge=0)
    skipped_steps: int = Field(ge=0)
    loss_scaler: dict[str, bool | _Number]


class ExportedRun(StrictModel):
    """The key `run` of config.json: entries of a checkpoint's manifest."""

    step: int = Field(ge=0)
    config: dict[str, Any]
    tokenizer_fingerprint: str
    data_fingerprint: str
    trainer: TrainerEntry
    optimizer: OptimizerEntry


def exported_run(
    folder: Path, model: ModelConfig, about: Mapping[str, Any]
) -> tuple[ExportedRun, RunConfig]:
    """The run of an exported folder, and its config; all that can be checked without tensors is.

    Args:
        folder: a folder of weights.
        model: its model.
        about: the further keys of its config.json, `RUN_KEY` among them.

    Raises:
        UserError: if the run is not described, not one that this version can read, of another
            model, or of another vocabulary than the one beside the weights.
    """
    file = folder / CONFIG_FILE
    try:
        run = ExportedRun.model_validate(about[RUN_KEY])
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error, RUN_KEY)}: export it again") from None
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
    for vocabulary in (folder / name for name in get_args(TokenizerFile)):
        if vocabulary.is_file() and sha256(vocabulary) != run.tokenizer_fingerprint:
            raise UserError(
                f"{vocabulary} is not the vocabulary that the run was trained with (its sha256 "
                "differs): copy the folder again, or export it again"
            )
    return run, config
