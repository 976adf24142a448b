"""The engine: configuration, DeepSpeed, SparseClip, the training loop, checkpoints."""
