"""The keys of DeepSpeed's own JSON that Magnetar supports; `refused_keys` has the others.

They are models of ours, so that types are strict and each key has a description. The tests hold
them against the installed DeepSpeed: same names, same defaults, and no key that DeepSpeed reads is
missing from both files.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from magnetar.models.moe.config import StrictModel


def _whole(value: Any) -> Any:
    """5e8 is how people write sizes; JSON makes a float of it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, BeforeValidator(_whole)]

MAX_BATCH = 1 << 20  # sequences; a step of more would never end
EIGHT_BIT = "AdamW8bit"  # bitsandbytes' name; the type that DeepSpeed does not know


class AdamParams(StrictModel):
    """What `optimizer.params` may hold."""

    lr: float = Field(
        gt=0,
        description="Learning rate at the top of the schedule (`magnetar.training.lr_schedule`).",
    )
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = Field(default=(0.9, 0.999), description="Decay of the running mean and square.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    adam_w_mode: bool = Field(
        default=True,
        description="true: decoupled weight decay. false: L2 penalty in the gradient, only with "
        "type `Adam`.",
    )
    torch_adam: bool | None = Field(
        default=None,
        description="Of types `Adam` and `AdamW`. null or true: PyTorch's fused Adam. false: "
        "DeepSpeed's, which is compiled at its first use.",
    )
    min_8bit_size: int | None = Field(
        default=None,
        ge=1,
        description="Only with type `AdamW8bit`: elements from which on a tensor (of an expert: "
        "its own) has moments of 8 bits; smaller ones keep float32. null: 4096, bitsandbytes' own.",
    )


class OptimizerConfig(StrictModel):
    """The optimizer."""

    type: Literal["Adam", "AdamW", "AdamW8bit"] = Field(
        description="`Adam` and `AdamW` decouple the weight decay unless `params.adam_w_mode` is "
        "false. `AdamW8bit`: AdamW of the package bitsandbytes, whose moments take 2 bytes a "
        "parameter instead of 8 (block-wise, arXiv 2110.02861). The embeddings' moments stay in "
        "float32, as in that paper's stable embedding; its other half, Xavier-uniform weights and "
        "a LayerNorm, is `magnetar.model.stable_embedding`, which the paper recommends with it."
    )
    params: AdamParams = Field(description="The optimizer's numbers.")


class OffloadConfig(StrictModel):
    """Where the optimizer's states are and its update is computed (ZeRO-Offload)."""

    device: Literal["none", "cpu"] = Field(
        default="none",
        description="`cpu`: in host memory, under ZeRO 1, 2 or 3. The update is PyTorch's "
        "Adam or, with `torch_adam` false, DeepSpeed's CPU Adam.",
    )
    pin_memory: bool = Field(
        default=True, description="Page-locked memory: faster to copy, and never swapped out."
    )


