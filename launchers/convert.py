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
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from magnetar.data.errors import UserError
from magnetar.launchers.user_errors import quiet_deepspeed, user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `call` is what the command does with it."""
    parser = argparse.ArgumentParser(prog="magnetar convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (
        _inspect,
        _reshard,
        _average,
        _export,
        _import,
        _upcycle,
        _densify,
        _shrink,
        _import_torchscale,
        _fold_admin,
    ):
        add_command(commands)
    return parser.parse_args(arguments)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say what came out."""
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, _stop)
    quiet_deepspeed()
    options.call(options)


def _stop(number: int, _frame: object) -> NoReturn:
    """End in order, so that what is half written is removed."""
    raise SystemExit(128 + number)


def _inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether it is whole",
        description="Read every file, compare the hashes, and show what is there. Exit status 2 "
        "if a file is damaged.",
    )
    add = command.add_argument
    add(
        "source",
        type=Path,
        help="a run's folder (its newest checkpoint), a checkpoint's, or a folder of weights",
    )
    add("--tensors", action="store_true", help="list every tensor")
    add("--json", action="store_true", help="print the same as JSON")

    def call(options: argparse.Namespace) -> None:
        from rich.console import Console
        from rich.text import Text

        from magnetar.convert.inspect import inspect, require_undamaged, shown

        contents = inspect(options.source)
        if options.json:
            print(json.dumps(contents.to_dict(options.tensors), indent=1))
        else:
            console = Console(highlight=False)
            for part in shown(contents, options.tensors):
                console.print(part, soft_wrap=isinstance(part, Text))
        require_undamaged(contents)

    command.set_defaults(call=call)


def _reshard(commands: Any) -> None:
    command = commands.add_parser(
        "reshard",
        help="a checkpoint cut for other ranks",
        description="Write a run's folder whose checkpoint is cut for other ranks: each rank's "
        "files hold its experts and its share of the rest. magnetar train goes on from it. A "
        "layout that cannot hold the model is refused, with the nearest that can.",
    )
    add = command.add_argument
    add("source", type=Path, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--out", type=Path, required=True, metavar="RUN", help="the run's folder to make")
    add("--world-size", type=int, required=True, metavar="N", help="ranks")
    add("--ep-size", type=int, default=1, metavar="N", help="magnetar.model.moe.ep_size")
    add("--zero-stage", type=int, default=0, metavar="N", help="zero_optimization.stage")
    add(
        "--gpu-memory", type=float, metavar="GIB", help="refuse what a GPU of this size cannot hold"
    )

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.reshard import reshard
        from magnetar.engine.memory_planner import Layout

        for name in ("world_size", "ep_size", "gpu_memory"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be more than 0")
        if options.gpu_memory == math.inf:
            raise UserError("--gpu-memory inf holds everything: give a GPU's GiB, or leave it out")
        layout = Layout(options.world_size, options.ep_size, options.zero_stage)
        print("\n".join(reshard(options.source, options.out, layout, options.gpu_memory)))

    command.set_defaults(call=call)


def _average(commands: Any) -> None:
    command = commands.add_parser(
        "average",
        help="the mean of several checkpoints' weights",
        description="Write the mean of the weights of several checkpoints of one model, in a "
        "folder that models.weights.load_save.load_model and magnetar generate load and training "
        "starts from (magnetar.training.init_from).",
    )
    command.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="runs (of each its newest checkpoint), checkpoints, or folders of weights",
    )
    command.add_argument(
        "--last", type=int, metavar="N", help="the N newest checkpoints of one run"
    )
    _add_out(command)

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.average import average
        from magnetar.convert.folders import parse_size

        shard_bytes = parse_size(options.shard_size)
        print("\n".join(average(options.sources, options.out, options.last, shard_bytes)))

    command.set_defaults(call=call)


def _export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a run's weights as plain files",
        description="Write a run's weights, its tokenizer and its config as a folder that "
        "models.weights.load_save.load_model loads without DeepSpeed, magnetar generate continues "
        "texts with, and `import` turns into a run again.",
    )
    _add_source(command)
    command.add_argument(
        "--checkpoint", metavar="NAME", help="such as step_00000400 (default: the newest)"
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the vocabulary or its folder, if it is no longer where the run read it",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="float32 is what was saved, to the last bit (%(default)s)",
    )
    _add_out(command)

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.export import export
        from magnetar.convert.folders import parse_size

        lines = export(
            options.source,
            options.out,
            checkpoint=options.checkpoint,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
            shard_bytes=parse_size(options.shard_size),
        )
        print("\n".join(lines))

    command.set_defaults(call=call)


