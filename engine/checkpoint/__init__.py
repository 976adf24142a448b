"""Checkpoints and run folders: their format, writing, reading and opening."""
