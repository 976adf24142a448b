"""Weights that a run starts from: another run's, or a folder that magnetar convert has written."""

from pathlib import Path

from torch import Tensor, nn

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.exported_run import RUN_KEY
from magnetar.engine.checkpoint.format import Checkpoint, complete_checkpoints
from magnetar.engine.checkpoint.open_run import choose_checkpoint
from magnetar.engine.checkpoint.run_folder import differing, flat_keys
from magnetar.engine.checkpoint.save_load import load_model, with_defaults
from magnetar.engine.config.schema import RunConfig
from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import ON_ONE_RANK
from magnetar.models.weights.files import WEIGHTS_FILE, has_weights, read_json
from magnetar.models.weights.load_save import CONFIG_FILE, load_tensors, load_weights

# What may differ from the model that the weights come from: noise, training's own losses and
# dropping, where experts lie. Everything else is the function that was learned.
_FREE_KEYS = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "drop_path",
    *(f"moe.{key}" for key in ON_ONE_RANK),
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


def read_model(source: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors of a run's newest checkpoint, or of a folder of weights.

    Raises:
        UserError: if it is neither, or a file of it is missing or damaged.
    """
    if not has_weights(source):
        model = load_model(_checkpoint_of(source))
        return model.config, model.state_dict()
    try:
        return load_weights(source)
    except ValueError as error:
        raise UserError(str(error)) from None


def _checkpoint_of(source: Path) -> Checkpoint:
    if source.is_dir() and not (source / "checkpoints").is_dir():
        raise UserError(
            f"{source} holds neither checkpoints/ nor {WEIGHTS_FILE}: name a run's folder, or a "
            "folder that magnetar convert has written"
        )
    return choose_checkpoint(source, None)


def starts_from_weights(config: RunConfig) -> bool:
    """Whether the run will read other weights: not once it has a checkpoint of its own."""
    begun = complete_checkpoints(Path(config.training.run_dir))
    return config.training.init_from is not None and not begun


def require_starting_weights(config: RunConfig, fingerprint: str | None = None) -> None:
    """Refuse weights of another model, or of another vocabulary.

    Args:
        config: the run's.
        fingerprint: sha256 of the vocabulary of its data; None: it is not compared. Weights that
            come with no run, such as imported ones, do not know theirs.

    Raises:
        UserError: naming each key that differs, or what is missing.
    """
    if not starts_from_weights(config):
        return
    assert config.training.init_from is not None
    source = Path(config.training.init_from)
    if has_weights(source):
        try:
            about = read_json(source / CONFIG_FILE)
            saved = about["model"]
            trained_with = about.get(RUN_KEY, {}).get("tokenizer_fingerprint")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{source / CONFIG_FILE} does not describe a model ({error}): convert it again"
            ) from error
    else:
        manifest = _checkpoint_of(source).manifest
        saved = manifest["config"]["magnetar"]["model"]
        trained_with = manifest["tokenizer_fingerprint"]
    there = dict(flat_keys(with_defaults(saved)))
    here = dict(flat_keys(config.model.model_dump(mode="json")))
    different = [
        f"magnetar.model.{key}: {value} there, {own} here"
        for key, value, own in differing(there, here, _FREE_KEYS)
    ]
    if different:
        listed = "\n  ".join(different)
        raise UserError(
            f"magnetar.training.init_from={source} holds the weights of another model:\n  "
            f"{listed}\nuse those keys, or other weights"
        )
    if fingerprint and trained_with and fingerprint != trained_with:
        raise UserError(
            f"magnetar.training.init_from={source} holds weights of another vocabulary (sha256 "
            f"{trained_with[:12]}) than that of magnetar.data.path={config.data.path} "
            f"({fingerprint[:12]}), so that each id is another piece: prepare the data with the "
            "vocabulary of those weights (--tokenizer), or use other weights"
        )


def load_starting_weights(model: nn.Module, config: RunConfig) -> None:
    """Give a model the weights of `training.init_from`, on every rank its own experts.

    Raises:
        UserError: see `read_model`.
    """
    assert config.training.init_from is not None
    _, tensors = read_model(Path(config.training.init_from))
    load_tensors(model, tensors)
