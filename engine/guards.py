"""Bad steps are left out. If they do not end, the run rolls back and skips their batches.

A step is bad if the loss or the gradient norm of its whole batch is not finite or, as an option,
if its loss is a spike: more than some number of standard deviations above the mean of the good
steps before. The optimizer then does nothing. Weights, moments and Adam's count stay, and only the
position in the data and the learning rate move on. After several bad steps in a row the run rolls
back to its newest checkpoint, and never sees the batches in between again.

A verdict depends only on numbers that all ranks share, so all ranks reach the same one. With fp16
a norm that is not finite is an overflow, which DeepSpeed answers by lowering its loss scale as long
as that can fall.
"""

import functools
import math
import statistics
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from magnetar.data.errors import MachineError
from magnetar.engine.cluster.signals import Requests
from magnetar.engine.config.schema import GuardsConfig
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.engine.sparse_clip import SparseClip
from magnetar.engine.zero import is_sharded, named_tensors


class Verdict(Enum):
    """What the run does after a step."""

    GO = "go on"
    SKIP = "go on; the step was left out"
    ROLL_BACK = "go back to the newest checkpoint"
    STOP = "save and stop, as a signal asks"


class Guards:
    """Judges the steps of one engine.

    Attributes:
        num_bad: bad steps of the run so far.
        bad_in_a_row: bad steps since the last good one.
        batch_offset: batches that rollbacks have left out; step s trains on batch
            s + batch_offset.
        recent_losses: losses of the last good steps, up to spike_window of them; empty if spikes
            are allowed.
        stop: name of the signal by which a rank was asked to save and stop, or "".
        save: True if a rank was asked to save.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        sparse_clip: SparseClip,
        config: GuardsConfig,
        requests: Requests,
    ) -> None:
        """Wrap the optimizer's step, so that a bad step changes nothing."""
        self.engine, self.sparse_clip, self.config = engine, sparse_clip, config
        self.requests = requests
        self.num_bad = self.bad_in_a_row = self.batch_offset = 0
        self.recent_losses: list[float] = []
        self.stop, self.save = "", False
        self._sums: Tensor | None = None
        self._problem: str | None = None
        if engine.fp16_enabled():  # it would end with a traceback if it cannot be lowered
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        update = engine.basic_optimizer.step

        @functools.wraps(update)
        def step_if_good(closure: None = None) -> Any:
            return None if self.problem() else update(closure)

        engine.basic_optimizer.step = step_if_good
        sparse_clip.is_bad_step = lambda: bool(self.problem())

    def watch(self, loss: Tensor) -> None:
        """Look at a step before its update, by this rank's share () of the whole batch's loss.

        Every rank calls this.
        """
        asked = [float(bool(self.requests.stop)), float(self.requests.save)]
        self._sums = torch.cat([loss.detach().view(1), loss.new_tensor(asked)])  # (3,)
        dist.all_reduce(self._sums)
        self._problem = None

    def problem(self) -> str:
        """Why the step that `watch` has seen is bad, or ""; the first call waits for the device."""
        if self._problem is None:
            assert self._sums is not None
            # The norm is known only now, and one read of the device serves all four numbers.
            values = torch.stack([*self._sums.unbind(), self.sparse_clip.norm.to(self._sums)])
            loss, stop, save, norm = values.tolist()
            self._problem = self._problem_of(loss, norm)
            if stop:
                self.stop = self.requests.stop or "a signal to another rank"
            self.save = bool(save)
            if save:
                self.requests.save = False
            if self._problem:
                self.num_bad += 1
                self.bad_in_a_row += 1
            else:
                self.bad_in_a_row = 0
                if self.config.spike_deviations is not None:
                    self.recent_losses = [*self.recent_losses, loss][-self.config.spike_window :]
        return self._problem

    def judge(self) -> Verdict:
        """The verdict on the step that `watch` has seen; `problem` explains it."""
        problem = self.problem()
        if self.bad_in_a_row >= self.config.max_bad_steps:
            return Verdict.ROLL_BACK
        if self.stop:
            return Verdict.STOP
        return Verdict.SKIP if problem else Verdict.GO

    def start_from(self, num_bad: int, batch_offset: int, recent_losses: list[float]) -> None:
        """Go on from a checkpoint's counts; the bad steps in a row are forgotten."""
        self.num_bad, self.batch_offset, self.bad_in_a_row = num_bad, batch_offset, 0
        self.recent_losses = recent_losses

    def _problem_of(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(norm):
            scaler = self.engine.optimizer.loss_scaler if self.engine.fp16_enabled() else None
            if not (scaler and scaler.dynamic and scaler.cur_scale > scaler.min_scale):
                return f"gradient norm {norm}"
        deviations, recent = self.config.spike_deviations, self.recent_losses
        if deviations is None or len(recent) < self.config.spike_window:
            return ""
        mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
        if loss <= mean + deviations * deviation:
            return ""
        return (
            f"loss {loss:.4f}, more than {deviations:g} standard deviations ({deviation:.4f}) "
            f"above the mean {mean:.4f} of {len(recent)} steps"
        )


@torch.no_grad()
def require_equal_replicas(model: nn.Module, step: int, run_dir: Path) -> None:
    """Compare hashes of the weights that several ranks hold; every rank calls this.

    A sharded weight is held once, so there is nothing to compare.

    Raises:
        MachineError: two ranks differ in a tensor; every rank raises it.
    """
    about, hashes = [], []
    for parameter, tensors in named_tensors(model):
        if not is_sharded(parameter):
            name = getattr(parameter, "group_name", None)  # of experts
            group = None if name is None else groups._get_expert_data_parallel_group(name)
            about.append((tensors.names[0], torch.distributed.get_process_group_ranks(group)))
            hashes.append(torch.hash_tensor(parameter.data).view(torch.int64))
    if not hashes:
        return
    mine = torch.stack(hashes)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    hashes_of = torch.stack(gathered).tolist()  # (ranks, tensors)
    about_of: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(about_of, about)
    for rank, tensors_of_rank in enumerate(about_of):
        for index, (name, replicas) in enumerate(tensors_of_rank):
            if hashes_of[rank][index] != hashes_of[replicas[0]][index]:
                raise MachineError(
                    f"the weights {name} of rank {rank} are no longer those of rank {replicas[0]}, "
                    f"found at step {step}: a fault of memory, of a GPU, or of a library that "
                    "differs between them. A checkpoint saved since the last check may hold it: "
                    f"delete such a one from {run_dir / 'checkpoints'}, look at the hosts of these "
                    "ranks (magnetar doctor), and start the same command again",
                    on_every_rank=True,
                )
