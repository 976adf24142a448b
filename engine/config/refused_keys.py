"""The keys that Magnetar refuses, and why: DeepSpeed's own, and those of earlier versions."""

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
_ONE_ALL_TO_ALL = (
    "rows take one all-to-all (docs/tried-and-left-out.md has what was measured of the other "
    "ways): remove it"
)

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
    "magnetar.model.moe.exchange": _ONE_ALL_TO_ALL,
    "magnetar.model.moe.exchange_chunks": _ONE_ALL_TO_ALL,
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
    "zero_allow_untested_optimizer": "it follows from `optimizer.type`: remove it",
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
    "optimizer.params.optim_bits": "it follows from `optimizer.type` (`AdamW8bit`): remove it",
    "optimizer.params.percentile_clipping": "clipping has one key, `gradient_clipping`: use that",
    "optimizer.params.block_wise": "`AdamW8bit` always is: remove it",
    "optimizer.params.is_paged": "states in host memory have one key, "
    "`zero_optimization.offload_optimizer`, with type `AdamW`: remove it",
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
