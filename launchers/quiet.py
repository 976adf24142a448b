"""Keeps DeepSpeed from talking in commands that run it in one process."""

import os


def quiet_deepspeed() -> None:
    """Name the accelerator before deepspeed is first imported, so that it need not guess aloud."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
