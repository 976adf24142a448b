"""The keys of DeepSpeed's own JSON that Magnetar supports; `refused_keys` has the others.

DeepSpeed cannot be asked for them when a config is read, because importing it takes seconds and
loads torch. So they are declared here. tests/engine/config/test_deepspeed.py compares names, types
and defaults with the installed DeepSpeed, and finds every key that it reads and neither file has.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from magnetar.models.section import (
    Count,
    NonNegative,
    Positive,
    Share,
    StoredModel,
    StrictModel,
)

ADAMS = ("Adam", "AdamW")
# DeepSpeed does not make these: bitsandbytes' AdamW, PyTorch's RAdam and Magnetar's Lion.
EIGHT_BIT, RADAM, LION = "AdamW8bit", "RAdam", "Lion"


def _whole(value: Any) -> Any:
    """The whole number that a float such as 5e8 stands for; other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, BeforeValidator(_whole)]
Elements = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
BatchSize = Annotated[int, Field(ge=1, le=1 << 20)]  # a step of more would never end


class AdamParams(StrictModel):
    """The optimizer's numbers."""

    lr: Positive
    """Learning rate at the top of `magnetar.training.lr_schedule`."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the running mean and square. Type `Lion`: share of the momentum in the update, and
    its decay, for which its paper has [0.9, 0.99]."""
    eps: Positive = 1e-8
    """Number added to the denominator, which type `Lion` lacks."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    adam_w_mode: bool = True
    """Whether weight decay is decoupled. false: L2 penalty, only with type `Adam`."""
    torch_adam: bool | None = None
    """Implementation of types `Adam` and `AdamW`. null or true: PyTorch's fused Adam. false:
    DeepSpeed's Adam, which is compiled at its first use."""
    min_8bit_size: Count | None = None
    """Fewest elements of a tensor whose moments have 8 bits; smaller ones keep float32. Each expert
    counts by itself. null: 4096, as in bitsandbytes. Only with type `AdamW8bit`."""


class OptimizerConfig(StrictModel):
    """The optimizer."""

    type: Literal["Adam", "AdamW", "AdamW8bit", "RAdam", "Lion"]
    """Optimizer. `Adam` and `AdamW` decouple the weight decay unless `params.adam_w_mode` is false.
    `AdamW8bit` is AdamW of the package bitsandbytes: its moments take 2 bytes a parameter instead
    of 8 (block-wise, arXiv 2110.02861). The embeddings' moments stay in float32. The paper
    recommends `magnetar.model.stable_embedding` with it. `RAdam` is PyTorch's, with decoupled
    weight decay (arXiv 1908.03265). `Lion` (arXiv 2302.06675) has one moment, and its update is a
    sign: its learning rate is 3 to 10 times smaller than AdamW's."""
    params: AdamParams
    """Numbers of the optimizer."""


class OffloadConfig(StrictModel):
    """Where the optimizer's states are and its update is computed (ZeRO-Offload)."""

    device: Literal["none", "cpu"] = "none"
    """Place of the optimizer's states. `cpu`: host memory, under ZeRO 1, 2 or 3. The update is
    PyTorch's Adam or, with `torch_adam` false, DeepSpeed's CPU Adam."""
    pin_memory: bool = True
    """Whether memory is page-locked: faster to copy, never swapped."""


