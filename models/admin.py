"""Admin (arXiv 2004.08249): omegas from a profile of the initial model, and folding them away.

Letters: B batch, T tokens, D d_model.

A sublayer is x <- LN(omega * x + f(x)) with a vector omega (D,). The profile is the variance of
every f_i(x) in the untrained model with omega = 1; then

    omega_1 = 1,   omega_{i+1} = sqrt(Var(x_0) + Var(f_1) + ... + Var(f_i))

in each stack, x_0 its embedding. After training, omega_i goes into the LayerNorm before sublayer
i and its inverse into the matrices that read that LayerNorm: Post-LN with the same function.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from magnetar.models.block import Block
from magnetar.models.config import ModelConfig
from magnetar.models.layers.multiway import pools
from magnetar.models.layers.norms import Residual
from magnetar.models.moe.layer import MoE
from magnetar.models.moe.router import XMoERouter
from magnetar.models.transformer import Transformer, empty_model

SUBLAYERS = ("attention", "cross_attention", "ffn")
# Folding divides by omega. In float32 a residual weight of this size adds as little as 0 does.
MIN_OMEGA = 1e-12


def stacks(model: nn.Module) -> dict[str, Transformer]:
    """The stacks of a model by name: "encoder" and "decoder", or the one that it has."""
    if isinstance(model, Transformer):
        return {model.config.architecture: model}
    return {name: part for name, part in model.named_children() if isinstance(part, Transformer)}


def sublayers(stack: Transformer) -> Iterator[tuple[nn.Module, Residual]]:
    """Every sublayer of a stack with its residual, in the order of the residual stream."""
    for block in stack.blocks:
        assert isinstance(block, Block)
        for name in SUBLAYERS:
            module = getattr(block, name)
            if module is not None:
                yield module, getattr(block, f"{name}_residual")


@contextmanager
def recorded_moments(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum up what the forward passes inside produce.

    Yields:
        (1 + number of sublayers, 3) float64 for each stack: count, sum and sum of squares of the
        numbers in the embedding and in every sublayer's output. They add up over batches and ranks.
    """
    moments = {}
    hooks = []

    def watch(row: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, output: Any = None) -> None:
            value = arguments[0] if output is None else output
            value = (value[0] if isinstance(value, tuple) else value).detach().double()
            row.add_(torch.stack([value.new_tensor(value.numel()), value.sum(), (value**2).sum()]))

        return hook

    for name, stack in stacks(model).items():
        pairs = list(sublayers(stack))
        table = torch.zeros(
            1 + len(pairs), 3, dtype=torch.float64, device=stack.embedding.weight.device
        )
        moments[name] = table
        hooks.append(stack.blocks[0].register_forward_pre_hook(watch(table[0])))
        for row, (module, _) in zip(table[1:], pairs, strict=True):
            hooks.append(module.register_forward_hook(watch(row)))
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def variances(moments: Tensor) -> list[float]:
    """The variances of the embedding and of every sublayer, from (1 + sublayers, 3) moments."""
    counts, sums, squares = moments.unbind(1)
    return (squares / counts - (sums / counts) ** 2).tolist()


def omegas(profile: list[float]) -> list[float]:
    """The omega of every sublayer of a stack, from the variances of embedding and sublayers."""
    return [1.0, *map(math.sqrt, list(accumulate(profile[:-1]))[1:])]


def set_omegas(model: nn.Module, profile: dict[str, list[float]]) -> None:
    """Start every omega at its profiled value.

    Args:
        model: model with norm "admin".
        profile: variances of the embedding and the sublayers of each stack, by its name.
    """
    for name, stack in stacks(model).items():
        residuals = [residual for _, residual in sublayers(stack)]
        for residual, value in zip(residuals, omegas(profile[name]), strict=True):
            assert residual.omega is not None
            nn.init.constant_(residual.omega, value)


