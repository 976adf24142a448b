"""Optimizers and the states that they keep."""
