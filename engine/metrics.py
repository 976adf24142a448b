"""The records of a run: one flat record for each logged step and each evaluation.

They go to metrics.jsonl and to DeepSpeed's monitor.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from magnetar.data.atomic import append, write_atomically
from magnetar.models.config import ModelConfig
from magnetar.models.cost import flops_per_token
from magnetar.models.moe.all_to_all import Traffic
from magnetar.models.moe.layer import RoutingStats, SparseFeedForward

if TYPE_CHECKING:  # a picture is drawn without deepspeed
    from magnetar.engine.deepspeed_engine import DeepSpeedEngine
    from magnetar.engine.sparse_clip import SparseClip
    from magnetar.engine.train_step import LossWeights, StepResult

LOSSES = ("loss", "aux_loss", "z_loss", "router_z_loss")  # fields of a StepResult

# Dense bf16 / fp16 peak of one card, FLOP/s, from the vendors' datasheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Datasheet FLOP/s of this rank's card; None if they are not known (a CPU, another card)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that this rank has held: of the card, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def reduce_over_ranks(result: "StepResult") -> tuple[dict[str, float], list[RoutingStats]]:
    """The whole batch's losses by their names in a StepResult, and the routing of each MoE layer.

    It takes one all_reduce and one read of the device.
    """
    losses = torch.stack([getattr(result, name) for name in LOSSES])
    values = [losses, *(value for stats in result.routing for value in stats)]
    packed = torch.cat([value.double().flatten() for value in values])
    dist.all_reduce(packed)
    parts = iter(packed.cpu().split([value.numel() for value in values]))
    means = (next(parts) / dist.get_world_size()).tolist()
    routing = []
    for stats in result.routing:
        whole = RoutingStats(*(next(parts).view(value.shape) for value in stats))
        routing.append(whole._replace(temperature=whole.temperature / dist.get_world_size()))
    return dict(zip(LOSSES, means, strict=True)), routing


def routing_record(layer: str, stats: RoutingStats) -> dict[str, float]:
    """The metrics of one MoE layer, from statistics of the whole batch.

    `load_max` and `load_min` are the loads of the busiest and the idlest expert, divided by the
    mean load. `dropped` is the share of assignments that were dropped.
    """
    total = stats.load.sum().clamp(min=1)  # a batch may be all padding
    even = total / stats.load.numel()
    return {
        f"{layer}/routing_entropy": float(stats.mean_entropy),
        f"{layer}/load_max": float(stats.load.max() / even),
        f"{layer}/load_min": float(stats.load.min() / even),
        f"{layer}/dropped": float(stats.dropped / total),
        f"{layer}/balance_loss": float(stats.aux_loss),
        f"{layer}/temperature": float(stats.temperature),
    }


def take_traffic(layers: Mapping[str, SparseFeedForward]) -> dict[str, Traffic]:
    """What each MoE layer has dispatched and combined in a step; the next count begins at 0."""
    found = {name: layer.traffic for name, layer in layers.items()}
    for layer in layers.values():
        layer.traffic = Traffic()
    return found


def traffic_record(traffic: Mapping[str, Traffic], device: torch.device) -> dict[str, float]:
    """GiB of all_to_all on each link over all ranks, in all and for each layer of `traffic`.

    Every rank calls this. Layers that are computed again for the backward pass count again.
    """
    sums = [list(vars(of_layer).values()) for of_layer in traffic.values()]
    found = torch.tensor(sums, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    gib = (found / 2**30).cpu()  # (layers, links)
    names = ["", *(f"{name}/" for name in traffic)]
    return {
        f"{name}all_to_all_{link}_gib": value
        for name, values in zip(names, [gib.sum(0).tolist(), *gib.tolist()], strict=True)
        for link, value in zip(vars(Traffic()), values, strict=True)
    }


def sparse_layers(module: nn.Module, model: ModelConfig) -> dict[str, SparseFeedForward]:
    """The MoE layers by their names in metrics, such as layer_2, in the order of the routing."""
    stacks = {"layer": model.num_layers}
    if model.architecture == "encoder_decoder":
        stacks = {"encoder_layer": model.encoder_depth, "decoder_layer": model.decoder_depth}
    names = [
        f"{name}_{index + 1}"
        for name, depth in stacks.items()
        for index in range(depth)
        if model.is_moe_layer(index)
    ]
    layers = (layer for layer in module.modules() if isinstance(layer, SparseFeedForward))
    return dict(zip(names, layers, strict=True))


class Metrics:
    """Builds and writes the records of one run.

    The file is metrics.jsonl: a record with `loss` for each logged step, one with `valid_loss`
    for each evaluation. A resumed run first removes what lies beyond its checkpoint.
    """

    def __init__(
        self,
        engine: "DeepSpeedEngine",
        sparse_clip: "SparseClip",
        path: Path,
        model: ModelConfig,
        seq_len: int,
        tokens_per_step: int | None,
        weights: "LossWeights",
    ) -> None:
        """Prepare for the first step.

        Rank 0 alone writes the file. The FLOPs of a token depend on `seq_len`. If `tokens_per_step`
        is None, targets are counted as tokens. A loss without weight is not recorded.
        """
        self.engine, self.sparse_clip, self.path = engine, sparse_clip, path
        self.tokens_per_step, self.weights = tokens_per_step, weights
        self.peak_flops = peak_flops(engine.device)
        self.flops_per_token = flops_per_token(model, seq_len)
        self.layers = sparse_layers(engine.module, model)
        self.traffic: dict[str, Traffic] = {}
        self.start_from(0, 0.0)
        threading.excepthook = _without_tensorboards_errors

    def start_from(self, num_targets: int, seconds: float) -> None:
        """Go on from a checkpoint's targets and training time."""
        self.num_targets = torch.tensor(num_targets, device=self.engine.device)
        self.seconds = seconds
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure the time of training steps from now."""
        self.last_time = self.lap_begin = time.perf_counter()
        self.last_tokens = self.num_tokens(self.engine.global_steps)

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Exclude the time spent inside (an evaluation, a save) from times and tokens/s."""
        begin = time.perf_counter()
        yield
        paused = time.perf_counter() - begin
        self.last_time += paused
        self.lap_begin += paused

    def count(self, result: "StepResult") -> None:
        """Count a step's targets and its traffic, without waiting for the device."""
        self.num_targets += result.num_targets
        self.traffic = take_traffic(self.layers)

    def num_tokens(self, step: int) -> int:
        """Tokens of the run so far: the places of its windows, or the targets of its pairs."""
        if self.tokens_per_step is None:
            return int(self.num_targets)
        return step * self.tokens_per_step

    def end_lap(self) -> None:
        """Add the training time since the last lap to `seconds`."""
        now = time.perf_counter()
        self.seconds += now - self.lap_begin
        self.lap_begin = now

    def training_record(self, step: int, result: "StepResult", num_bad: int) -> dict[str, float]:
        """The record of a step; every rank calls this. Times cover the steps since the last.

        `num_bad` steps were left out by the guards so far.
        """
        losses, routing = reduce_over_ranks(result)
        now = time.perf_counter()
        num_tokens = self.num_tokens(step)
        tokens_per_second = (num_tokens - self.last_tokens) / (now - self.last_time)
        self.last_time, self.last_tokens = now, num_tokens
        clip = self.sparse_clip
        norms = torch.stack([clip.norm, clip.dense_norm, clip.expert_norm, clip.coefficient])
        if getattr(self.engine.optimizer, "overflow", False):
            # DeepSpeed skipped the update without computing a norm.
            norms = torch.tensor([math.inf, math.inf, math.inf, 0.0])
        names = ("grad_norm", "dense_grad_norm", "expert_grad_norm", "clip_coefficient")
        record: dict[str, float] = {
            "step": step,
            "tokens": num_tokens,
            "loss": losses["loss"],
            "perplexity": math.exp(min(losses["loss"], 700.0)),
            "lr": result.lr,
            **dict(zip(names, norms.tolist(), strict=True)),
            "clipped_steps": int(clip.num_clipped),
            "skipped_steps": self.engine.skipped_steps + num_bad,
            "tokens_per_second": tokens_per_second,
        }
        if routing:
            record["balance_loss"] = losses["aux_loss"]
            record["routing_entropy"] = sum(float(s.mean_entropy) for s in routing) / len(routing)
        if self.weights.z > 0:
            record["z_loss"] = losses["z_loss"]
        if self.weights.router_z > 0:
            record["router_z_loss"] = losses["router_z_loss"]
        if self.engine.fp16_enabled():
            record["loss_scale"] = float(self.engine.optimizer.loss_scale)
        if self.peak_flops is not None:
            flops = tokens_per_second * self.flops_per_token / dist.get_world_size()
            record["mfu"] = flops / self.peak_flops
        record["memory_gib"] = peak_memory(self.engine.device) / 2**30
        for layer, stats in zip(self.layers, routing, strict=True):
            record |= routing_record(layer, stats)
        if any(layer.ep_size > 1 for layer in self.layers.values()):
            record |= traffic_record(self.traffic, self.engine.device)
        return record

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """Write the record of an evaluation after a step; step 0 has the initial weights."""
        self.write({"step": step} | {f"valid_{name}": v for name, v in values.items()})

    def write(self, record: dict[str, float]) -> None:
        """Append a record to metrics.jsonl and send it to DeepSpeed's monitor, on rank 0."""
        if dist.get_rank() != 0:
            return
        # JSON has no infinity and no NaN, so null stands for both.
        finite = {name: v if math.isfinite(v) else None for name, v in record.items()}
        append(self.path, json.dumps(finite) + "\n")
        step = int(record["step"])
        events = [(monitor_tag(name), v, step) for name, v in record.items() if name != "step"]
        try:
            self.engine.monitor.write_events(events)
        except OSError as error:  # of an open file, or of a thread, that has no name
            name = error.filename or f"what a monitor writes for {self.path.parent}"
            raise OSError(error.errno, error.strerror, name) from error

    def forget_after(self, step: int) -> str:
        """Remove what was recorded after a step, on rank 0, as `keep_records_up_to` does."""
        if dist.get_rank() != 0:
            return ""
        writer = getattr(self.engine.monitor.tb_monitor, "summary_writer", None)
        if writer is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            writer.file_writer.add_event(start, step + 1)
        return keep_records_up_to(self.path, step)


