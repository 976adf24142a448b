"""The keys that Magnetar refuses, and why: DeepSpeed's own, and those of earlier versions."""

_OFFLOAD = (
    "of DeepSpeed's offloading only `zero_optimization.offload_optimizer` to `cpu` is proven: "
    "remove it, and use that, or ZeRO 3"
)
_PARALLEL = (
    "Magnetar has data and expert parallelism: remove it, and set `magnetar.model.moe.ep_size`"
)
_GONE = "this version of DeepSpeed no longer has it: remove it"
_NOTHING = "this version of DeepSpeed does nothing with it: remove it"
_LOW_STATES = "master weights and optimizer states stay in float32: remove it"
_ONE_CLIPPING = "clipping has one key, `gradient_clipping`: use that"
_CHECKPOINTS = "Magnetar writes and reads checkpoints itself, for any number of ranks: remove it"

# Section of the keys -> reason -> keys.
_REASONS: dict[str, dict[str, str]] = {
    "magnetar.model.moe": {
        "rows take one all-to-all; docs/tried-and-left-out.md has what was measured of the "
        "other ways: remove it": "exchange exchange_chunks",
    },
    "": {
        "the schedule has one key, `magnetar.training.lr_schedule`: move it there": "scheduler",
        "only bf16 and fp16 are proven to keep the numbers: use `bf16.enabled` with ZeRO 1, 2 or "
        "3": "amp torch_autocast",
        "it is the old name of `bf16`: use `bf16`": "bfloat16",
        "it changes how gradients are averaged, on which SparseClip's norm depends: remove it": (
            "communication_data_type prescale_gradients gradient_predivide_factor "
            "gradient_allreduce_op"
        ),
        _PARALLEL: (
            "seq_parallel_communication_data_type pipeline tensor_parallel sequence_parallel_size "
            "use_data_before_expert_parallelism"
        ),
        _GONE: (
            "sparse_gradients progressive_layer_drop eigenvalue quantize_training "
            "compression_training elasticity nebula sparse_attention graph_harvesting"
        ),
        "Magnetar relies on DeepSpeed's own counting: remove it": "managed_gradient_accumulation",
        _NOTHING: "disable_allgather",
        "it is an old name: use `zero_optimization.allgather_bucket_size`": "allgather_size",
        "Magnetar reads its data itself (`magnetar.data`): remove it": (
            "data_efficiency data_sampling data_routing curriculum_learning random_ltd "
            "dataloader_drop_last"
        ),
        "use `magnetar.model.vocab_size`": "vocabulary_size",
        "a run's values are those of its file: remove it, and try others with --set": "autotuning",
        "it is meant for reinforcement learning: remove it": "hybrid_engine",
        "it is meant for inference: remove it": "weight_quantization",
        "it follows from the number of ranks: remove it": "data_parallel_size",
        "experts have one section, `magnetar.model.moe`: use its `ep_size`": "expert_parallel",
        _OFFLOAD: "zenflow zero_force_ds_cpu_optimizer aio",
        "it follows from `optimizer.type`: remove it": "zero_allow_untested_optimizer",
        "DeepSpeed's compiled engine is not proven: remove it, and use "
        "`magnetar.training.compile`": "compile",
        _CHECKPOINTS: "checkpoint datastates_ckpt",
        "DeepSpeed silently ignores it: put `tensorboard`, `csv_monitor`, `wandb` or `comet` at "
        "the top level": "monitor_config",
    },
    "activation_checkpointing": {
        "it belongs to activations divided among model-parallel ranks, of which Magnetar has "
        "none: remove it": (
            "partition_activations contiguous_memory_optimization number_checkpoints"
        ),
        "DeepSpeed 0.19.8 empties what it has moved: on a CPU the copy as well, elsewhere what "
        "later layers read (an encoder's output): remove it": "cpu_checkpointing",
    },
    "optimizer": {
        "it only acts under fp16 without ZeRO, which is refused: remove it": "legacy_fusion",
    },
    "optimizer.params": {
        _ONE_CLIPPING: "max_grad_norm percentile_clipping",
        "DeepSpeed's fused Adam does not have it: remove it": "amsgrad",
        "the kernel is chosen by `torch_adam`: use that": "fused",
        "PyTorch chooses the fastest form by itself: remove it": "foreach",
        "it follows from `optimizer.type` (`AdamW8bit`): remove it": "optim_bits",
        "`AdamW8bit` always is: remove it": "block_wise",
        "states in host memory have one key, `zero_optimization.offload_optimizer`, with type "
        "`AdamW`: remove it": "is_paged",
        "Adam here always corrects its bias: remove it": "bias_correction",
        _OFFLOAD: "fp32_optimizer_states",
    },
    "data_types": {
        "the type of the weights follows from `bf16` and `fp16`: remove it": "param_dtype",
        "buffers keep the type that the model gave them: remove it": "buffer_dtype",
        "the model chooses which buffers stay in float32: remove it": "keep_in_fp32_modules",
    },
    "bf16": {
        "this order of gradient updates is not proven: remove it": "immediate_grad_update",
        _LOW_STATES: "bf16_master_weights_and_grads bf16_optimizer_states",
    },
    "fp16": {
        _LOW_STATES: "fp16_master_weights_and_grads",
        "Magnetar's inputs are token numbers: remove it": "auto_cast",
    },
    "comet": {
        "a key does not belong in a file that is saved with each checkpoint: set the environment "
        "variable COMET_API_KEY": "api_key",
    },
    "zero_optimization": {
        _OFFLOAD: (
            "offload_param cpu_offload cpu_offload_param cpu_offload_use_pin_memory zenflow"
        ),
        "it reorders the gradients of ZeRO 1 and 2, which is not proven: remove it": (
            "round_robin_gradients"
        ),
        "quantised communication changes the numbers: remove it": (
            "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"
        ),
        _GONE: ("zeropp_loco_param mics_shard_size mics_hierarchical_params_gather legacy_stage1"),
        "DeepSpeed 0.19.8 refuses a second partition where there are MoE layers: remove it": (
            "zero_hpz_partition_size"
        ),
        _CHECKPOINTS: (
            "load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint "
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"
        ),
        "it checks DeepSpeed itself, at the cost of speed: remove it": "enable_sanity_checks",
        "it is for models that are built under DeepSpeed's zero.Init: remove it": (
            "override_module_apply"
        ),
        "Muon is not supported: remove it": "save_muon_momentum_buffer_in_memory",
        "Magnetar's layers are collected one module at a time: remove it, and set "
        "`stage3_prefetch_bucket_size` to collect more ahead": (
            "leaf_module stage3_module_granularity_threshold"
        ),
    },
    "zero_optimization.offload_optimizer": {
        "optimizer states on a disk are not proven: remove it, and use device `cpu`": (
            "nvme_path buffer_count pipeline_read pipeline_write fast_init"
        ),
        "a second optimizer would update a part of the parameters, for which SparseClip is not "
        "proven: remove it": "ratio super_offload cpuadam_cores_perc",
    },
}

# Names of DeepSpeed's own fields, whose keys have a prefix in JSON.
_WITHOUT_PREFIX = (
    "prefetch_bucket_size param_persistence_threshold model_persistence_threshold "
    "max_live_parameters max_reuse_distance gather_16bit_weights_on_model_save "
    "module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential"
)

REFUSED: dict[str, str] = {
    f"{section}.{name}".removeprefix("."): reason
    for section, reasons in _REASONS.items()
    for reason, names in reasons.items()
    for name in names.split()
} | {
    f"zero_optimization.{name}": f"its name in JSON has a prefix: see `stage3_{name}`"
    for name in _WITHOUT_PREFIX.split()
}

VALUE_REASONS: dict[str, str] = {
    "optimizer.type": "SparseClip is proven with Adam's update only: use one of these",
    "zero_optimization.offload_optimizer.device": "optimizer states on a disk are not proven: use "
    "`cpu`",
}
