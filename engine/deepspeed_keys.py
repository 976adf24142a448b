"""The keys of DeepSpeed's own JSON: those Magnetar supports, and those it refuses and why.

The supported keys are models of ours, so that types are strict and each key has a description.
The tests hold them against the installed DeepSpeed: same names, same defaults, and no key that
DeepSpeed reads is missing from both lists.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from models.config import StrictModel


def _whole(value: Any) -> Any:
    """5e8 is how people write sizes; JSON makes a float of it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, BeforeValidator(_whole)]


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
    torch_adam: bool = Field(
        default=False,
        description="true: PyTorch's Adam. false: DeepSpeed's fused kernel, which is compiled at "
        "its first use.",
    )


class OptimizerConfig(StrictModel):
    """The optimizer."""

    type: Literal["Adam", "AdamW"] = Field(
        description="Both decouple the weight decay unless `params.adam_w_mode` is false."
    )
    params: AdamParams = Field(description="The optimizer's numbers.")


class OffloadConfig(StrictModel):
    """Where the optimizer's states are and its update is computed (ZeRO-Offload)."""

    device: Literal["none", "cpu"] = Field(
        default="none",
        description="`cpu`: in host memory, under ZeRO 1, 2 or 3. The update is DeepSpeed's CPU "
        "Adam, compiled at its first use, or PyTorch's with `torch_adam`.",
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
        default=500_000_000, gt=0, description="Elements gathered at a time."
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
        default=16, ge=0, description="The first loss scale is 2 to this power."
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
        description="Sequences in one optimizer step, over all ranks. It equals "
        "train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks; leave out "
        "whichever should follow from the others.",
    )
    train_micro_batch_size_per_gpu: int | None = Field(
        default=None, ge=1, description="Sequences in one forward pass of one rank."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None, ge=1, description="Forward passes of a rank in one optimizer step."
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


_GONE = "this version of DeepSpeed no longer has it: remove it"
_PRECISION = (
    "only bf16 and fp16 are proven to keep the numbers: use `bf16.enabled` with ZeRO 1, 2 or 3"
)
_REDUCTION = "it changes how gradients are averaged, on which SparseClip's norm depends: remove it"
_LOADER = "Magnetar reads its data itself (`magnetar.data`): remove it"
_CHECKPOINTS = "checkpoints are written and read by Magnetar, not by DeepSpeed: remove it"
_LEAVES = (
    "Magnetar's layers are collected one module at a time: remove it, and set "
    "`stage3_prefetch_bucket_size` to collect more ahead"
)
_NVME = "optimizer states on a disk are not proven: remove it, and use device `cpu`"
_PARTIAL = (
    "a second optimizer would update a part of the parameters, for which SparseClip is not "
    "proven: remove it"
)
_OFFLOAD = (
    "of DeepSpeed's offloading only `zero_optimization.offload_optimizer` to `cpu` is proven: "
    "remove it, and use that, or ZeRO 3"
)
_QUANTISED = "quantised communication changes the numbers: remove it"
_PARALLEL = (
    "Magnetar has data and expert parallelism: remove it, and set `magnetar.model.moe.ep_size`"
)
_MODEL_PARALLEL = (
    "it belongs to activations divided among model-parallel ranks, of which Magnetar has none: "
    "remove it"
)
_LOW_STATES = "master weights and optimizer states stay in float32: remove it"

# DeepSpeed's fields have names without the prefix of their keys.
_PREFIXED = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

REFUSED: dict[str, str] = {
    "scheduler": "the schedule has one key, `magnetar.training.lr_schedule`: move it there",
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "bfloat16": "it is the old name of `bf16`: use `bf16`",
    "communication_data_type": _REDUCTION,
    "seq_parallel_communication_data_type": _PARALLEL,
    "prescale_gradients": _REDUCTION,
    "gradient_predivide_factor": _REDUCTION,
    "gradient_allreduce_op": _REDUCTION,
    "sparse_gradients": _GONE,
    "managed_gradient_accumulation": "Magnetar relies on DeepSpeed's own counting: remove it",
    "disable_allgather": "this version of DeepSpeed does nothing with it: remove it",
    "allgather_size": "it is an old name: use `zero_optimization.allgather_bucket_size`",
    "data_efficiency": _LOADER,
    "data_sampling": _LOADER,
    "data_routing": _LOADER,
    "curriculum_learning": _LOADER,
    "random_ltd": _LOADER,
    "dataloader_drop_last": _LOADER,
    "vocabulary_size": "use `magnetar.model.vocab_size`",
    "progressive_layer_drop": _GONE,
    "eigenvalue": _GONE,
    "quantize_training": _GONE,
    "compression_training": _GONE,
    "elasticity": _GONE,
    "nebula": _GONE,
    "sparse_attention": _GONE,
    "graph_harvesting": _GONE,
    "autotuning": "a run's values are those of its file: remove it, and try others with --set",
    "hybrid_engine": "it is meant for reinforcement learning: remove it",
    "weight_quantization": "it is meant for inference: remove it",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": "it follows from the number of ranks: remove it",
    "expert_parallel": "experts have one section, `magnetar.model.moe`: use its `ep_size`",
    "use_data_before_expert_parallelism": _PARALLEL,
    "zenflow": _OFFLOAD,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "zero_allow_untested_optimizer": "only Adam and AdamW are supported: remove it",
    "aio": _OFFLOAD,
    "activation_checkpointing.partition_activations": _MODEL_PARALLEL,
    "activation_checkpointing.contiguous_memory_optimization": _MODEL_PARALLEL,
    "activation_checkpointing.number_checkpoints": _MODEL_PARALLEL,
    "activation_checkpointing.cpu_checkpointing": "DeepSpeed 0.19.8 empties what it has moved: on "
    "a CPU the copy as well, elsewhere what later layers read (an encoder's output): remove it",
    "compile": "compiled models are not proven: remove it",
    "datastates_ckpt": "checkpoints are written by DeepSpeed's usual writer: remove it",
    "monitor_config": "DeepSpeed silently ignores it: put `tensorboard`, `csv_monitor`, `wandb` or "
    "`comet` at the top level",
    "optimizer.legacy_fusion": "it only acts under fp16 without ZeRO, which is refused: remove it",
    "optimizer.params.max_grad_norm": "clipping has one key, `gradient_clipping`: use that",
    "optimizer.params.amsgrad": "DeepSpeed's fused Adam does not have it: remove it",
    "optimizer.params.fused": "the kernel is chosen by `torch_adam`: use that",
    "optimizer.params.foreach": "PyTorch chooses the fastest form by itself: remove it",
    "optimizer.params.bias_correction": "Adam here always corrects its bias: remove it",
    "optimizer.params.fp32_optimizer_states": _OFFLOAD,
    "data_types.param_dtype": "the type of the weights follows from `bf16` and `fp16`: remove it",
    "data_types.buffer_dtype": "buffers keep the type that the model gave them: remove it",
    "data_types.keep_in_fp32_modules": "the model chooses which buffers stay in float32: remove it",
    "bf16.immediate_grad_update": "this order of gradient updates is not proven: remove it",
    "bf16.bf16_master_weights_and_grads": _LOW_STATES,
    "bf16.bf16_optimizer_states": _LOW_STATES,
    "fp16.fp16_master_weights_and_grads": _LOW_STATES,
    "fp16.auto_cast": "Magnetar's inputs are token numbers: remove it",
    "comet.api_key": "a key does not belong in a file that is saved with each checkpoint: set the "
    "environment variable COMET_API_KEY",
    "checkpoint.load_universal": "universal checkpoints do not hold experts: remove it",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder that all nodes see: remove it",
    "checkpoint.parallel_write": "it belongs to pipelines: remove it",
    "checkpoint.checkpoint_serialization": "only the usual format can be resumed: remove it",
    "checkpoint.writer": "only the usual writer is proven: remove it",
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.round_robin_gradients": "it reorders the gradients of ZeRO 1 and 2, which "
    "is not proven: remove it",
    "zero_optimization.zero_quantized_weights": _QUANTISED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_optimization.zero_quantized_gradients": _QUANTISED,
    "zero_optimization.zeropp_loco_param": _GONE,
    "zero_optimization.mics_shard_size": _GONE,
    "zero_optimization.mics_hierarchical_params_gather": _GONE,
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed 0.19.8 refuses a second partition "
    "where there are MoE layers: remove it",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.legacy_stage1": _GONE,
    "zero_optimization.enable_sanity_checks": "it checks DeepSpeed itself, at the cost of speed: "
    "remove it",
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.override_module_apply": "it is for models that are built under DeepSpeed's "
    "zero.Init: remove it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "only Adam and AdamW are supported: "
    "remove it",
    "zero_optimization.leaf_module": _LEAVES,
    "zero_optimization.stage3_module_granularity_threshold": _LEAVES,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    **{
        f"zero_optimization.{name}": f"its name in JSON has a prefix: see `stage3_{name}`"
        for name in _PREFIXED
    },
    **{
        f"zero_optimization.offload_optimizer.{name}": _NVME
        for name in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")
    },
    "zero_optimization.offload_optimizer.ratio": _PARTIAL,
    "zero_optimization.offload_optimizer.super_offload": _PARTIAL,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _PARTIAL,
}

VALUE_REASONS: dict[str, str] = {
    "optimizer.type": "SparseClip is proven with Adam's update only: use one of these",
    "zero_optimization.offload_optimizer.device": "optimizer states on a disk are not proven: use "
    "`cpu`",
}
