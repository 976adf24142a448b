"""Admin's profiling pass: one batch through the initial model, on any number of ranks."""

import deepspeed.comm as dist
import torch

from magnetar.data.errors import UserError
from magnetar.data.loader import RunData
from magnetar.engine.admin.profile import profile_path, write_profile
from magnetar.engine.build import start_distributed
from magnetar.engine.checkpoint.format import checkpoint_folders
from magnetar.engine.config.batch_sizes import ACCUMULATION
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.train_step import training_batches
from magnetar.engine.zero import trained_moe_class
from magnetar.models.admin import omegas, recorded_moments, variances
from magnetar.models.moe.deepspeed import join_expert_groups
from magnetar.models.transformer import build_model


def profile(config: RunConfig, data: RunData) -> dict[str, list[float]]:
    """Run the first training batch through the initial model, and write the run's profile.

    Every rank calls this. The batch is the whole first batch of the training, so the profile does
    not depend on the layout. The config is one of `resolve_run`.

    Returns:
        The omegas of the sublayers, by stack.
    """
    run_dir = profile_path(config).parent
    if checkpoint_folders(run_dir):
        raise UserError(
            f"training.run_dir={run_dir} already holds a run, which goes on from its "
            "checkpoints without a profile: name another folder for a new one"
        )
    device = start_distributed()
    with torch.device(device):
        moe_class = trained_moe_class(config)
        model = build_model(config.model, config.training.seed, moe_class).eval()
    join_expert_groups(model)
    batches = training_batches(data, config.deepspeed[ACCUMULATION], device)
    with recorded_moments(model) as moments, torch.no_grad():
        for inputs, _ in batches.of_step(1):
            model(*inputs)
    for table in moments.values():
        dist.all_reduce(table)
    found = {name: variances(table) for name, table in moments.items()}
    if dist.get_rank() == 0:
        write_profile(config, found)
    dist.barrier()
    return {name: omegas(values) for name, values in found.items()}
