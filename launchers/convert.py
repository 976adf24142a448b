"""Makes a Magnetar folder of weights from the weights of other programs, or from a trained run.

python -m launchers.convert import-torchscale decoder.pt --config decoder.json --out imported/lm
python -m launchers.convert import-torchscale checkpoint_last-shared.pt --out imported/moe
python -m launchers.convert fold-admin runs/admin --out folded/admin
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError
from launchers.quiet import quiet_deepspeed
from launchers.user_errors import user_errors

if TYPE_CHECKING:
    from convert.import_torchscale import Imported


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "import-torchscale",
        help="a model of TorchScale 0.3.0, with fairseq or without",
        description="Write a TorchScale model, dense or sparse, as a folder that "
        "models.weights.load_model loads. The model has the same logits.",
    )
    add = command.add_argument
    add(
        "checkpoint",
        nargs="+",
        type=Path,
        help="a state dict (.pt, .safetensors), fairseq's checkpoint, or NAME-shared.pt, beside "
        "which the files NAME-rank-N.pt are found",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a JSON with the arguments of TorchScale's config class, or with all of vars(config); "
        "needed where the checkpoint holds tensors alone",
    )
    add("--trust", action="store_true", help="let the file run code: only for files of your own")
    command = commands.add_parser(
        "fold-admin",
        help="a trained Admin model as a plain Post-LN one",
        description="Write an Admin model as a Post-LN model with the same function, in a folder "
        "that models.weights.load_model loads.",
    )
    add = command.add_argument
    add("source", type=Path, help="a run's folder (its newest checkpoint), or a folder of weights")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    return parser.parse_args(arguments)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say what came out."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    if options.command == "fold-admin":
        print("\n".join(fold_admin(options.source, options.out)))
        return
    from convert.import_torchscale import import_torchscale

    imported = import_torchscale(options.checkpoint, options.out, options.config, options.trust)
    print("\n".join(report(imported, options.out)))


def fold_admin(source: Path, out: Path) -> list[str]:
    """Fold the Admin model of a run or of a folder of weights; the lines that say so."""
    from engine.starting_weights import read_model
    from models import admin
    from models.weights import CONFIG_FILE, WEIGHTS_FILE, save_weights

    config, tensors = read_model(source)
    try:
        folded_config, folded = admin.fold_admin(config, tensors)
        save_weights(out, folded_config, folded)
    except ValueError as error:
        raise UserError(str(error)) from None
    changed = {
        key: value
        for key, value in folded_config.model_dump().items()
        if value != getattr(config, key)
    }
    keys = ", ".join(f"{key}={json.dumps(value)}" for key, value in changed.items() if key != "moe")
    return [
        f"folded   {source}",
        f"changed  {keys}",
        f"wrote    {out} ({CONFIG_FILE}, {WEIGHTS_FILE})",
        "",
        *_snippet(out, folded_config.architecture),
    ]


def report(imported: "Imported", out: Path) -> list[str]:
    """The lines that say what was imported, and how to load it."""
    config = imported.config
    rows = [("was", imported.source), ("is", f"{config.architecture}, norm {config.norm}")]
    rows.append(("parameters", f"{imported.num_parameters:,}"))
    if config.moe is not None:
        num_layers = sum(
            config.is_moe_layer(index)
            for depth in (config.encoder_depth, config.decoder_depth)
            for index in range(depth)
        )
        rows.append(("experts", f"{config.moe.num_experts} in each of {num_layers} MoE layers"))
    rows += [("note", note) for note in imported.notes]
    rows.append(("wrote", str(out)))
    width = max(len(name) for name, _ in rows)
    return [
        *(f"{name:<{width}}  {text}" for name, text in rows),
        "",
        *_snippet(out, config.architecture),
    ]


def _snippet(out: Path, architecture: str) -> list[str]:
    """Python that loads the folder."""
    tokens = "source, target" if architecture == "encoder_decoder" else "tokens"
    return [
        "from models.weights import load_model",
        f"model = load_model({str(out)!r})",
        f"logits = model({tokens}).logits  # tokens: (batch, length) int64",
    ]


if __name__ == "__main__":
    sys.exit(main())
