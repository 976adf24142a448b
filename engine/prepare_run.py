"""A run's config and data, checked before any process group exists."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from magnetar.data.errors import UserError
from magnetar.data.loader import DataOptions, Masking, PairOptions, RunData, open_data
from magnetar.engine.admin.profile import require_profile
from magnetar.engine.checkpoint.format import complete_checkpoints
from magnetar.engine.checkpoint.run_folder import check_run_folder
from magnetar.engine.checkpoint.save_load import check_fits
from magnetar.engine.checkpoint.starting_weights import require_starting_weights
from magnetar.engine.config.batch_sizes import MICRO, TRAIN
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.engine.memory_planner import require_host_memory
from magnetar.engine.optim.adam import require_optimizer_package
from magnetar.engine.translation.translate import require_sacrebleu


def prepare_run(config: RunConfig, world_size: int) -> tuple[RunConfig, RunData]:
    """Check everything that can be checked before a process group exists.

    Returns:
        The config with vocab_size filled in and outputs placed in the run's folder; the data.

    Raises:
        UserError: data that is missing or does not fit, a model that this machine's memory does
            not hold, a run folder of another config, an Admin model without its profile, or a
            checkpoint of another model or other data.
    """
    result, data = resolve_run(config, world_size)
    require_host_memory(result, world_size)
    check_run_folder(result)
    require_starting_weights(result, data.manifest.tokenizer_fingerprint)
    require_profile(result)
    run_dir = Path(result.training.run_dir)
    for checkpoint in complete_checkpoints(run_dir)[-1:]:
        check_fits(checkpoint, result, data)
        if checkpoint.step > result.training.num_steps:
            raise UserError(
                f"magnetar.training.num_steps={result.training.num_steps} is less than the "
                f"{checkpoint.step} steps that {run_dir} has done: use {checkpoint.step} or more, "
                "or name another training.run_dir"
            )
    return result, data


def resolve_run(config: RunConfig, world_size: int) -> tuple[RunConfig, RunData]:
    """The config with what depends on the data filled in, and the data.

    Raises:
        UserError: data that is missing or does not fit, or a missing package of a monitor or of
            the optimizer.
    """
    data = open_data(Path(config.data.path), data_options(config))
    resolved = config.to_dict()
    resolved["magnetar"]["model"]["vocab_size"] = fitting_vocab_size(
        config.model.vocab_size, data.vocab_size, config.data.masking is not None, data.path
    )
    schedule = resolved["magnetar"]["training"]["lr_schedule"]
    if config.training.lr_schedule.ends and schedule["total_steps"] is None:
        # Written down, so that a longer run cannot bend the schedule of the steps already done.
        schedule["total_steps"] = config.training.num_steps
    require_monitor_packages(resolved)
    require_optimizer_package(resolved["optimizer"]["type"])
    if config.data.pairs is not None:
        require_sacrebleu()
    for monitor, name in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
        section = resolved.get(monitor, {})
        if section.get("enabled") and not section.get("output_path"):
            section |= {"output_path": config.training.run_dir, "job_name": name}
    result, problems = check_config(resolved, world_size)
    assert result is not None, problems
    return result, data


def data_options(config: RunConfig) -> DataOptions:
    """What the data loader needs of a config that is resolved for its ranks."""
    data, sizes, training = config.data, config.deepspeed, config.training
    masking, pairs = None, None
    if (masks := data.masking) is not None:
        length = masks.mean_span_length if masks.unit == "span" else None
        masking = Masking(masks.probability, length, masks.replace)
    if (asked := data.pairs) is not None:
        max_target_len = config.model.max_target_len or config.model.max_seq_len
        pairs = PairOptions(
            asked.bin_tokens,
            asked.temperature,
            asked.directions,
            asked.too_long,
            data.seq_len,
            max_target_len,
        )
    return DataOptions(
        architecture=config.model.architecture,
        seq_len=data.seq_len,
        train_batch_size=sizes[TRAIN],
        micro_batch_size=sizes[MICRO],
        seed=training.seed,
        eval_sequences=training.eval_sequences,
        masking=masking,
        pairs=pairs,
    )


def fitting_vocab_size(given: int | None, of_data: int, is_masked: bool, path: Path) -> int:
    """Rows of the embedding: one for each entry of the vocabulary, and one for a mask token.

    Args:
        given: vocab_size of the config; None for what is needed. Fewer are refused.
        of_data: entries of the vocabulary.
        is_masked: whether the model needs a mask token.
        path: the prepared folder.
    """
    needed = of_data + is_masked
    if given is not None and given < needed:
        with_mask = " and a mask token" if is_masked else ""
        raise UserError(
            f"magnetar.model.vocab_size={given} is smaller than the vocabulary of "
            f"{path}{with_mask}, {needed}: use null, or at least {needed}"
        )
    return given or needed


def require_monitor_packages(config: dict[str, Any]) -> None:
    """Refuse a monitor whose package is missing; DeepSpeed would notice only when all ranks run."""
    for monitor, package in (("tensorboard",) * 2, ("wandb",) * 2, ("comet", "comet_ml")):
        if config.get(monitor, {}).get("enabled") and find_spec(package) is None:
            raise UserError(
                f"{monitor}.enabled=true needs the package {package}, which is not installed: "
                f"run pip install {package}, or set {monitor}.enabled=false"
            )
