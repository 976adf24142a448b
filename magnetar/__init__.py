"""Sparse and very deep Transformers on DeepSpeed."""

__version__ = "0.2.0"