class ZeroConfig(StrictModel):
    """ZeRO: what is divided among the data-parallel ranks."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="0: nothing is divided. 1: the optimizer's states. 2: gradients too. 3: "
        "weights too.",
    )
    contiguous_gradients: bool = Field(
        default=True, description="Copy gradients into one buffer as they appear."
    )
    reduce_scatter: bool = Field(
        default=True, description="Average gradients by reduce-scatter instead of all-reduce."
    )
    reduce_bucket_size: Size = Field(
        default=500_000_000, gt=0, description="Elements reduced at a time."
    )
    use_multi_rank_bucket_allreduce: bool = Field(
        default=True, description="One all-reduce for the buckets of several ranks."
    )
    allgather_partitions: bool = Field(
        default=True, description="Collect updated weights by all-gather, not by broadcasts."
    )
    allgather_bucket_size: Size = Field(
        default=500_000_000, gt=0, multiple_of=2, description="Elements gathered at a time."
    )
    overlap_comm: bool | None = Field(
        default=None, description="Reduce gradients during the backward pass. null: false."
    )
    compute_grad_norm: bool = Field(
        default=True, description="Must stay true: clipping and the logs read this norm."
    )
    ignore_unused_parameters: bool = Field(
        default=True, description="false: under stage 2, stop when a parameter has no gradient."
    )
    load_from_fp32_weights: bool = Field(
        default=True, description="On resuming, take master weights from their float32 copies."
    )
    offload_optimizer: OffloadConfig | None = Field(
        default=None, description="Optimizer states in host memory. null: on the device."
    )
    sub_group_size: Size = Field(
        default=1_000_000_000,
        ge=0,
        description="Stage 3: elements of a rank that are updated at a time.",
    )
    stage3_prefetch_bucket_size: Size = Field(
        default=50_000_000, ge=0, description="Stage 3: elements collected ahead of their use."
    )
    stage3_param_persistence_threshold: Size = Field(
        default=100_000,
        ge=0,
        description="Stage 3: parameters of so many elements or fewer stay whole between uses.",
    )
    stage3_model_persistence_threshold: Size | None = Field(
        default=None, ge=0, description="Stage 3: most elements that stay whole. null: no limit."
    )
    stage3_max_live_parameters: Size = Field(
        default=1_000_000_000,
        ge=0,
        description="Stage 3: most elements that a rank holds whole at a time.",
    )
    stage3_max_reuse_distance: Size = Field(
        default=1_000_000_000,
        ge=0,
        description="Stage 3: a parameter that is used again within so many elements stays whole.",
    )
    stage3_allgather_sequential: bool = Field(
        default=False,
        description="Stage 3: collect one parameter after the other: less memory, slower.",
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(
        default=False, description="Stage 3: collect parameters by all-reduce, not by all-gather."
    )
    memory_efficient_linear: bool = Field(
        default=True, description="Stage 3: DeepSpeed's matrix product in place of PyTorch's."
    )
    log_trace_cache_warnings: bool = Field(
        default=False,
        description="Stage 3: say when modules run in another order than was foreseen.",
    )
    parameter_alignment: bool | None = Field(
        default=None,
        description="Let every parameter start at a multiple of 16 bytes. null: true for a MoE "
        "model under stage 1 or 2, else false.",
    )


class Bf16Config(StrictModel):
    """Weights and activations in bfloat16, master weights in float32."""

    enabled: bool = Field(default=False, description="Needs ZeRO stage 1, 2 or 3.")
    check_grad_overflow: bool = Field(
        default=True, description="Skip a step whose gradients are not finite."
    )


class Fp16Config(StrictModel):
    """Weights and activations in float16, with a scaled loss."""

    enabled: bool = Field(default=False, description="Needs ZeRO stage 1, 2 or 3.")
    loss_scale: float = Field(default=0.0, ge=0, description="0: found while training.")
    initial_scale_power: int = Field(
        default=16, ge=0, le=127, description="The first loss scale is 2 to this power."
    )
    loss_scale_window: int = Field(
        default=1000, ge=1, description="Steps without overflow before the scale doubles."
    )
    hysteresis: int = Field(default=2, ge=1, description="Overflows before the scale halves.")
    consecutive_hysteresis: bool = Field(
        default=False, description="Count only overflows in a row."
    )
    min_loss_scale: int = Field(default=1, ge=1, description="The scale goes no lower.")


class DataTypesConfig(StrictModel):
    """Data types beyond bf16 and fp16."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="Type in which gradients accumulate. null: the type of the weights.",
    )


class TensorBoardConfig(StrictModel):
    """TensorBoard."""

    enabled: bool = Field(default=False, description="Write event files.")
    output_path: str = Field(default="", description="Empty: a folder in the run's folder.")
    job_name: str = Field(default="DeepSpeedJobName", description="Subfolder of output_path.")


class CsvConfig(StrictModel):
    """CSV files, one for each metric."""

    enabled: bool = Field(default=False, description="Write CSV files.")
    output_path: str = Field(default="", description="Empty: a folder in the run's folder.")
    job_name: str = Field(default="DeepSpeedJobName", description="Subfolder of output_path.")


class WandbConfig(StrictModel):
    """Weights & Biases (its package must be installed)."""

    enabled: bool = Field(default=False, description="Send metrics.")
    group: str | None = Field(default=None, description="Group of runs.")
    team: str | None = Field(default=None, description="Team.")
    project: str = Field(default="deepspeed", description="Project.")


class CometConfig(StrictModel):
    """Comet (its package must be installed)."""

    enabled: bool = Field(default=False, description="Send metrics.")
    samples_log_interval: int = Field(
        default=100, ge=1, description="Samples between two submissions."
    )
    project: str | None = Field(default=None, description="Project.")
    workspace: str | None = Field(default=None, description="Workspace.")
    experiment_name: str | None = Field(default=None, description="Name of the experiment.")
    experiment_key: str | None = Field(default=None, description="Key of the experiment.")
    online: bool | None = Field(default=None, description="false: keep the data on disk.")
    mode: Literal["get", "create", "get_or_create"] | None = Field(
        default=None, description="How the experiment is opened."
    )


