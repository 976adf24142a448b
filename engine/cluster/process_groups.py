"""Leaving the process groups, so that none of their threads outlives Python."""

import gc

import deepspeed.comm as dist

# Imported for its default arguments: they hold the process group of all ranks for good if there is
# one by then, and torch._dynamo, which any optimizer loads, imports this when there is.
import torch.distributed.nn.functional  # noqa: F401

from magnetar.engine.cluster.rendezvous import leave_rendezvous


def leave_distributed() -> None:
    """End what `start_distributed` began, and join the threads of its groups.

    A thread of gloo frees the tensors of a collective a moment after the collective is done, and
    takes Python's lock for that. Python ends a thread that asks for the lock during shutdown, and
    for a C++ thread that is an abort ("terminate called without an active exception",
    status -6; https://github.com/pytorch/pytorch/issues/190489). Only the destructor of a group
    joins its threads. So call this when no engine or model refers to a group any more, that is not
    in the function that made them.
    """
    dist.destroy_process_group()
    leave_rendezvous()
    gc.collect()  # engines and models are cycles
