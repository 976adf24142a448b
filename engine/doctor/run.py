"""The whole examination: ask the machines, judge their reports, measure their links."""

import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnetar.data.errors import MachineError, UserError
from magnetar.data.loader import open_folder
from magnetar.engine.cluster.hosts import address_of, chosen_slots, read_hostfile
from magnetar.engine.config.batch_sizes import MICRO
from magnetar.engine.config.deepspeed import EIGHT_BIT
from magnetar.engine.config.schema import RunConfig, load_config
from magnetar.engine.doctor import environment
from magnetar.engine.doctor.bandwidth import Sizes, launch, slow_links
from magnetar.engine.doctor.checks import Finding, Wanted, findings
from magnetar.engine.doctor.ssh_probe import Answer, Node, ask
from magnetar.engine.memory_planner import parameters_of
from magnetar.engine.optim.adam import uses_torchs_adam

_SECONDS = 120.0  # time limit of the measurement
_VOCAB_SIZE = 50_000  # a usual size, if the data is not on this machine
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STATE_BYTES = 12  # a master weight and two moments
# Real sizes, but no more than is needed for a bandwidth.
_LARGEST, _LARGEST_ON_CPU = 2**29, 2**24
_USUAL, _USUAL_ON_CPU = 2**26, 2**22


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        hostfile: path of the hostfile; None: only this machine.
        config: the run's JSON; None: only the machines are examined.
        settings: `--set` arguments of the JSON.
        num_gpus: number of ranks of this machine, without a hostfile.
        master_addr: address of the first machine; None: found as the launcher does.
        master_port: port of the rendezvous.
        force_multi: whether the only machine of a hostfile is also reached over ssh.
    """

    hostfile: Path | None = None
    config: Path | None = None
    settings: tuple[str, ...] = ()
    num_gpus: int | None = None
    master_addr: str | None = None
    master_port: int = 29500
    force_multi: bool = False


@dataclass
class Examination:
    """The result of an examination.

    Attributes:
        answers: answers of the machines.
        findings: findings about the machines and the measurements.
        exports: variables that other machines get.
        added: variables that the launcher adds on each machine.
        command: command line of the launcher that starts the run.
        measured: results of engine.doctor.bandwidth; None if nothing was measured.
        skipped: reason why nothing was measured.
    """

    answers: list[Answer]
    findings: list[Finding]
    exports: environment.Exports
    added: list[dict[str, str]]
    command: str
    measured: dict[str, Any] | None = None
    skipped: str = ""
    names: list[str] = field(default_factory=list)  # rank -> machine

    @property
    def is_well(self) -> bool:
        """Whether a run can start."""
        return not any(finding.severity == "problem" for finding in self.findings)


def examine(options: Options) -> Examination:
    """Ask every machine, then start all ranks unless a finding forbids it.

    Raises:
        UserError: if the hostfile, the JSON or .deepspeed_env is wrong.
    """
    if options.hostfile is None:
        count = options.num_gpus or environment.default_slots()
        slots = {socket.gethostname(): list(range(count))}
    else:
        slots = chosen_slots(read_hostfile(options.hostfile))
        if not slots:
            raise UserError(f"--hostfile {options.hostfile} has no slots: write slots=8, say")
    is_remote = options.hostfile is not None and (len(slots) > 1 or options.force_multi)
    num_ranks = sum(map(len, slots.values()))
    config = None
    if options.config is not None:
        config = load_config(options.config, options.settings, num_ranks)
    first = next(iter(slots))
    address = options.master_addr or (address_of(first) if is_remote else "127.0.0.1")
    wanted, numel = _wanted(config, options, address)
    exports = environment.exports()
    nodes = [Node(name, len(numbers), is_remote) for name, numbers in slots.items()]
    about = {
        name: getattr(wanted, name) for name in ("config", "data", "run_dir", "address", "port")
    }
    answers = ask(nodes, about, exports.variables)
    found = findings(answers, wanted)
    if options.hostfile is not None and not is_remote and not _is_this_machine(first):
        remedy = "add --force_multi to the launcher and to this command, or take its hostfile away"
        text = f"the launcher starts a hostfile's only machine here, on {socket.gethostname()}"
        found.insert(0, Finding("problem", first, "reach", text, remedy))
    launcher = _launcher(options, address, is_remote)
    names = [name for name, numbers in slots.items() for _ in numbers]
    result = Examination(
        answers,
        found,
        exports,
        environment.of_nodes(slots, address, options.master_port),
        shlex.join([*launcher, "--module", "magnetar.launchers.train", *_arguments(options)]),
        names=names,
    )
    if not result.is_well:
        result.skipped = "mend the problems above first"
        return result
    on_gpus = any((answer.report["gpus"] or {}).get("found") for answer in answers)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    try:
        result.measured = launch(
            [*command, *launcher[1:]], _sizes(config, numel, on_gpus), _SECONDS
        )
    except MachineError as error:
        result.findings.append(
            Finding(
                "problem",
                "",
                "reach",
                f"the ranks cannot work together: {error}",
                "check that no firewall keeps these machines from each other at any port; "
                "NCCL_DEBUG=INFO tells more, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the "
                "network",
            )
        )
        result.skipped = "the ranks failed before the measurement"
        return result
    result.findings += _findings_of(result.measured, names)
    return result


def _is_this_machine(name: str) -> bool:
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        return name == socket.gethostname()
    return True


def _launcher(options: Options, address: str, is_remote: bool) -> list[str]:
    command = ["deepspeed"]
    if options.hostfile is not None:
        command += ["--hostfile", str(options.hostfile)]
        command += ["--force_multi"] if options.force_multi else []
        command += ["--no_ssh_check", "--master_addr", address] if is_remote else []
    elif options.num_gpus is not None:
        command += ["--num_gpus", str(options.num_gpus)]
    return [*command, "--master_port", str(options.master_port)]


def _arguments(options: Options) -> list[str]:
    settings = [part for text in options.settings for part in ("--set", text)]
    return ["--deepspeed_config", str(options.config or "JSON"), *settings]


def _wanted(config: RunConfig | None, options: Options, address: str) -> tuple[Wanted, int]:
    """The needs of the run, and its number of parameters outside of experts."""
    if config is None:
        return Wanted(address=address, port=options.master_port), 0
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        try:
            folder, holds_pairs = Path(config.data.path), config.data.pairs is not None
            vocab_size = open_folder(folder, holds_pairs).manifest.vocab_size
        except UserError:  # the data may be on other machines only, which are asked for it
            vocab_size = _VOCAB_SIZE
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    parameters = parameters_of(model)
    numel = sum(parameter.numel for parameter in parameters)
    section = config.deepspeed["optimizer"]
    on_host = config.deepspeed["zero_optimization"].get("offload_optimizer") or {}
    compiles = ""
    if section["type"] != EIGHT_BIT and not uses_torchs_adam(section):
        compiles = "CPUAdam" if on_host.get("device") == "cpu" else "FusedAdam or CPUAdam"
    wanted = Wanted(
        config=str(options.config),
        data=config.data.path,
        run_dir=config.training.run_dir,
        checkpoint_bytes=_STATE_BYTES * numel,
        compiles=compiles,
        address=address,
        port=options.master_port,
    )
    return wanted, sum(one.numel for one in parameters if not one.is_experts)


def _sizes(config: RunConfig | None, dense_numel: int, on_gpus: bool) -> Sizes:
    """Message sizes of the run's gradients and rows; usual sizes if the run is unknown."""
    usual, largest = (_USUAL, _LARGEST) if on_gpus else (_USUAL_ON_CPU, _LARGEST_ON_CPU)
    if config is None:
        return Sizes(usual, usual, usual)
    width = _BYTES[config.dtype]
    reduced = min(dense_numel * width, largest)
    moe = config.model.moe
    if moe is None:
        return Sizes(reduced, usual, usual)
    tokens = config.deepspeed[MICRO] * config.data.seq_len
    exchanged = tokens * moe.top_k * config.model.d_model * width
    return Sizes(reduced, min(exchanged, largest), usual, moe.ep_size)


def _findings_of(measured: dict[str, Any], names: Sequence[str]) -> list[Finding]:
    found = []
    for key, what in (("sums_right", "all-reduce"), ("rows_right", "all-to-all")):
        if not measured[key]:
            text = f"{what} gives wrong numbers"
            remedy = "a driver or a network card is at fault: leave machines out until it is right"
            found.append(Finding("problem", "", "reach", text, remedy))
    for link, median in slow_links(measured["links"]):
        a, b = link.ranks
        where = f"ranks {a} and {b} of {names[a]}"
        if not link.is_inside:
            where = f"{names[a]} and {names[b]}"
        text = f"{where}: {link.bandwidth / 1e9:.2f} GB/s each way, others {median / 1e9:.2f}"
        remedy = "check the cable, the port of the switch, and other users of the link"
        found.append(Finding("warning", names[a], "reach", f"slow link: {text}", remedy))
    return found