class CommsLoggerConfig(StrictModel):
    """Times of the collective operations."""

    enabled: bool = Field(default=False, description="Record them.")
    prof_all: bool = Field(default=True, description="Every operation, not only prof_ops.")
    prof_ops: list[str] = Field(default=[], description="Names of the operations to record.")
    verbose: bool = Field(default=False, description="Print each one.")
    debug: bool = Field(default=False, description="Name the calling function too.")


class FlopsProfilerConfig(StrictModel):
    """DeepSpeed's profile of one training step."""

    enabled: bool = Field(default=False, description="Profile a step.")
    recompute_fwd_factor: float = Field(
        default=0.0, ge=0, description="Share of the forward pass that is computed again."
    )
    profile_step: int = Field(default=1, ge=1, description="Which step.")
    module_depth: int = Field(default=-1, ge=-1, description="Depth shown. -1: all.")
    top_modules: int = Field(default=1, ge=1, description="Modules shown at each depth.")
    detailed: bool = Field(default=True, description="Print the whole tree.")
    output_file: str | None = Field(default=None, description="null: standard output.")


class ThroughputTimerConfig(StrictModel):
    """DeepSpeed's throughput timer."""

    enabled: bool = Field(default=True, description="Measure.")
    synchronized: bool = Field(
        default=True, description="Wait for the device first: exact, and a little slower."
    )


class TimersConfig(StrictModel):
    """Timers."""

    throughput: ThroughputTimerConfig = Field(
        default=ThroughputTimerConfig(), description="The throughput timer."
    )


class ActivationCheckpointingConfig(StrictModel):
    """Activation checkpointing; `magnetar.training.activation_checkpointing` switches it on."""

    synchronize_checkpoint_boundary: bool = Field(
        default=False, description="Wait for the device before and after each layer."
    )
    profile: bool = Field(default=False, description="Print the time of each layer.")


class CheckpointConfig(StrictModel):
    """Checkpoints."""

    tag_validation: Literal["Ignore", "Warn", "Fail"] = Field(
        default="Warn", description="What happens when ranks disagree on a checkpoint's name."
    )


class DeepSpeedKeys(StrictModel):
    """DeepSpeed's top-level keys."""

    train_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BATCH,
        description="Sequences in one optimizer step, over all ranks. It equals "
        "train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks; leave out "
        "whichever should follow from the others.",
    )
    train_micro_batch_size_per_gpu: int | None = Field(
        default=None, ge=1, le=MAX_BATCH, description="Sequences in one forward pass of one rank."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BATCH,
        description="Forward passes of a rank in one optimizer step.",
    )
    optimizer: OptimizerConfig = Field(description="The optimizer.")
    gradient_clipping: float = Field(
        default=0.0,
        ge=0,
        le=1e30,
        description="Threshold of the gradient norm, SparseClip's xi; needed unless "
        "`magnetar.sparse_clip.enabled` is false. 0: no clipping (DeepSpeed alone would "
        "clip at 1.0 when the key is absent).",
    )
    zero_optimization: ZeroConfig = Field(default=ZeroConfig(), description="ZeRO.")
    bf16: Bf16Config | None = Field(default=None, description="Training in bfloat16.")
    fp16: Fp16Config | None = Field(default=None, description="Training in float16.")
    data_types: DataTypesConfig | None = Field(default=None, description="Other data types.")
    tensorboard: TensorBoardConfig | None = Field(default=None, description="TensorBoard.")
    csv_monitor: CsvConfig | None = Field(default=None, description="CSV files.")
    wandb: WandbConfig | None = Field(default=None, description="Weights & Biases.")
    comet: CometConfig | None = Field(default=None, description="Comet.")
    steps_per_print: int | None = Field(
        default=None, ge=1, description="Steps between DeepSpeed's own lines. null: none."
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = Field(
        default=None, description="DeepSpeed's log level."
    )
    wall_clock_breakdown: bool = Field(
        default=False, description="Print the time of forward, backward and step."
    )
    memory_breakdown: bool = Field(default=False, description="Print memory use at start-up.")
    dump_state: bool = Field(default=False, description="Print the engine's state at start-up.")
    disable_python_gc: bool = Field(
        default=False, description="Turn Python's garbage collector off while training."
    )
    flops_profiler: FlopsProfilerConfig | None = Field(default=None, description="A profile.")
    comms_logger: CommsLoggerConfig | None = Field(
        default=None, description="Times of collective operations."
    )
    timers: TimersConfig | None = Field(default=None, description="Timers.")
    checkpoint: CheckpointConfig | None = Field(default=None, description="Checkpoints.")
    activation_checkpointing: ActivationCheckpointingConfig | None = Field(
        default=None, description="How activation checkpointing is done."
    )
