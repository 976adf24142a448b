"""The key `run` in the config.json of an export: what it says about the run it was made from."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from magnetar.data.errors import UserError
from magnetar.models.section import StrictModel
from magnetar.models.weights.load_save import CONFIG_FILE, first_problem

RUN_KEY = "run"

# A validation loss or a loss scale may be infinite or NaN.
_Number = int | Annotated[float, Field(allow_inf_nan=True)]


class TrainerEntry(StrictModel):
    """The part of a checkpoint beside DeepSpeed's own state: the states of a run's components.

    The position in the data, the learning rate and the noise are functions of the step and of
    `batch_offset`, so they have no entry here.

    Attributes:
        seconds: training time over all starts, without evaluations and saves.
        num_clipped: steps that SparseClip clipped.
        num_targets: tokens that were asked about.
        num_bad: steps that the guards left out.
        batch_offset: batches that rollbacks left out.
        recent_losses: losses with which the guards compare the next one.
        before: validation of the initial weights.
        after: the last validation.
        examples: a few translations by the initial weights.
    """

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
    """State of the schedule and of the loss scale. An export has no moments: Adam starts anew."""

    schedule_step: int = Field(ge=0)
    skipped_steps: int = Field(ge=0)
    loss_scaler: dict[str, bool | _Number]


class ExportedRun(StrictModel):
    """Entries of the checkpoint's manifest that an export keeps."""

    step: int = Field(ge=0)
    config: dict[str, Any]
    tokenizer_fingerprint: str
    data_fingerprint: str
    trainer: TrainerEntry
    optimizer: OptimizerEntry

    @field_validator("config")
    @classmethod
    def _names_its_data(cls, config: dict[str, Any]) -> dict[str, Any]:
        match config:
            case {"magnetar": {"data": {"path": str()}}}:
                return config
        raise ValueError("it has no magnetar.data.path with a text")


def read_entry(folder: Path, entry: Any) -> ExportedRun:
    """The key `run` of a folder's config.json, checked.

    Args:
        folder: Folder of weights.
        entry: Value of the key.

    Raises:
        UserError: if an entry is missing, unknown or of another type.
    """
    try:
        return ExportedRun.model_validate(entry)
    except ValidationError as error:
        problem = first_problem(error, RUN_KEY)
        raise UserError(f"{folder / CONFIG_FILE}: {problem}: export it again") from None
