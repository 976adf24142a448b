"""The folder of one run, and whether a config may resume in it.

runs/NAME/
    config.json      the resolved config
    logbook.md       events of the run, for people
    metrics.jsonl    one object per logged step
    tensorboard/     the same numbers for TensorBoard
    checkpoints/     see engine.checkpoint.save_load
    summary.json     written at the end
    evaluation.json  the last result of magnetar evaluate
"""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from magnetar.data.atomic import lock
from magnetar.data.errors import UserError, read_json_object
from magnetar.engine.config.schema import GuardsConfig, RunConfig, check_config
from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import ON_ONE_RANK

# Keys of a model that belong to the layout: where experts lie, and how tokens reach them.
LAYOUT_KEYS = {f"moe.{key}" for key in ON_ONE_RANK}
# Keys that may change when a run resumes: its length, how often it reports, where it runs.
_MAY_CHANGE_ON_RESUME = {
    "magnetar.data.pairs.too_long_inference",
    "magnetar.training.num_steps",
    "magnetar.training.run_dir",
    "magnetar.training.log_every",
    "magnetar.training.eval_every",
    "magnetar.training.eval_sequences",
    "magnetar.training.eval_translations",
    "magnetar.training.save_every",
    "magnetar.training.keep_checkpoints",
    "magnetar.training.sample_tokens",
    "magnetar.training.resume",
    "magnetar.training.activation_checkpointing",  # trades memory for time; the numbers stay
    "magnetar.training.compile",
    # A checkpoint belongs to no layout.
    *(f"magnetar.model.{key}" for key in LAYOUT_KEYS),
    *(f"magnetar.guards.{key}" for key in GuardsConfig.model_fields),
}
_TRAINED_SECTIONS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "fp16",
    "data_types",
    "magnetar",
)


def flat_keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a JSON object as (dotted path, value)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat_keys(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def differing(
    there: Mapping[str, Any], here: Mapping[str, Any], free: Container[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Leaves of two JSON objects that differ and are not free, with both values.

    A key is a dotted path, and "absent" the value of a missing one.
    """
    one, other = dict(flat_keys(there)), dict(flat_keys(here))
    return [
        (key, one.get(key, "absent"), other.get(key, "absent"))
        for key in sorted(one.keys() | other.keys())
        if key not in free and one.get(key) != other.get(key)
    ]


def differing_models(
    there: ModelConfig, here: ModelConfig, free: Container[str] = ()
) -> list[tuple[str, Any, Any]]:
    """`differing` keys of two models; those of the layout are free."""
    keys = differing(there.model_dump(mode="json"), here.model_dump(mode="json"), free)
    return [each for each in keys if each[0] not in LAYOUT_KEYS]


def accumulation_counts(model: ModelConfig) -> bool:
    """Whether the numbers depend on the number of micro-steps per optimizer step.

    The capacity is computed per micro-step and, with balance_scope "micro_step", so is the balance
    loss.
    """
    moe = model.moe
    if moe is None:
        return False
    balances_each = moe.aux_loss_weight > 0 and moe.balance_scope == "micro_step"
    return moe.dispatch == "capacity" or balances_each


def check_run_folder(config: RunConfig) -> None:
    """Refuse a run folder that another config has begun.

    Raises:
        UserError: if a key differs. The message names each with both values. Or the folder holds a
            run, and `resume` is "never".
    """
    run_dir = Path(config.training.run_dir)
    file = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"training.run_dir={run_dir} is a file: name a folder")
    if not file.is_file():
        return
    if config.training.resume == "never":
        raise UserError(
            f"training.run_dir={run_dir} already holds a run, and training.resume is 'never': "
            "name another folder, delete this one, or use resume 'auto' to go on with it"
        )
    try:
        saved = read_json_object(file)
        if not isinstance(saved.get("magnetar"), dict):
            raise ValueError("it has no key magnetar with an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): copy the config of a checkpoint's "
            f"manifest.json there, delete the file if {run_dir} holds nothing you need, or name "
            "another training.run_dir"
        ) from error
    begun, free = _trained_part(with_defaults(saved)), _MAY_CHANGE_ON_RESUME
    if not accumulation_counts(config.model):
        free = free | {"gradient_accumulation_steps"}
    different = differing(begun, _trained_part(config.to_dict()), free)
    if different:
        listed = "\n  ".join(f"{key}: {there} there, {here} here" for key, there, here in different)
        accumulates = any(key == "gradient_accumulation_steps" for key, _, _ in different)
        if accumulates and config.data.pairs is not None:
            listed += (
                "\nwith data.pairs it follows from the ranks: take as many, or begin a run with "
                'moe.balance_scope="batch", which goes on with any number'
            )
        elif accumulates:
            listed += (
                f"\nwith train_micro_batch_size_per_gpu left out, gradient_accumulation_steps="
                f"{begun.get('gradient_accumulation_steps')} gives the same numbers on any ranks; "
                'in a run with dropless dispatch and moe.balance_scope="batch" any number does'
            )
        raise UserError(
            f"training.run_dir={run_dir} belongs to another config:\n  {listed}\n"
            f"use that config, name another folder (--set magnetar.training.run_dir=...), or "
            f"delete {run_dir}"
        )


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with defaults for keys added since, if this version can read it."""
    config, _ = check_config(saved)
    return saved if config is None else config.to_dict()


def _trained_part(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _TRAINED_SECTIONS if key in config}


def claim_run_folder(run_dir: Path) -> IO[str]:
    """Make the folder of a run and lock it.

    Returns:
        The lock's file. The lock ends when it is closed or the process ends.

    Raises:
        UserError: if another process trains in the folder.
        OSError: if the folder cannot be made or written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        return lock(run_dir / "lock")
    except BlockingIOError as error:
        raise UserError(
            f"training.run_dir={run_dir} is in use by another run: wait until it ends, or name "
            "another folder (--set magnetar.training.run_dir=...)"
        ) from error
