"""Triton kernels of the MoE layer."""
