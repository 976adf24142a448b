"""The dense parts of a model under torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.block import Block
from models.moe import MoE

MAX_VERSIONS = 64  # of what all blocks share: dense or sparse, first or last, other sizes


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself, in training: attention, norms, residuals, dense networks.

    Blocks of a kind share what is compiled, when the first of them is called. MoE layers stay as
    they are: their kernels are this project's own, and their sizes those of the routing.
    """
    torch._dynamo.config.recompile_limit = MAX_VERSIONS
    for block in model.modules():
        if isinstance(block, Block):
            if isinstance(block.ffn, MoE):
                _set_forward(block.ffn, torch.compiler.disable(block.ffn.forward))
            _set_forward(block, _compiled_in_training(block))


def _compiled_in_training(block: Block) -> Callable[..., Any]:
    plain, compiled = block.forward, torch.compile(block.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else plain)(*args, **kwargs)

    return forward


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward
