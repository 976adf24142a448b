"""Start the deepspeed launcher, which starts a process for each rank.

magnetar train quickstart
magnetar train quickstart --num_gpus 4 --set magnetar.training.num_steps=500
magnetar train runs/my.json --hostfile hosts

Without a GPU the ranks are processes on the CPU: as many as the model's ep_size, or --num_gpus.
Options may also be written with hyphens: --num-gpus.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from magnetar.data.errors import UserError
from magnetar.engine.cluster.arguments import sealed
from magnetar.engine.cluster.environment import refuse_other_launchers
from magnetar.engine.cluster.hosts import (
    MOST_SLOTS,
    LaunchOptions,
    free_port,
    path_of_programs,
    read_hostfile,
    require_known,
    shell_words,
)
from magnetar.engine.config.schema import load_config
from magnetar.launchers.terminal.command_line import (
    CommandParser,
    add_config_options,
    add_option,
    take_config,
    whole_number,
)
from magnetar.launchers.terminal.user_errors import user_errors

# Options of DeepSpeed's launcher that we hand on as they are.
FLAGS = ("--no_ssh_check", "--save_pid", "--bind_cores_to_rank", "--no_local_rank")
VALUES = (
    *("--launcher", "--launcher_args", "--bind_core_list", "--venv_script", "--log_level"),
    "--enable_each_rank_log",
)
# Options of DeepSpeed's launcher that mean something to us, too.
_CHOOSING = ("include", "exclude", "num_nodes", "num_gpus")
_TAKEN = ("hostfile", *_CHOOSING, "master_addr", "master_port", "ssh_port", "node_rank")
_SPELT = (*(f"--{name}" for name in _TAKEN), "--num_accelerators", "--force_multi", "--no_ssh")
# What --launcher may be, and the program by which DeepSpeed finds it.
_BACKENDS = {
    "pdsh": "pdsh",
    "openmpi": "ompi_info",
    "mpich": "mpirun",
    "impi": "mpirun",
    "mvapich": "mpiname",
    "slurm": "sinfo",
}
_DEVICES = re.compile(r"([0-9]+(,[0-9]+)*)?")
_HOSTFILE = Path("/job/hostfile")  # the one that DeepSpeed reads if none is given


def add_launcher_options(parser: argparse.ArgumentParser, module: str) -> None:
    """The options of DeepSpeed's launcher that `train` and `supervise` both take."""
    add = partial(add_option, parser.add_argument_group("options of DeepSpeed's launcher"))
    add("-H --hostfile HOSTFILE", "the machines, a line `NAME slots=N` each", Path)
    add("-i --include INCLUDE", "hosts and slots to use, such as node-1@node-2:0,2", str, "")
    add("-e --exclude EXCLUDE", "hosts and slots to leave out, in the same syntax", str, "")
    ranks = partial(whole_number, least=1, most=MOST_SLOTS)
    add("--num_nodes N", "only the first N hosts", ranks)
    add("--num_gpus --num_accelerators N", "ranks on each host", ranks)
    port = partial(whole_number, least=1, most=2**16 - 1)
    add("--master_addr ADDRESS", "address of rank 0's machine (default: found)")
    add("--master_port PORT", "port of rank 0's machine (default: a free one)", port)
    add("--ssh_port PORT", "port that ssh connects to", port)
    add("--force_multi", "use ssh even for a single host")
    add("-q --quiet", "print only the launcher's errors")
    for name in FLAGS:
        add(name, argparse.SUPPRESS)
    for name in VALUES:
        add(f"{name} VALUE", argparse.SUPPRESS)
    add("--module MODULE", argparse.SUPPRESS, choices=[module])


def underscored(arguments: Sequence[str] | None) -> list[str]:
    """The arguments with `--num-gpus` written as `--num_gpus`: the launcher's own spelling."""
    spelt = {name.replace("_", "-"): name for name in (*_SPELT, *FLAGS, *VALUES)}
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        name, equals, value = word.partition("=")
        words.append(spelt.get(name, name) + equals + value)
    return words


def handed_on(options: argparse.Namespace) -> list[str]:
    """The launcher's arguments that are handed on as they are."""
    words = ["--quiet"] if options.quiet else []
    words += [name for name in FLAGS if getattr(options, name[2:])]
    values = {name: getattr(options, name[2:]) for name in VALUES}
    return words + [f"{name}={value}" for name, value in values.items() if value is not None]


def refuse_contradictions(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what the launcher would read in another way, or not at all.

    Options that choose the ranks in two ways end the program with status 2.

    Raises:
        UserError: --include, --exclude or --num_nodes do not fit the hostfile or the GPUs.
    """
    if options.include and options.exclude:
        parser.error("--include and --exclude contradict each other: use one of them")
    if (options.include or options.exclude) and (options.num_nodes or options.num_gpus):
        parser.error("--include and --exclude do not go with --num_nodes and --num_gpus")
    shell_words("--launcher_args", options.launcher_args or "")
    if (launcher := (options.launcher or "pdsh").lower()) not in _BACKENDS:
        raise UserError(f"--launcher {options.launcher} is unknown: use {', '.join(_BACKENDS)}")
    chosen = [name for name in _CHOOSING if getattr(options, name)]
    if chosen and launcher not in ("pdsh", "slurm"):
        raise UserError(
            f"--{chosen[0]} does not go with --launcher {launcher}, which takes all machines: "
            "leave it out, or use pdsh"
        )
    if options.hostfile is None and _HOSTFILE.is_file():
        options.hostfile = _HOSTFILE
    if options.hostfile is not None:
        hosts = read_hostfile(options.hostfile)
        require_known(hosts, options.include, options.exclude)
        if options.num_nodes and options.num_nodes > len(hosts):
            raise UserError(
                f"--num_nodes {options.num_nodes}: {options.hostfile} names {len(hosts)}: add "
                "lines to it, or ask for no more"
            )
    elif options.num_nodes and options.num_nodes > 1:
        raise UserError(f"--num_nodes {options.num_nodes} needs --hostfile, which names them")


def parse_arguments(arguments: Sequence[str] | None, command: str) -> argparse.Namespace:
    """The command line; `config` is the JSON's path."""
    parser = CommandParser(prog=f"magnetar {command}", description=__doc__, allow_abbrev=False)
    add_config_options(parser)
    add_launcher_options(parser, _module_of(command))
    add_option(parser, "--no_ssh", argparse.SUPPRESS)
    add_option(parser, "--node_rank N", argparse.SUPPRESS, partial(whole_number, least=0))
    options = parser.parse_args(underscored(arguments))
    options.config = take_config(parser, options)
    refuse_contradictions(parser, options)
    return options


def _module_of(command: str) -> str:
    return f"magnetar.launchers.{command.replace('-', '_')}"


def _num_gpus() -> int:
    """GPUs of this machine; 0 if DS_ACCELERATOR says that they are not to be used."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def _require_gpus(options: argparse.Namespace, num_gpus: int) -> None:
    """Refuse GPUs of this machine that are not there, or named as DeepSpeed cannot read them."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if options.include or options.exclude:
        if num_gpus == 0:
            raise UserError(
                "--include and --exclude choose GPUs, and this machine has none: use --num_gpus "
                "for a number of processes, or --hostfile"
            )
        require_known({"localhost": num_gpus}, options.include, options.exclude)
    elif num_gpus and options.num_gpus is None and not _DEVICES.fullmatch(devices):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={devices}: DeepSpeed's launcher reads numbers alone: use those "
            "of nvidia-smi, such as 0,1"
        )


def launcher_command(options: argparse.Namespace, command: str) -> tuple[list[str], dict[str, str]]:
    """The command line that starts DeepSpeed's launcher, and the variables that it adds.

    Raises:
        UserError: the JSON, the machines or the GPUs are wrong, as far as that is known before the
            ranks start.
    """
    words = [sys.executable, "-m", "deepspeed.launcher.runner"]
    config = load_config(options.config, options.set)
    if not options.no_ssh:
        refuse_other_launchers(f"magnetar {command}")
    variables: dict[str, str] = {}
    slots: dict[str, list[int]] = {}
    num_ranks, port = options.num_gpus, options.master_port
    if options.hostfile is None:
        num_gpus = _num_gpus()
        _require_gpus(options, num_gpus)
        if num_gpus == 0:
            variables["DS_ACCELERATOR"] = "cpu"
            # The fewest that the model can be spread over as its JSON says.
            num_ranks = num_ranks or (config.model.moe.ep_size if config.model.moe else 1)
        if not options.include and not options.exclude:
            load_config(options.config, options.set, num_ranks or num_gpus)
        port = port or free_port()
    else:
        names = ("hostfile", *_CHOOSING, "master_addr", "force_multi")
        given = {name: getattr(options, name) for name in names}
        run = LaunchOptions(**given, passed=tuple(handed_on(options)))
        slots, backend = run.slots(), _BACKENDS[(options.launcher or "pdsh").lower()]
        if run.is_remote(slots) and not options.no_ssh and shutil.which(backend) is None:
            raise UserError(
                f"--launcher {options.launcher or 'pdsh'} needs {backend} in PATH: install it, or "
                f"use another of {', '.join(_BACKENDS)}"
            )
        load_config(options.config, options.set, sum(map(len, slots.values())))
    num_hosts, node_rank = max(1, len(slots)), options.node_rank
    if options.no_ssh and (node_rank is None or node_rank >= num_hosts):
        raise UserError(
            f"--no_ssh needs --node_rank, the place of this machine from 0 to {num_hosts - 1}: "
            f"give one in place of {node_rank}"
        )
    if options.log_level is None and not options.quiet:
        options.log_level = "error"  # DeepSpeed tells its whole command line otherwise
    given = {**vars(options), "num_gpus": num_ranks, "master_port": port}
    for name in _TAKEN:
        if given[name] not in (None, ""):
            words += [f"--{name}", str(given[name])]
    words += ["--force_multi"] if options.force_multi else []
    words += ["--no_ssh"] if options.no_ssh else []
    words += handed_on(options)
    settings = [part for text in options.set for part in ("--set", text)]
    own = sealed(["--deepspeed_config", str(options.config), *settings])
    return [*words, "--module", _module_of(command), *own], variables


def _start(command: str, arguments: Sequence[str] | None) -> NoReturn:
    """Become the launcher. Programs beside this Python, such as ninja, are found first."""
    words, variables = launcher_command(parse_arguments(arguments, command), command)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(words[0], words, {**os.environ, **variables, "PATH": path_of_programs()})


@user_errors()
def train(arguments: Sequence[str] | None = None) -> NoReturn:
    """`magnetar train`."""
    _start("train", arguments)


@user_errors()
def profile_admin(arguments: Sequence[str] | None = None) -> NoReturn:
    """`magnetar profile-admin`."""
    _start("profile-admin", arguments)