def _import(commands: Any) -> None:
    command = commands.add_parser(
        "import",
        help="an exported folder as a run again",
        description="Write a run's folder with one checkpoint that holds the weights of an "
        "exported folder; training goes on from it, with new moments of Adam.",
    )
    add = command.add_argument
    add("folder", type=Path, help="what export has written")
    add("--out", type=Path, required=True, metavar="RUN", help="the run's folder to make")

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.import_weights import import_weights

        print("\n".join(import_weights(options.folder, options.out)))

    command.set_defaults(call=call)


def _upcycle(commands: Any) -> None:
    command = commands.add_parser(
        "upcycle",
        help="a dense model as a MoE model with the same function",
        description="Copy the feed-forward networks of a dense model into experts, and draw "
        "routers. Training goes on with training.init_from.",
    )
    _add_source(command)
    add = command.add_argument
    add("--num-experts", type=int, required=True, metavar="E", help="experts in a MoE layer")
    add("--every", type=int, default=2, metavar="N", help="every N-th layer (%(default)s)")
    add("--top-k", type=int, default=2, metavar="K", help="experts a token (%(default)s)")
    add("--router", choices=("xmoe", "linear"), default="xmoe", help="(%(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of the routers (%(default)s)")
    _add_out(command)

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.folders import parse_size
        from magnetar.convert.upcycle import upcycle

        keys = ("num_experts", "every", "top_k", "router")
        moe = {key: getattr(options, key) for key in keys}
        shard_bytes = parse_size(options.shard_size)
        print("\n".join(upcycle(options.source, options.out, moe, options.seed, shard_bytes)))

    command.set_defaults(call=call)


def _densify(commands: Any) -> None:
    command = commands.add_parser(
        "densify",
        help="a MoE model as a dense one",
        description="Make each MoE layer a dense feed-forward network: one of its experts, or "
        "their mean. The function changes.",
    )
    _add_source(command)
    chosen = command.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--expert", type=int, metavar="I", help="index of the one that remains")
    chosen.add_argument("--mean", action="store_true", help="the mean of all experts")
    _add_out(command)

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.densify import densify
        from magnetar.convert.folders import parse_size

        shard_bytes = parse_size(options.shard_size)
        print("\n".join(densify(options.source, options.out, options.expert, shard_bytes)))

    command.set_defaults(call=call)


def _shrink(commands: Any) -> None:
    command = commands.add_parser(
        "shrink",
        help="some layers of a model as a shallower one",
        description="Copy the layers that are named, counted from 0, into a shallower model, to "
        "be fine-tuned. The function changes; DeepNorm's residual scale is that of the new depth.",
    )
    _add_source(command)
    options_of_stacks = ("--layers", "--encoder-layers", "--decoder-layers")
    whose = (
        "of a decoder or an encoder",
        "of an encoder-decoder's encoder (default: all)",
        "of an encoder-decoder's decoder (default: all)",
    )
    for option, text in zip(options_of_stacks, whose, strict=True):
        command.add_argument(option, metavar="0,2,4", help=text)
    _add_out(command)

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.folders import parse_size
        from magnetar.convert.shrink import shrink

        layers = {
            option: getattr(options, option.strip("-").replace("-", "_"))
            for option in options_of_stacks
        }
        shard_bytes = parse_size(options.shard_size)
        print("\n".join(shrink(options.source, options.out, layers, shard_bytes)))

    command.set_defaults(call=call)


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        type=Path,
        help="a run's folder (its newest checkpoint), a checkpoint's, or a folder of weights",
    )


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to make"
    )
    command.add_argument(
        "--shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a file of tensors at most, such as 500MB; one tensor that is larger has a file of "
        "its own (%(default)s)",
    )


def _import_torchscale(commands: Any) -> None:
    command = commands.add_parser(
        "import-torchscale",
        help="a model of TorchScale 0.3.0, with fairseq or without",
        description="Write a TorchScale model, dense or sparse, as a folder that "
        "models.weights.load_save.load_model loads. The model has the same logits.",
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

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.torchscale.convert import import_torchscale, report

        out = options.out
        imported = import_torchscale(options.checkpoint, out, options.config, options.trust)
        print("\n".join(report(imported, out)))

    command.set_defaults(call=call)


def _fold_admin(commands: Any) -> None:
    command = commands.add_parser(
        "fold-admin",
        help="a trained Admin model as a plain Post-LN one",
        description="Write an Admin model as a Post-LN model with the same function, in a folder "
        "that models.weights.load_save.load_model loads.",
    )
    add = command.add_argument
    add("source", type=Path, help="a run's folder (its newest checkpoint), or a folder of weights")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")

    def call(options: argparse.Namespace) -> None:
        from magnetar.convert.fold_admin import fold_admin

        print("\n".join(fold_admin(options.source, options.out)))

    command.set_defaults(call=call)


if __name__ == "__main__":
    sys.exit(main())
