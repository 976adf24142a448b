"""A rank's training batches on its device, made ahead by a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magnetar.engine.config.schema import RunConfig
from magnetar.engine.run_data import TrainingSet, micro_batch
from magnetar.engine.train_step import MicroBatch

STEPS_AHEAD = 4


class TrainingBatches:
    """This rank's part of the samples of any optimizer step.

    A step's samples follow from its number alone, so those of the next steps are made while the
    device computes.
    """

    def __init__(self, config: RunConfig, dataset: TrainingSet, device: torch.device) -> None:
        """Take the training set; from now on the thread alone draws from it."""
        self._config, self._dataset, self._device = config, dataset, device
        self._place = dist.get_rank(), dist.get_world_size()
        self._thread = ThreadPoolExecutor(1, "batches")
        self._made: dict[int, Future[list[MicroBatch]]] = {}

    def of_step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step (from 1): inputs and targets."""
        wanted = range(step, step + STEPS_AHEAD + 1)
        self._made = {
            number: self._made.get(number) or self._thread.submit(self._make, number)
            for number in wanted
        }
        return [
            (tuple(map(self._on_device, inputs)), self._on_device(targets))
            for inputs, targets in self._made[step].result()
        ]

    def _make(self, step: int) -> list[MicroBatch]:
        made = []
        for micro_step in range(self._config.deepspeed["gradient_accumulation_steps"]):
            batch = micro_batch(self._config, self._dataset, step, micro_step, *self._place)
            made.append((tuple(map(self._on_host, batch.inputs)), self._on_host(batch.targets)))
        return made

    def _on_host(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
