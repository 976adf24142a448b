"""The layers of a block, but for MoE."""
