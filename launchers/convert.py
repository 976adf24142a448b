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
magnetar convert from-hf downloaded/Qwen3-0.6B --out imported/qwen3
magnetar convert fold-admin runs/admin --out folded/admin
magnetar convert to-hf runs/lm --out hf/lm
"""

import argparse
import importlib
import inspect
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magnetar.data.errors import UserError
from magnetar.launchers.terminal.command_line import COUNT, CommandParser, add_option, option_of
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors

if TYPE_CHECKING:
    from magnetar.engine.config.schema import Layout

Function = str | Callable[..., Iterable[str]]
AddArguments = Callable[[argparse.ArgumentParser], None]
COMMANDS: dict[str, tuple[Function, str, AddArguments]] = {}


def _command(name: str, function: Function, about: str) -> Callable[[AddArguments], None]:
    """Enter a command into COMMANDS; the decorated function adds its arguments.

    Args:
        name: what is typed.
        function: what returns the lines to print, or its name in magnetar.convert. It gets the
            options that have the names of its parameters, and what `_MADE` makes of others.
        about: what the overview says.
    """
    return lambda add_arguments: COMMANDS.update({name: (function, about, add_arguments)})


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say what came out."""
    parser = CommandParser(prog="magnetar convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, about, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=add_arguments.__doc__)
        command.formatter_class = argparse.HelpFormatter
        add_arguments(command)
    options = parser.parse_args(arguments)
    # End in order, so that what is half written is removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    quiet_deepspeed()
    function = COMMANDS[options.command][0]
    if isinstance(function, str):
        module, _, name = function.rpartition(".")
        function = getattr(importlib.import_module(f"magnetar.convert.{module}"), name)
    values = {
        name: _MADE[name](options) if name in _MADE else getattr(options, name)
        for name in inspect.signature(function).parameters
    }
    for line in function(**values):
        print(line)


@user_errors()
def branch(arguments: Sequence[str] | None = None) -> None:
    """Write the folder of a run that starts from a step of another run, with a decaying rate.

    magnetar branch runs/lm --at 40000 --decay 5000 --out runs/lm_cooled
    """
    parser = CommandParser(prog="magnetar branch", description=inspect.getdoc(branch))
    about = 'a run\'s folder, with schedule "constant" or "wsd"'
    add_option(parser, "run", about, Path)
    add = partial(add_option, parser, kind=int, required=True, rule=COUNT)
    add("--at STEP", "the step of one of its checkpoints")
    add("--decay N", "steps in which the rate falls; they end the new run")
    _add_out(parser, "RUN", shards=False)
    options = parser.parse_args(arguments)
    quiet_deepspeed()
    from magnetar.convert.run_folders import branch as write_branch

    for line in write_branch(options.run, options.out, options.at, options.decay):
        print(line)


def _layout(options: argparse.Namespace) -> "Layout":
    from magnetar.engine.config.schema import Layout

    if options.gpu_memory == math.inf:
        raise UserError("--gpu-memory inf holds everything: give a GPU's GiB, or leave it out")
    return Layout(options.world_size, options.ep_size, options.stage)


def _shard_bytes(options: argparse.Namespace) -> int:
    from magnetar.convert.folders import parse_size

    return parse_size(options.shard_size)


_LAYERS = {
    "layers": "layers of a decoder or an encoder",
    "encoder_layers": "layers of an encoder-decoder's encoder (default: all)",
    "decoder_layers": "layers of an encoder-decoder's decoder (default: all)",
}
# Parameters of the functions that are no option.
_MADE: dict[str, Callable[[argparse.Namespace], Any]] = {
    "layout": _layout,
    "shard_bytes": _shard_bytes,
    "moe": lambda options: {
        key: getattr(options, key) for key in ("num_experts", "every", "top_k", "router")
    },
    "layers": lambda options: {option_of(name): getattr(options, name) for name in _LAYERS},
}
_A_RUN = "a run's folder (its newest checkpoint), "


def _add_source(command: argparse.ArgumentParser, about: str = "") -> None:
    about = about or f"{_A_RUN}a checkpoint's, or a folder of weights"
    add_option(command, "path", about, Path, metavar="source")


def _add_out(command: argparse.ArgumentParser, metavar: str = "DIR", shards: bool = True) -> None:
    what = "folder" if metavar == "DIR" else "run's folder"
    add_option(command, f"--out {metavar}", f"the {what} to make", Path, required=True)
    if shards:
        add_option(
            command,
            "--shard-size SIZE",
            "largest size of a file of tensors, such as 500MB; one tensor that is larger has a "
            "file of its own (%(default)s)",
            default="5GB",
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


@_command("inspect", inspected, "what is in a checkpoint, and whether it is whole")
def _inspect(command: argparse.ArgumentParser) -> None:
    """Read every file, compare the hashes, and show what is there.

    Exit status 2 if a file is damaged.
    """
    _add_source(command)
    add_option(command, "--tensors", "list every tensor")
    add_option(command, "--json", "print the same as JSON", dest="as_json")


@_command("reshard", "run_folders.reshard", "a checkpoint cut for other ranks")
def _reshard(command: argparse.ArgumentParser) -> None:
    """Write a run's folder whose checkpoint is cut for other ranks.

    Each rank's files hold its experts and its share of the rest. magnetar train goes on from it. A
    layout that cannot hold the model is refused, with the nearest that can.
    """
    _add_source(command, f"{_A_RUN}or a checkpoint's")
    _add_out(command, "RUN", shards=False)
    add = partial(add_option, command)
    more_than_0 = (lambda value: value > 0, "more than 0")
    add("--world-size N", "ranks", int, required=True, rule=more_than_0)
    add("--ep-size N", "magnetar.model.moe.ep_size", int, 1, rule=more_than_0)
    add("--zero-stage N", "zero_optimization.stage", int, 0, dest="stage")
    what = "refuse what a GPU of this size cannot hold"
    add("--gpu-memory GIB", what, float, rule=more_than_0)


@_command("average", "average.average", "the mean of several checkpoints' weights")
def _average(command: argparse.ArgumentParser) -> None:
    """Write the mean of the weights of several checkpoints of one model.

    The folder is one that magnetar.models.weights.load_save.load_model and magnetar generate load
    and training starts from (magnetar.training.init_from).
    """
    what = "runs (the newest checkpoint of each), checkpoints, or folders of weights"
    add_option(command, "paths", what, Path, nargs="+", metavar="sources")
    add_option(command, "--last N", "the N newest checkpoints of one run", int)
    _add_out(command)


@_command("export", "export.export", "a run's weights as plain files")
def _export(command: argparse.ArgumentParser) -> None:
    """Write a run's weights, its tokenizer and its config as a folder.

    magnetar.models.weights.load_save.load_model loads it without DeepSpeed, magnetar generate
    continues texts with it, and `import` turns it into a run again.
    """
    _add_source(command)
    add = partial(add_option, command)
    add("--checkpoint NAME", "such as step_00000400 (default: the newest)")
    add("--ema", "the average of the weights (training.ema_decay)")
    what = "the vocabulary or its folder, if it is no longer where the run read it"
    add("--tokenizer PATH", what, Path)
    what = "float32 is what was saved, to the last bit (%(default)s)"
    add("--dtype", what, str, "float32", choices=("float32", "bfloat16", "float16"))
    _add_out(command)


@_command("import", "run_folders.import_weights", "an exported folder as a run again")
def _import(command: argparse.ArgumentParser) -> None:
    """Write a run's folder with one checkpoint that holds the weights of an exported folder.

    Training goes on from it, with new moments of Adam.
    """
    add_option(command, "path", "what export has written", Path, metavar="folder")
    _add_out(command, "RUN", shards=False)


@_command("upcycle", "experts.upcycle", "a dense model as a MoE model with the same function")
def _upcycle(command: argparse.ArgumentParser) -> None:
    """Copy the feed-forward networks of a dense model into experts, and draw routers.

    Training goes on with training.init_from.
    """
    _add_source(command)
    add = partial(add_option, command)
    add("--num-experts E", "experts in a MoE layer", int, required=True)
    add("--every N", "every N-th layer (%(default)s)", int, 2)
    add("--top-k K", "experts a token (%(default)s)", int, 2)
    add("--router", "(%(default)s)", str, "xmoe", choices=("xmoe", "linear"))
    add("--seed N", "seed of the routers (%(default)s)", int, 1)
    _add_out(command)


@_command("densify", "experts.densify", "a MoE model as a dense one")
def _densify(command: argparse.ArgumentParser) -> None:
    """Make each MoE layer a dense feed-forward network: one of its experts, or their mean.

    The function changes.
    """
    _add_source(command)
    chosen = command.add_mutually_exclusive_group(required=True)
    add_option(chosen, "--expert I", "index of the one that remains", int)
    add_option(chosen, "--mean", "the mean of all experts")
    _add_out(command)


@_command("shrink", "shrink.shrink", "some layers of a model as a shallower one")
def _shrink(command: argparse.ArgumentParser) -> None:
    """Copy the layers that are named, counted from 0, into a shallower model, to be fine-tuned.

    The function changes; DeepNorm's residual scale is that of the new depth.
    """
    _add_source(command)
    for name, text in _LAYERS.items():
        add_option(command, f"{option_of(name)} 0,2,4", text)
    _add_out(command)


@_command(
    "import-torchscale",
    "torchscale.convert.import_torchscale",
    "a model of TorchScale 0.3.0, with fairseq or without",
)
def _import_torchscale(command: argparse.ArgumentParser) -> None:
    """Write a TorchScale model, dense or sparse, as a folder with the same logits.

    magnetar.models.weights.load_save.load_model loads it.
    """
    what = "a state dict (.pt, .safetensors), fairseq's checkpoint, or NAME-shared.pt, beside which"
    what += " the files NAME-rank-N.pt are found"
    add_option(command, "paths", what, Path, nargs="+", metavar="checkpoint")
    _add_out(command, shards=False)
    what = "a JSON with the arguments of TorchScale's config class, or with all of vars(config); "
    what += "needed if the checkpoint holds only tensors"
    add_option(command, "--config FILE", what, Path)
    add_option(command, "--trust", "let the file run code: only for files of your own")


@_command("from-hf", "huggingface.convert.from_hf", "a decoder of the transformers package")
def _from_hf(command: argparse.ArgumentParser) -> None:
    """Write a Llama, Qwen3, Qwen3-MoE, OLMoE, Mixtral, GPT-2 or OPT model with the same logits.

    magnetar.models.weights.load_save.load_model and magnetar generate load the folder, and training
    starts from it (magnetar.training.init_from).
    """
    add_option(command, "path", "what save_pretrained has written", Path, metavar="folder")
    _add_out(command)


@_command("fold-admin", "fold_admin.fold_admin", "a trained Admin model as a plain Post-LN one")
def _fold_admin(command: argparse.ArgumentParser) -> None:
    """Write an Admin model as a Post-LN model with the same function.

    magnetar.models.weights.load_save.load_model loads the folder.
    """
    add_option(command, "source", f"{_A_RUN}or a folder of weights", Path)
    _add_out(command, shards=False)


@_command("to-hf", "huggingface.export.to_hf", "a model as a folder for transformers")
def _to_hf(command: argparse.ArgumentParser) -> None:
    """Write a model as a folder that transformers opens with trust_remote_code.

    The folder holds the weights, the code of the model in one file, and the tokenizer.
    """
    _add_source(command)
    add = partial(add_option, command)
    add("--checkpoint NAME", "such as step_00000400 (default: the newest)")
    what = "the vocabulary or its folder, if it is no longer where the run read it"
    add("--tokenizer PATH", what, Path)
    add("--dtype", "%(default)s", str, "float32", choices=("float32", "bfloat16", "float16"))
    _add_out(command)


if __name__ == "__main__":
    main()
