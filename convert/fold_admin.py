"""A trained Admin model as a Post-LN one with the same function."""

import json
from pathlib import Path

from magnetar.convert.folders import require_new, write_folder
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.models import admin
from magnetar.models.weights.files import WEIGHTS_FILE, in_memory
from magnetar.models.weights.load_save import CONFIG_FILE, tensor_shapes


def fold_admin(source: Path, out: Path) -> list[str]:
    """A report in lines, after folding the Admin model of a run or of a folder of weights."""
    require_new(out, source)
    saved = open_run(source)
    config = saved.config
    try:
        folded_config, folded = admin.fold_admin(config, saved.state_dict())
    except ValueError as error:
        raise UserError(str(error)) from None
    changed = {
        key: value
        for key, value in folded_config.model_dump().items()
        if value != getattr(config, key)
    }
    keys = ", ".join(f"{key}={json.dumps(value)}" for key, value in changed.items() if key != "moe")
    rows = [
        ("folded", str(source)),
        ("changed", keys),
        ("wrote", f"{out} ({CONFIG_FILE}, {WEIGHTS_FILE})"),
    ]
    untied = {name: folded[name] for name in tensor_shapes(folded_config)}
    return write_folder(out, folded_config, in_memory(untied), rows)
