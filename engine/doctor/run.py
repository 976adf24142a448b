"""The whole examination: ask the machines, judge their reports, measure their links."""

import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from magnetar.data.errors import MachineError, UserError
from magnetar.data.loader import open_folder
from magnetar.engine.cluster.hosts import LaunchOptions, address_of
from magnetar.engine.config.batch_sizes import MICRO
from magnetar.engine.config.schema import RunConfig, load_config
from magnetar.engine.doctor import environment
from magnetar.engine.doctor.bandwidth import Sizes, launch, slow_links
from magnetar.engine.doctor.checks import Finding, Wanted, findings
from magnetar.engine.doctor.ssh_probe import Machine, ask
from magnetar.engine.memory_planner import parameters_of
from magnetar.engine.optim.adam import uses_deepspeeds_adam

DEFAULT_PORT = 29500
_SECONDS = 120.0  # time limit of the measurement
_VOCAB_SIZE = 50_000  # a usual size, if the data is not on this machine
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STATE_BYTES, _EMA_BYTES = 12, 4  # a master weight and two moments; an average of the weights
# Real sizes, but no more than is needed for a bandwidth.
_LARGEST, _LARGEST_ON_CPU = 2**29, 2**24
_USUAL, _USUAL_ON_CPU = 2**26, 2**22


@dataclass
class Examination:
    """The result of an examination.

    Attributes:
        machines: the machines, with their answers.
        findings: findings about the machines and the measurements.
        exports: variables that other machines get.
        added: variables that the launcher adds on each machine.
        command: command line of the launcher that starts the run.
        measured: results of engine.doctor.bandwidth; None if nothing was measured.
        skipped: reason why nothing was measured.
    """

    machines: list[Machine]
    findings: list[Finding]
    exports: environment.Exports
    added: list[dict[str, str]]
    command: str
    measured: dict[str, Any] | None = None
    skipped: str = ""

    @property
    def num_problems(self) -> int:
        """Number of findings that must be mended before a run can start."""
        return sum(finding.severity == "problem" for finding in self.findings)


def examine(options: LaunchOptions) -> Examination:
    """Ask every machine, then start all ranks unless a finding forbids it.

    Raises:
        UserError: if the hostfile, the JSON or .deepspeed_env is wrong.
    """
    port = options.master_port or DEFAULT_PORT
    options = replace(options, master_port=port)
    count = options.num_gpus or get_accelerator().device_count()
    slots = options.slots(count)
    if options.hostfile is None:
        slots = {socket.gethostname(): slots["localhost"]}
    is_remote = options.is_remote(slots)
    config = None
    if options.config is not None:
        config = load_config(options.config, options.settings, sum(map(len, slots.values())))
    first = next(iter(slots))
    address = options.master_addr or "127.0.0.1"
    if is_remote and options.master_addr is None:
        address = address_of(first, options.ssh_port)
    wanted, numel = _wanted(config, Wanted(str(options.config), address=address, port=port))
    exports = environment.exports() if is_remote else environment.Exports({}, [], [])
    machines = [Machine(name, len(numbers), is_remote) for name, numbers in slots.items()]
    ask(machines, asdict(wanted), exports.variables, options.ssh_port)
    found = findings(machines, wanted)
    if options.hostfile is not None and not is_remote and not _is_this_machine(first):
        remedy = "add --force_multi to the launcher and to this command, or take its hostfile away"
        text = f"the launcher starts a hostfile's only machine here, on {socket.gethostname()}"
        found.insert(0, Finding("problem", first, "reach", text, remedy))
    is_chosen = options.include or options.exclude or options.num_nodes or options.num_gpus
    launcher = options.words(address, slots if is_chosen else {}, is_remote)
    command = shlex.join(["deepspeed", *launcher, *options.training(options.settings)])
    added = environment.of_nodes(slots, address, port)
    result = Examination(machines, found, exports, added, command)
    if result.num_problems:
        result.skipped = "mend the problems above first"
        return result
    on_gpus = any((machine.report["gpus"] or {}).get("found") for machine in machines)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    try:
        measured = launch([*runner, *launcher], _sizes(config, numel, on_gpus), _SECONDS)
    except MachineError as error:
        text = f"the ranks cannot work together: {error}"
        remedy = (
            "check that no firewall keeps these machines from each other at any port; "
            "NCCL_DEBUG=INFO tells more, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the "
            "network"
        )
        result.findings.append(Finding("problem", "", "reach", text, remedy))
        result.skipped = "the ranks failed before the measurement"
        return result
    result.measured = measured
    names = [machine.name for machine in machines for _ in range(machine.slots)]
    dtype = config.dtype if config else None
    result.findings += _findings_of(measured, names, dtype)
    return result


def _is_this_machine(name: str) -> bool:
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        return name == socket.gethostname()
    return True


def _wanted(config: RunConfig | None, wanted: Wanted) -> tuple[Wanted, int]:
    """The needs of the run, and its number of parameters outside of experts."""
    if config is None:
        return replace(wanted, config=None), 0
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
    has_ema = config.training.ema_decay is not None
    compiles = ""
    if uses_deepspeeds_adam(section):
        compiles = "CPUAdam" if on_host.get("device") == "cpu" else "FusedAdam or CPUAdam"
    wanted = replace(
        wanted,
        data=config.data.path,
        run_dir=config.training.run_dir,
        checkpoint_bytes=(_STATE_BYTES + has_ema * _EMA_BYTES) * numel,
        compiles=compiles,
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


def _findings_of(
    measured: dict[str, Any], names: Sequence[str], dtype: str | None
) -> list[Finding]:
    found = []
    # A machine's ranks have equal devices, or the check of GPUs has said so.
    for name, missing in dict(zip(names, measured["missing_types"], strict=False)).items():
        if dtype in missing:
            text, _, remedy = missing[dtype].partition(": ")
            text = f"{dtype}.enabled=true, and {text}"
            found.append(Finding("problem", name, "GPUs", text, remedy))
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