def _without_tensorboards_errors(args: threading.ExceptHookArgs) -> None:
    """Print a thread's error, unless TensorBoard raises it again at the next record."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


def monitor_tag(name: str) -> str:
    """TensorBoard's name of a metric: train/loss, valid/bleu/en-de, layer_2/temperature."""
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    return name if "/" in name else f"train/{name}"


Record = dict[str, float]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_RECORD = TypeAdapter(dict[str, _Number | None])


def read_records(file: Path) -> tuple[list[tuple[bytes, Record]], list[bytes], str]:
    """The records of a metrics.jsonl, whatever else stands in it.

    Half a line at the end is left out without a word, since a run may be writing it, or was killed.

    Returns:
        Every record with its line, with NaN for null; the lines that are no records; a sentence
        about those, "" if there are none.
    """
    lines = file.read_bytes().split(b"\n")
    records = [(line, record) for line in lines if (record := _record(line)) is not None]
    left_out = {
        n: line for n, line in enumerate(lines[:-1], 1) if line.strip() and not _record(line)
    }
    words = ""
    for number, line in list(left_out.items())[:1]:
        what = f"line {number} is no record and is"
        if len(left_out) > 1:
            what = f"{len(left_out)} lines, line {number} first, are no records and are"
        words = f"{file}: {what} left out ({line[:40]!r})"
    return records, list(left_out.values()), words


def _record(line: bytes) -> Record | None:
    try:
        values = _RECORD.validate_json(line)
    except ValidationError:
        return None
    record = {name: math.nan if value is None else value for name, value in values.items()}
    step = record.get("step", -1.0)
    is_record = step >= 0 and step.is_integer() and not {"loss", "valid_loss"}.isdisjoint(record)
    return record if is_record else None


def keep_records_up_to(file: Path, step: int) -> str:
    """Remove the records after a step from metrics.jsonl, since they will be written again.

    Returns:
        A sentence about lines that are no records, "" if there are none. They go into another file.
    """
    if not file.exists():
        return ""
    lines, left_out, words = read_records(file)
    if left_out:
        other = file.with_suffix(".left_out")
        append(other, b"".join(line + b"\n" for line in left_out))
        words += f" and kept in {other.name}"
    kept = [line + b"\n" for line, record in lines if record["step"] <= step]
    write_atomically(file, b"".join(kept))
    return words
