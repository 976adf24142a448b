"""What is in a checkpoint, and how it becomes something else.

magnetar convert inspect runs/lm
magnetar convert reshard runs/lm --out runs/lm_8 --world-size 8 --ep-size 4
magnetar convert average runs/lm --last 3 --out averaged/lm
magnetar convert export runs/lm --out exported/lm
magnetar convert import exported/lm --out runs/lm_again
magnetar convert upcycle runs/lm --out upcycled/lm --num-experts 8
magnetar convert densify runs/moe --out dense/lm --mean
magnetar convert shrink runs/lm --out small/lm --layers 0,2,4
magnetar convert import-torchscale decoder.pt --config decoder.json --out imported/lm
magnetar convert import-torchscale checkpoint_last-shared.pt --out imported/moe
magnetar convert fold-admin runs/admin --out folded/admin
"""

import argparse
import importlib
import inspect
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from magnetar.data.errors import UserError
from magnetar.launchers.terminal.command_line import CommandParser, option_of
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors

Parser = argparse.ArgumentParser
Derive = Callable[[argparse.Namespace], None]
Function = str | Callable[..., Iterable[str]]
COMMANDS: dict[str, tuple[Function, str, Callable[[Parser], Derive | None]]] = {}


def _command(name: str, function: Function, about: str) -> Callable:
    """Enter a command into COMMANDS.

    Args:
        name: what is typed.
        function: what returns the lines to print, or its name in magnetar.convert. It gets the
            options that have the names of its parameters.
        about: what the overview says.
    """

    def enter(add_arguments: Callable[[Parser], Derive | None]) -> Callable:
        """The decorated function adds the arguments, and may return what derives options."""
        COMMANDS[name] = (function, about, add_arguments)
        return add_arguments

    return enter


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="magnetar convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, about, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=add_arguments.__doc__)
        command.formatter_class = argparse.HelpFormatter
        command.set_defaults(derive=add_arguments(command))
    return parser.parse_args(arguments)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say what came out."""
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, _stop)
    quiet_deepspeed()
    if options.derive is not None:
        options.derive(options)
    if "shard_size" in options:
        from magnetar.convert.folders import parse_size

        options.shard_bytes = parse_size(options.shard_size)
    function = COMMANDS[options.command][0]
    if isinstance(function, str):
        module, _, name = function.rpartition(".")
        function = getattr(importlib.import_module(f"magnetar.convert.{module}"), name)
    names = inspect.signature(function).parameters
    for line in function(**{name: getattr(options, name) for name in names}):
        print(line)


def _stop(number: int, _frame: object) -> NoReturn:
    """End in order, so that what is half written is removed."""
    raise SystemExit(128 + number)


def _add_source(command: Parser, what: str = "") -> None:
    what = what or "a run's folder (its newest checkpoint), a checkpoint's, or a folder of weights"
    command.add_argument("path", type=Path, metavar="source", help=what)


def _add_out(command: Parser, what: str = "folder", has_shards: bool = False) -> None:
    metavar, help_text = ("DIR" if what == "folder" else "RUN"), f"the {what} to make"
    command.add_argument("--out", type=Path, required=True, metavar=metavar, help=help_text)
    if has_shards:
        command.add_argument(
            "--shard-size",
            default="5GB",
            metavar="SIZE",
            help="largest size of a file of tensors, such as 500MB; one tensor that is larger has "
            "a file of its own (%(default)s)",
        )


def inspected(path: Path, tensors: bool, as_json: bool) -> list[str]:
    """Print what is there, in colours on a terminal; then refuse damage."""
    from rich.console import Console
    from rich.text import Text

    from magnetar.convert.inspect import inspect, require_undamaged, shown

    contents = inspect(path)
    if as_json:
        print(json.dumps(contents.to_dict(tensors), indent=1))
    else:
        console = Console(highlight=False)
        for part in shown(contents, tensors):
            console.print(part, soft_wrap=isinstance(part, Text))
    require_undamaged(contents)
    return []


def import_torchscale(paths: list[Path], out: Path, config: Path | None, trust: bool) -> list[str]:
    """Import, and say what came in."""
    from magnetar.convert.torchscale import convert

    return convert.report(convert.import_torchscale(paths, out, config, trust), out)


@_command("inspect", inspected, "what is in a checkpoint, and whether it is whole")
def _inspect(command: Parser) -> None:
    """Read every file, compare the hashes, and show what is there.

    Exit status 2 if a file is damaged.
    """
    _add_source(command)
    command.add_argument("--tensors", action="store_true", help="list every tensor")
    command.add_argument(
        "--json", dest="as_json", action="store_true", help="print the same as JSON"
    )


@_command("reshard", "reshard.reshard", "a checkpoint cut for other ranks")
def _reshard(command: Parser) -> Derive:
    """Write a run's folder whose checkpoint is cut for other ranks.

    Each rank's files hold its experts and its share of the rest. magnetar train goes on from it. A
    layout that cannot hold the model is refused, with the nearest that can.
    """
    add = command.add_argument
    _add_source(command, "a run's folder (its newest checkpoint), or a checkpoint's")
    _add_out(command, "run's folder")
    add("--world-size", type=int, required=True, metavar="N", help="ranks")
    add("--ep-size", type=int, default=1, metavar="N", help="magnetar.model.moe.ep_size")
    add(
        "--zero-stage",
        dest="stage",
        type=int,
        default=0,
        metavar="N",
        help="zero_optimization.stage",
    )
    add(
        "--gpu-memory", type=float, metavar="GIB", help="refuse what a GPU of this size cannot hold"
    )

    def derive(options: argparse.Namespace) -> None:
        from magnetar.engine.config.schema import Layout

        for name in ("world_size", "ep_size", "gpu_memory"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise UserError(f"{option_of(name)} {value} must be more than 0")
        if options.gpu_memory == math.inf:
            raise UserError("--gpu-memory inf holds everything: give a GPU's GiB, or leave it out")
        options.layout = Layout(options.world_size, options.ep_size, options.stage)

    return derive


@_command("average", "average.average", "the mean of several checkpoints' weights")
def _average(command: Parser) -> None:
    """Write the mean of the weights of several checkpoints of one model.

    The folder is one that magnetar.models.weights.load_save.load_model and magnetar generate load
    and training starts from (magnetar.training.init_from).
    """
    what = "runs (the newest checkpoint of each), checkpoints, or folders of weights"
    command.add_argument("paths", nargs="+", type=Path, metavar="sources", help=what)
    what = "the N newest checkpoints of one run"
    command.add_argument("--last", type=int, metavar="N", help=what)
    _add_out(command, has_shards=True)


@_command("export", "export.export", "a run's weights as plain files")
def _export(command: Parser) -> None:
    """Write a run's weights, its tokenizer and its config as a folder.

    magnetar.models.weights.load_save.load_model loads it without DeepSpeed, magnetar generate
    continues texts with it, and `import` turns it into a run again.
    """
    add = command.add_argument
    _add_source(command)
    add("--checkpoint", metavar="NAME", help="such as step_00000400 (default: the newest)")
    what = "the vocabulary or its folder, if it is no longer where the run read it"
    add("--tokenizer", type=Path, metavar="PATH", help=what)
    what = "float32 is what was saved, to the last bit (%(default)s)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=what)
    _add_out(command, has_shards=True)


@_command("import", "import_weights.import_weights", "an exported folder as a run again")
def _import(command: Parser) -> None:
    """Write a run's folder with one checkpoint that holds the weights of an exported folder.

    Training goes on from it, with new moments of Adam.
    """
    command.add_argument("path", type=Path, metavar="folder", help="what export has written")
    _add_out(command, "run's folder")


@_command("upcycle", "upcycle.upcycle", "a dense model as a MoE model with the same function")
def _upcycle(command: Parser) -> Derive:
    """Copy the feed-forward networks of a dense model into experts, and draw routers.

    Training goes on with training.init_from.
    """
    add = command.add_argument
    _add_source(command)
    add("--num-experts", type=int, required=True, metavar="E", help="experts in a MoE layer")
    add("--every", type=int, default=2, metavar="N", help="every N-th layer (%(default)s)")
    add("--top-k", type=int, default=2, metavar="K", help="experts a token (%(default)s)")
    add("--router", choices=("xmoe", "linear"), default="xmoe", help="(%(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="seed of the routers (%(default)s)")
    _add_out(command, has_shards=True)
    keys = ("num_experts", "every", "top_k", "router")
    return lambda options: setattr(options, "moe", {key: getattr(options, key) for key in keys})


@_command("densify", "densify.densify", "a MoE model as a dense one")
def _densify(command: Parser) -> None:
    """Make each MoE layer a dense feed-forward network: one of its experts, or their mean.

    The function changes.
    """
    _add_source(command)
    chosen = command.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--expert", type=int, metavar="I", help="index of the one that remains")
    chosen.add_argument("--mean", action="store_true", help="the mean of all experts")
    _add_out(command, has_shards=True)


@_command("shrink", "shrink.shrink", "some layers of a model as a shallower one")
def _shrink(command: Parser) -> Derive:
    """Copy the layers that are named, counted from 0, into a shallower model, to be fine-tuned.

    The function changes; DeepNorm's residual scale is that of the new depth.
    """
    _add_source(command)
    whose = {
        "layers": "layers of a decoder or an encoder",
        "encoder_layers": "layers of an encoder-decoder's encoder (default: all)",
        "decoder_layers": "layers of an encoder-decoder's decoder (default: all)",
    }
    for name, text in whose.items():
        command.add_argument(option_of(name), metavar="0,2,4", help=text)
    _add_out(command, has_shards=True)

    def derive(options: argparse.Namespace) -> None:
        options.layers = {option_of(name): getattr(options, name) for name in whose}

    return derive


@_command(
    "import-torchscale",
    import_torchscale,
    "a model of TorchScale 0.3.0, with fairseq or without",
)
def _import_torchscale(command: Parser) -> None:
    """Write a TorchScale model, dense or sparse, as a folder with the same logits.

    magnetar.models.weights.load_save.load_model loads it.
    """
    add = command.add_argument
    add(
        "paths",
        nargs="+",
        type=Path,
        metavar="checkpoint",
        help="a state dict (.pt, .safetensors), fairseq's checkpoint, or NAME-shared.pt, beside "
        "which the files NAME-rank-N.pt are found",
    )
    _add_out(command)
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a JSON with the arguments of TorchScale's config class, or with all of vars(config); "
        "needed if the checkpoint holds only tensors",
    )
    add("--trust", action="store_true", help="let the file run code: only for files of your own")


@_command("fold-admin", "fold_admin.fold_admin", "a trained Admin model as a plain Post-LN one")
def _fold_admin(command: Parser) -> None:
    """Write an Admin model as a Post-LN model with the same function.

    magnetar.models.weights.load_save.load_model loads the folder.
    """
    what = "a run's folder (its newest checkpoint), or a folder of weights"
    command.add_argument("source", type=Path, help=what)
    _add_out(command)


if __name__ == "__main__":
    sys.exit(main())