class ZeroConfig(StoredModel):
    """ZeRO: what is divided among the data-parallel ranks."""

    retired: ClassVar[dict[str, tuple[Any, ...]]] = {"load_from_fp32_weights": (True, False)}

    stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage. 0: nothing is divided. 1: the optimizer's states are. 2: gradients too. 3:
    weights too."""
    contiguous_gradients: bool = True
    """Whether gradients are copied into one buffer as they appear."""
    reduce_scatter: bool = True
    """Whether gradients are averaged by reduce-scatter. false: by all-reduce."""
    reduce_bucket_size: Size = Field(default=500_000_000, gt=0)
    """Elements reduced at a time."""
    use_multi_rank_bucket_allreduce: bool = True
    """Whether one all-reduce serves the buckets of several ranks."""
    allgather_partitions: bool = True
    """Whether updated weights are collected by all-gather. false: by broadcasts."""
    allgather_bucket_size: Size = Field(default=500_000_000, gt=0, multiple_of=2)
    """Elements gathered at a time."""
    overlap_comm: bool | None = None
    """Whether gradients are reduced during the backward pass. null: false."""
    compute_grad_norm: bool = True
    """Whether the norm is computed; clipping and the logs need it."""
    ignore_unused_parameters: bool = True
    """Whether a parameter may lack a gradient under stage 2. false: the run stops."""
    offload_optimizer: OffloadConfig | None = None
    """Optimizer states in host memory. null: on the device."""
    sub_group_size: Elements = 1_000_000_000
    """Stage 3: elements of a rank updated at a time."""
    stage3_prefetch_bucket_size: Elements = 50_000_000
    """Stage 3: elements collected ahead of their use."""
    stage3_param_persistence_threshold: Elements = 100_000
    """Stage 3: most elements of a parameter that stays whole between uses."""
    stage3_model_persistence_threshold: Elements | None = None
    """Stage 3: most elements that stay whole. null: no limit."""
    stage3_max_live_parameters: Elements = 1_000_000_000
    """Stage 3: most elements that a rank holds whole at a time."""
    stage3_max_reuse_distance: Elements = 1_000_000_000
    """Stage 3: most elements between two uses of a parameter that stays whole."""
    stage3_allgather_sequential: bool = False
    """Whether stage 3 collects parameters one by one: less memory, slower."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Whether stage 3 collects parameters by all-reduce. false: by all-gather."""
    memory_efficient_linear: bool = True
    """Whether DeepSpeed's matrix product replaces PyTorch's in stage 3."""
    log_trace_cache_warnings: bool = False
    """Whether stage 3 prints a line when modules run in an unforeseen order."""
    parameter_alignment: bool | None = None
    """Whether every parameter starts at a multiple of 16 bytes. null: true for a MoE model under
    stage 1 or 2, else false."""


class Bf16Config(StrictModel):
    """Weights and activations in bfloat16, master weights in float32."""

    enabled: bool = False
    """Whether it is on. It needs ZeRO stage 1, 2 or 3."""
    check_grad_overflow: bool = True
    """Whether a step whose gradients are not finite is skipped."""


class Fp16Config(StrictModel):
    """Weights and activations in float16, with a scaled loss."""

    enabled: bool = False
    """Whether it is on. It needs ZeRO stage 1, 2 or 3."""
    loss_scale: NonNegative = 0.0
    """Loss scale. 0: found while training."""
    initial_scale_power: int = Field(default=16, ge=0, le=127)
    """Exponent of the first loss scale, 2^n."""
    loss_scale_window: Count = 1000
    """Steps without overflow before the scale doubles."""
    hysteresis: Count = 2
    """Overflows before the scale halves."""
    consecutive_hysteresis: bool = False
    """Whether only overflows in a row count."""
    min_loss_scale: Count = 1
    """Smallest scale."""


class DataTypesConfig(StrictModel):
    """Data types beyond bf16 and fp16."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type in which gradients accumulate. null: the type of the weights."""


class _FileMonitor(StrictModel):
    enabled: bool = False
    """Whether metrics are written."""
    output_path: str = ""
    """Folder. Empty: one in the run's folder."""
    job_name: str = "DeepSpeedJobName"
    """Subfolder of output_path."""


class TensorBoardConfig(_FileMonitor):
    """TensorBoard."""


class CsvConfig(_FileMonitor):
    """CSV files, one for each metric."""


class WandbConfig(StrictModel):
    """Weights & Biases (its package must be installed)."""

    enabled: bool = False
    """Whether metrics are sent."""
    group: str | None = None
    """Group of runs."""
    team: str | None = None
    """Team."""
    project: str = "deepspeed"
    """Project."""


class CometConfig(StrictModel):
    """Comet (its package must be installed)."""

    enabled: bool = False
    """Whether metrics are sent."""
    samples_log_interval: Count = 100
    """Samples between two submissions."""
    project: str | None = None
    """Project."""
    workspace: str | None = None
    """Workspace."""
    experiment_name: str | None = None
    """Name of the experiment."""
    experiment_key: str | None = None
    """Key of the experiment."""
    online: bool | None = None
    """Whether data are sent. false: they stay on disk."""
    mode: Literal["get", "create", "get_or_create"] | None = None
    """Whether the experiment is an old one, a new one or either. null: Comet's default."""


