"""Steps that would do harm are left out; when they do not end, the run goes back and around them.

A step is bad if the loss or the gradient norm of its whole batch is no finite number or, as an
option, if the loss is a spike: more than so many standard deviations above the mean of those
before. The optimizer then does nothing: weights, moments and Adam's count stay, and only the
position in the data and the learning rate move on. After several bad steps in a row the run goes
back to its newest checkpoint, and never sees the batches in between again.

What is decided depends on numbers that every rank has alike, so all of them decide alike. With
fp16 a norm that is not finite is an overflow: DeepSpeed lowers its loss scale while that can fall.
"""

import functools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from magnetar.data.errors import MachineError
from magnetar.engine.cluster.signals import Requests
from magnetar.engine.config.schema import GuardsConfig
from magnetar.engine.sparse_clip import SparseClip
from magnetar.engine.zero import is_sharded, named_tensors


@torch.no_grad()
def require_equal_replicas(model: nn.Module, step: int, run_dir: Path) -> None:
    """Compare hashes of weights; every rank calls this.

    ZeRO 3 keeps every weight once, so there is nothing to compare.

    Raises:
        MachineError: on every rank alike, naming a tensor and the ranks that differ.
    """
    about, hashes = [], []
    for parameter, tensors in named_tensors(model):
        if not is_sharded(parameter):
            about.append((tensors.names[0], _replicas(getattr(parameter, "group_name", None))))
            hashes.append(torch.hash_tensor(parameter.data).view(torch.int64))
    if not hashes:
        return
    mine = torch.stack(hashes)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    hashes_of = torch.stack(gathered).tolist()  # [rank][tensor]
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


def _replicas(group_name: str | None) -> list[int]:
    """The ranks of the job that hold the same as this one."""
    if group_name is None:
        return list(range(dist.get_world_size()))
    group = groups._get_expert_data_parallel_group(group_name)
    return torch.distributed.get_process_group_ranks(group)


class Guards:
    """Watches the steps of one engine.

    Attributes:
        recent_losses: of the last good steps, at most spike_window of them; empty where nobody
            asks about spikes.
        bad_in_a_row: bad steps since the last good one.
        stop: name of the signal by which a rank was asked to save and stop, or "".
        save: whether a rank was asked to save.
    """

    def __init__(
        self, engine: Any, sparse_clip: SparseClip, config: GuardsConfig, requests: Requests
    ) -> None:
        """Have the engine's optimizer do nothing in a bad step."""
        self.engine, self.sparse_clip, self.config = engine, sparse_clip, config
        self.requests = requests
        self.recent_losses: list[float] = []
        self.bad_in_a_row = 0
        self.stop, self.save = "", False
        self._sums: Tensor | None = None
        self._problem: str | None = None
        if engine.fp16_enabled():  # it would end with a traceback where it cannot be lowered
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        update = engine.basic_optimizer.step

        @functools.wraps(update)
        def step_if_good(closure: None = None) -> Any:
            return None if self.problem() else update(closure)

        engine.basic_optimizer.step = step_if_good
        sparse_clip.is_bad_step = lambda: bool(self.problem())

    def watch(self, loss: Tensor) -> None:
        """Look at a step before its update; every rank calls this.

        Args:
            loss: (), this rank's share of the loss of the whole batch.
        """
        asked = [float(bool(self.requests.stop)), float(self.requests.save)]
        self._sums = torch.cat([loss.detach().view(1), loss.new_tensor(asked)])
        dist.all_reduce(self._sums)
        self._problem = None

    def problem(self) -> str:
        """What is bad about the step that `watch` has seen, or ""; waits for the device once."""
        if self._problem is None:
            assert self._sums is not None
            values = torch.stack([*self._sums.unbind(), self.sparse_clip.norm.to(self._sums)])
            loss, stop, save, norm = values.tolist()
            self._problem = self._judged(loss, norm)
            if stop:
                self.stop = self.requests.stop or "a signal to another rank"
            self.save = bool(save)
            if save:
                self.requests.save = False
            if self._problem:
                self.bad_in_a_row += 1
            else:
                self.bad_in_a_row = 0
                if self.config.spike_deviations is not None:
                    self.recent_losses = [*self.recent_losses, loss][-self.config.spike_window :]
        return self._problem

    def _judged(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(norm) and not self._scale_can_fall():
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

    def _scale_can_fall(self) -> bool:
        if not self.engine.fp16_enabled():
            return False
        scaler = self.engine.optimizer.loss_scaler
        return scaler.dynamic and scaler.cur_scale > scaler.min_scale

    def has_had_enough(self) -> bool:
        """Whether so many steps in a row were bad that the run is to go back."""
        return self.bad_in_a_row >= self.config.max_bad_steps

    def start_over(self, recent_losses: list[float]) -> None:
        """Forget the bad steps, after the run has gone back to where these were the last losses."""
        self.bad_in_a_row, self.recent_losses = 0, recent_losses
