"""Weights that a run starts from (training.init_from): any trained model that can be opened."""

from pathlib import Path

from torch import nn

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import checkpoint_folders
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.checkpoint.run_folder import differing_models
from magnetar.engine.checkpoint.vocabulary import require_vocabulary
from magnetar.engine.config.schema import RunConfig
from magnetar.models.weights.load_save import load_tensors

# These keys may differ from the model that the weights come from: noise, losses and dropping in
# training. All others change the function that was learnt.
_MAY_DIFFER_FROM_SOURCE = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "drop_path",
    "moe.frozen",
    "moe.jitter",
    "moe.second_expert",
    "moe.dispatch",
    "moe.capacity_factor",
    "moe.capacity_order",
    "moe.capacity_scope",
    "moe.aux_loss_weight",
    "moe.balance_scope",
    "moe.router_z_loss_weight",
}


def starts_from_weights(config: RunConfig) -> bool:
    """Whether the run will read other weights. It does not once it has a checkpoint of its own."""
    begun = checkpoint_folders(Path(config.training.run_dir))
    return config.training.init_from is not None and not begun


def require_starting_weights(config: RunConfig, fingerprint: str | None = None) -> None:
    """Refuse starting weights of another model or another vocabulary.

    Args:
        config: Config of the run.
        fingerprint: sha256 of the vocabulary of its data, in hexadecimal. None if it is not to be
            compared. Weights that come from no run, such as imported ones, have none.

    Raises:
        UserError: if the weights are missing, or a key differs; the message names each.
    """
    if not starts_from_weights(config):
        return
    assert config.training.init_from is not None
    source = Path(config.training.init_from)
    saved = open_run(source)
    different = [
        f"magnetar.model.{key}: {value} there, {own} here"
        for key, value, own in differing_models(saved.config, config.model, _MAY_DIFFER_FROM_SOURCE)
    ]
    if different:
        listed = "\n  ".join(different)
        raise UserError(
            f"magnetar.training.init_from={source} holds the weights of another model:\n  "
            f"{listed}\nuse those keys, or other weights"
        )
    if fingerprint and saved.fingerprint:
        require_vocabulary(
            f"magnetar.training.init_from={source} holds weights of",
            saved.fingerprint,
            f"that of magnetar.data.path={config.data.path}",
            fingerprint,
            "prepare the data with the vocabulary of those weights (--tokenizer), or use other "
            "weights",
        )


def load_starting_weights(model: nn.Module, source: Path) -> None:
    """Copy starting weights, those of training.init_from, into the model of this rank.

    Raises:
        UserError: See `open_run`; or a file is damaged.
    """
    load_tensors(model, open_run(source).state_dict())