class CommsLoggerConfig(StrictModel):
    """Times of the collective operations."""

    enabled: bool = False
    """Whether they are recorded."""
    prof_all: bool = True
    """Whether every operation is recorded. false: those in prof_ops."""
    prof_ops: list[str] = Field(default=[])
    """Names of the operations to record."""
    verbose: bool = False
    """Whether each one is printed."""
    debug: bool = False
    """Whether the calling function is named too."""


class FlopsProfilerConfig(StrictModel):
    """DeepSpeed's profile of one training step."""

    enabled: bool = False
    """Whether a step is profiled."""
    recompute_fwd_factor: NonNegative = 0.0
    """Share of the forward pass that is recomputed."""
    profile_step: Count = 1
    """Number of the step."""
    module_depth: int = Field(default=-1, ge=-1)
    """Depth shown. -1: all."""
    top_modules: Count = 1
    """Modules shown at each depth."""
    detailed: bool = True
    """Whether the whole tree is printed."""
    output_file: str | None = None
    """File for the profile. null: standard output."""


class ThroughputTimerConfig(StrictModel):
    """DeepSpeed's throughput timer."""

    enabled: bool = True
    """Whether it measures."""
    synchronized: bool = True
    """Whether it waits for the device first: exact, and a little slower."""


class TimersConfig(StrictModel):
    """Timers."""

    throughput: ThroughputTimerConfig = ThroughputTimerConfig()
    """Throughput timer."""


class ActivationCheckpointingConfig(StrictModel):
    """Activation checkpointing; `magnetar.training.activation_checkpointing` switches it on."""

    synchronize_checkpoint_boundary: bool = False
    """Whether each layer waits for the device before and after it."""
    profile: bool = False
    """Whether the time of each layer is printed."""


class DeepSpeedKeys(StrictModel):
    """DeepSpeed's top-level keys."""

    train_batch_size: BatchSize | None = None
    """Sequences in one optimizer step, over all ranks: train_micro_batch_size_per_gpu *
    gradient_accumulation_steps * ranks. Leave out whichever should follow from the others."""
    train_micro_batch_size_per_gpu: BatchSize | None = None
    """Sequences in one forward pass of one rank."""
    gradient_accumulation_steps: BatchSize | None = None
    """Forward passes of a rank in one optimizer step."""
    optimizer: OptimizerConfig
    """Optimizer."""
    gradient_clipping: NonNegative = Field(default=0.0, le=1e30)
    """Threshold of the gradient norm, SparseClip's xi; required unless
    `magnetar.sparse_clip.enabled` is false. 0: no clipping (DeepSpeed alone would clip at 1.0 when
    the key is absent)."""
    zero_optimization: ZeroConfig = ZeroConfig()
    """ZeRO."""
    bf16: Bf16Config | None = None
    """Training in bfloat16."""
    fp16: Fp16Config | None = None
    """Training in float16."""
    data_types: DataTypesConfig | None = None
    """Other data types."""
    tensorboard: TensorBoardConfig | None = None
    """TensorBoard."""
    csv_monitor: CsvConfig | None = None
    """CSV files."""
    wandb: WandbConfig | None = None
    """Weights & Biases."""
    comet: CometConfig | None = None
    """Comet."""
    steps_per_print: Count | None = None
    """Steps between DeepSpeed's own lines. null: none."""
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    """DeepSpeed's log level."""
    wall_clock_breakdown: bool = False
    """Whether the time of forward, backward and step is printed."""
    memory_breakdown: bool = False
    """Whether memory use is printed at start-up."""
    dump_state: bool = False
    """Whether the engine's state is printed at start-up."""
    disable_python_gc: bool = False
    """Whether Python's garbage collector is off in training."""
    flops_profiler: FlopsProfilerConfig | None = None
    """Profile of one step."""
    comms_logger: CommsLoggerConfig | None = None
    """Times of collective operations."""
    timers: TimersConfig | None = None
    """Timers."""
    activation_checkpointing: ActivationCheckpointingConfig | None = None
    """Details of activation checkpointing."""
