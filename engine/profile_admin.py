"""Admin's profiling pass: one batch through the initial model, on any number of ranks."""

import deepspeed.comm as dist
import torch

from magnetar.data.errors import UserError
from magnetar.engine.admin import profile_path, write_profile
from magnetar.engine.batches import TrainingBatches
from magnetar.engine.build import start_distributed, trained_moe_class
from magnetar.engine.checkpoint.format import complete_checkpoints
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.run_data import RunData, training_set
from magnetar.models.admin import omegas, recorded_moments, variances
from magnetar.models.moe.deepspeed import join_expert_groups
from magnetar.models.transformer import build_model


def profile(config: RunConfig, prepared: RunData) -> dict[str, list[float]]:
    """Run the first training batch through the initial model and write the run's profile.

    Every rank calls this; the batch is the first that training will read, whole, so the profile
    does not depend on the layout.

    Args:
        config: resolved for this world size, vocab_size known.
        prepared: the data.

    Returns:
        For each stack, omega of every sublayer.

    Raises:
        UserError: if a run has begun in the folder.
    """
    run_dir = profile_path(config).parent
    if complete_checkpoints(run_dir):
        raise UserError(
            f"training.run_dir={run_dir} already holds a run, which goes on from its "
            "checkpoints without a profile: name another folder for a new one"
        )
    device = start_distributed()
    with torch.device(device):
        model = build_model(config.model, config.training.seed, trained_moe_class(config)).eval()
    join_expert_groups(model)
    data = training_set(prepared, config)
    with recorded_moments(model) as moments, torch.no_grad():
        for inputs, _ in TrainingBatches(config, data, device).of_step(1):
            model(*inputs)
    for table in moments.values():
        dist.all_reduce(table)
    found = {name: variances(table) for name, table in moments.items()}
    if dist.get_rank() == 0:
        write_profile(config, found)
    dist.barrier()
    return {name: omegas(values) for name, values in found.items()}