@torch.no_grad()
def fold_admin(
    config: ModelConfig, tensors: dict[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Post-LN model with the function of an Admin model.

    If no LayerNorm precedes the first sublayer, the embedding itself is scaled. Then it can no
    longer be tied to the output projection or to the other stack, and computed positions become a
    table.

    Args:
        config: config of a model with norm "admin".
        tensors: state dict of the model, tied tensors at least once.

    Returns:
        Config and float32 state dict of the folded model.

    Raises:
        ValueError: if the model is not an Admin model, or an omega is no number.
    """
    if config.norm != "admin":
        raise ValueError(
            f"norm={config.norm!r} has no omega to fold: give a model with norm 'admin'"
        )
    model = empty_model(config)
    model.load_state_dict(tensors, strict=False)
    model.double()
    changes: dict[str, Any] = {"norm": "post"}
    folded: dict[str, Tensor] = {}
    for name, stack in stacks(model).items():
        prefix = "" if stack is model else f"{name}."
        producer = stack.embedding_norm
        for index, (module, residual) in enumerate(sublayers(stack)):
            assert residual.omega is not None
            if not residual.omega.isfinite().all():
                raise ValueError(
                    f"omega of sublayer {index + 1} of the {name} is not finite: this model has "
                    "diverged, use an earlier checkpoint"
                )
            omega = residual.omega.abs().clamp_min(MIN_OMEGA)
            omega = torch.where(residual.omega < 0, -omega, omega)
            if producer is not None:
                _scale_norm(producer, omega)
            else:
                folded |= _scale_embedding(stack, omega, prefix, changes)
            _scale_inputs(module, 1.0 / omega)
            producer = residual.norm
    state = {name: t for name, t in model.state_dict().items() if not name.endswith(".omega")}
    # float32, since rounding the folded weights to 16 bits would change the function.
    state = {name: tensor.float() for name, tensor in (state | folded).items()}
    return config.model_copy(update=changes), state


def _scale_norm(norm: nn.Module, omega: Tensor) -> None:
    """Multiply the output of a LayerNorm (of each of its pools) by omega."""
    for _, pool in pools(norm, ""):
        pool.weight *= omega  # type: ignore[operator]
        if getattr(pool, "bias", None) is not None:
            pool.bias *= omega  # type: ignore[operator]


def _scale_embedding(
    stack: Transformer, omega: Tensor, prefix: str, changes: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors that multiply a stack's embedding by omega; adds the keys that change."""
    scaled = {}
    if stack.token_norm is not None:
        _scale_norm(stack.token_norm, omega)
    else:
        changes |= {"tie_embeddings": False}
        if stack.config.share_embeddings:
            changes |= {"share_embeddings": False}
        scaled[f"{prefix}embedding.weight"] = stack.embedding.weight * omega
    table = stack.sinusoids if stack.positions is None else stack.positions.weight
    if table is not None:
        changes |= {"positions": "learned"}
        scaled[f"{prefix}positions.weight"] = table * omega
    return scaled


def _scale_inputs(module: nn.Module, factor: Tensor) -> None:
    """Multiply the input of a sublayer's first matrices, column by column."""
    if isinstance(module, MoE):
        gate, experts = module.deepspeed_moe.gate, module.deepspeed_moe.experts
        router = "projection" if isinstance(gate, XMoERouter) else "wg"
        gate.get_parameter(f"{router}.weight").mul_(factor)
        for name in ("w1", "w3"):
            weight = getattr(experts, name, None)
            if weight is not None:
                weight *= factor.unsqueeze(-1)  # (L, D, F)
        shared = module.shared
        if shared is not None:
            for matrix in (shared.w1, shared.w3, shared.weight_proj):
                if matrix is not None:
                    matrix.weight *= factor
        return
    for name in ("qkv_proj", "q_proj"):
        if hasattr(module, name):
            module = getattr(module, name)
            break
    for _, pool in pools(module, ""):
        for linear in (pool,) if isinstance(pool, nn.Linear) else (pool.w1, pool.w3):
            if linear is not None:
                linear.weight *= factor  # type: ignore[operator, union-attr]
