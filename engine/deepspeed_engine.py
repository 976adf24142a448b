"""What Magnetar uses of a DeepSpeed engine, as a type; DeepSpeed itself declares none."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from magnetar.models.transformer import ModelLosses


class DeepSpeedEngine(Protocol):
    """The part of deepspeed.DeepSpeedEngine that Magnetar reads or replaces.

    Attributes:
        module: the model, a models.transformer.Transformer or EncoderDecoder.
        device: this rank's device.
        optimizer: DeepSpeed's ZeRO or bf16 wrapper of the optimizer, or basic_optimizer itself
            with fp32 and without ZeRO. It has param_groups and, with fp16, loss_scaler, loss_scale
            and overflow. SparseClip replaces its clipping.
        basic_optimizer: Adam itself, within the wrapper. engine.guards replaces its step, and
            engine.checkpoint waits in a hook of it.
        lr_scheduler: the LambdaLR of engine.build.
        monitor: DeepSpeed's writer to TensorBoard and others, with write_events and tb_monitor.
        global_steps: optimizer steps done, bad and overflowed ones included.
        global_samples: samples of these steps.
        micro_steps: micro-batches of these steps.
        skipped_steps: steps that fp16's loss scale left out after an overflow.
        clip_fp32_gradients: clipping before the update, with fp32 and without ZeRO.
        gradient_clipping: threshold of DeepSpeed's JSON.
        backward: backward pass; the loss is divided by gradient_accumulation_steps.
        step: end of a micro-step; at the last one of a step, clip and update.
        get_lr: learning rate of the next update, by parameter group.
        fp16_enabled: whether a loss scale is used.
        train_batch_size: samples of an optimizer step over all ranks.
        train_micro_batch_size_per_gpu: samples of a micro-batch on one rank.
        gradient_accumulation_steps: micro-batches of an optimizer step on one rank.
        destroy: removal of its hooks, which are cycles that no garbage collection finds.
    """

    module: Any
    device: torch.device
    optimizer: Any
    basic_optimizer: Any
    lr_scheduler: Any
    monitor: Any
    global_steps: int
    global_samples: int
    micro_steps: int
    skipped_steps: int
    clip_fp32_gradients: Any
    gradient_clipping: Callable[[], float]
    _config: Any
    _global_grad_norm: Any  # the norm that DeepSpeed reports
    backward: Callable[[Tensor], Any]
    step: Callable[[], Any]
    get_lr: Callable[[], list[float]]
    fp16_enabled: Callable[[], bool]
    train_batch_size: Callable[[], int]
    train_micro_batch_size_per_gpu: Callable[[], int]
    gradient_accumulation_steps: Callable[[], int]
    destroy: Callable[[], None]

    def __call__(self, *inputs: Tensor, **keys: Any) -> ModelLosses:
        """Forward pass of one micro-batch."""
