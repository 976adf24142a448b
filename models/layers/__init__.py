"""The layers of a block; models/moe has the MoE layer."""
