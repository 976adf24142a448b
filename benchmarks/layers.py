"""The layers that the layer benchmark compares: a shape, a layer ready to run, balanced inputs.

Letters: N tokens, D d_model, E experts, K top_k, R width of the router's space.

The public layers, each measured if its package is installed, get GELU, the same shapes and a
balance loss of the same weight; the notes name the differences. They are patched only where their
packages need it to be imported or to run on a CPU.
"""

import importlib
import importlib.util
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models.layers.feed_forward import FeedForward
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.layer import MoE

AUX_LOSS_WEIGHT = 0.01
MAX_SEQUENCE = 512  # tokens; only how the N tokens are laid out as (sequences, tokens, D)


@dataclass(frozen=True)
class Shape:
    """Sizes, device and type of a measurement."""

    tokens: int
    d_model: int
    d_ff: int
    top_k: int
    num_experts: int
    device: torch.device
    dtype: torch.dtype

    @property
    def useful_flops(self) -> int:
        """FLOPs of the two matrices of K experts a token: once forward, twice that backward."""
        return 12 * self.tokens * self.top_k * self.d_model * self.d_ff

    @property
    def sequences(self) -> int:
        """Number of sequences of equal length that the tokens are divided into."""
        return self.tokens // math.gcd(self.tokens, MAX_SEQUENCE)


@dataclass(frozen=True)
class Scorer:
    """The weights by which a router scores: W x, or e_i . (P x) / ||e_i|| in a narrow space.

    Attributes:
        experts: (E, D), or (E, R) with a projection.
        projection: (R, D), or None: the experts' rows meet the tokens themselves.
    """

    experts: Tensor
    projection: Tensor | None = None

    def load(self, x: Tensor, top_k: int) -> Tensor:
        """(N, D) -> (E,) int64, tokens that choose each expert, nothing dropped."""
        h, experts = x.detach().float(), self.experts.detach().float()
        if self.projection is not None:
            h, experts = h @ self.projection.detach().float().t(), F.normalize(experts, dim=-1)
        chosen = (h @ experts.t()).topk(top_k, dim=-1).indices
        return F.one_hot(chosen.flatten(), experts.size(0)).sum(0)

    @torch.no_grad()
    def balance(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Overwrite the weights, and return the (N, D) tokens whose routing they make even.

        Token t goes to the experts of group t mod (E / K): K experts whose rows are nearly equal,
        in an order that is random. The layer's code is left as it is and pays what it always pays:
        only the numbers are chosen. A token is Gaussian noise but for its part in the router's
        space.
        """
        num_groups = shape.num_experts // shape.top_k
        width = min(shape.d_model, num_groups)
        if self.projection is not None:
            width = self.projection.size(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=shape.device)

        projection = torch.linalg.qr(normal(shape.d_model, width)).Q.t()  # (R, D), orthonormal
        if num_groups <= width:
            groups = torch.linalg.qr(normal(width, num_groups)).Q.t()  # (E / K, R)
        else:
            groups = F.normalize(normal(num_groups, width), dim=-1)
        rows = groups.repeat_interleave(shape.top_k, dim=0)  # (E, R)
        others = normal(*rows.shape)
        others = others - (others * rows).sum(-1, keepdim=True) * rows
        experts = rows + 0.1 * F.normalize(others, dim=-1)

        x = normal(shape.tokens, shape.d_model)
        group_of = torch.arange(shape.tokens, device=shape.device) % num_groups
        position = groups[group_of] + 0.05 * normal(shape.tokens, width) / math.sqrt(width)
        length = 2 * math.sqrt(width)
        x += (length * position - x @ projection.t()) @ projection
        if self.projection is None:
            # Scores of 10: far enough above the others' 0 in bf16.
            self.experts.copy_(10 / length * experts @ projection)
        else:
            self.projection.copy_(projection)
            self.experts.copy_(experts)
        return x.to(shape.dtype)


@dataclass(frozen=True)
class Layer:
    """A layer ready to be measured.

    Attributes:
        module: holds the parameters.
        apply: (sequences, tokens, D) -> the output and the weighted balance loss; None without one,
            or if the layer adds it to the gradient itself.
        scorer: weights of the router; None for a dense layer.
        flops: FLOPs of one forward and backward pass, as Shape.useful_flops counts them.
        note: remark for a reader about this layer, or "".
    """

    module: nn.Module
    apply: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    scorer: Scorer | None
    flops: int
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        label: name in tables and pictures.
        build: function that makes the layer; it raises NotInstalled if a package is missing.
        yardstick: name of the dense layer that its time is divided by.
        is_dense: whether the number of experts does not matter to it.
        is_ours: whether it is Magnetar's sparse layer.
    """

    label: str
    build: Callable[[Shape], Layer]
    yardstick: str = "dense"
    is_dense: bool = False
    is_ours: bool = False


class NotInstalled(Exception):
    """A peer's package is not there."""


def build_dense(shape: Shape, *, inner_norm: bool = False, compiled: bool = False) -> Layer:
    """Our dense network with the useful FLOPs of the sparse layers: width K * d_ff."""
    with torch.device(shape.device):
        ffn = FeedForward(shape.d_model, shape.top_k * shape.d_ff, "gelu", inner_norm, 1.0)
    ffn.init_weights(RandomSource(1, "ffn"))
    ffn.to(shape.dtype)
    forward = torch.compile(ffn) if compiled else ffn

    def apply(x: Tensor) -> tuple[Tensor, None]:
        return forward(x), None

    return Layer(ffn, apply, None, shape.useful_flops)


def build_ours(shape: Shape, *, router: str = "xmoe", inner_norm: bool = False) -> Layer:
    """Our sparse layer as the model builds it: dropless, GELU."""
    moe = MoELayerConfig.model_validate(
        {"num_experts": shape.num_experts, "top_k": shape.top_k, "router": router}
    )
    with torch.device(shape.device):
        layer = MoE(shape.d_model, shape.d_ff, moe, "gelu", inner_norm, 1.0)
    gate: Any = layer.deepspeed_moe.gate
    gate.init_weights(RandomSource(1, "gate"))
    layer.init_weights(RandomSource(1, "experts"))
    layer.to(shape.dtype)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = layer(x)
        return out, AUX_LOSS_WEIGHT * stats.aux_loss

    if router == "xmoe":
        scorer = Scorer(gate.centroids, gate.projection.weight)
    else:
        scorer = Scorer(gate.wg.weight)
    return Layer(layer, apply, scorer, shape.useful_flops)


def need(package: str) -> None:
    """Require a package.

    Raises:
        NotInstalled: if it is missing.
    """
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(package)


def join_process_group(device: torch.device) -> None:
    """A process group of this process alone, which some layers ask for; once."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave_process_group() -> None:
    """End what `join_process_group` has begun."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def drawn_as(shape: Shape) -> Iterator[None]:
    """In the block, new tensors have the device and the type of the shape."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(shape.device):
            yield
    finally:
        torch.set_default_dtype(usual)


def build_deepspeed(shape: Shape) -> Layer:
    """`deepspeed.moe.layer.MoE` at capacity factor 1.0."""
    need("deepspeed")
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import logger

    from magnetar.engine.build import without_shm_op

    logger.setLevel(logging.WARNING)
    join_process_group(shape.device)
    without_shm_op()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    with drawn_as(shape):
        expert = nn.Sequential(
            nn.Linear(shape.d_model, shape.d_ff), nn.GELU(), nn.Linear(shape.d_ff, shape.d_model)
        )
        layer = MoE(
            shape.d_model,
            expert,
            shape.num_experts,
            k=shape.top_k,
            capacity_factor=1.0,
            top2_2nd_expert_sampling=False,
        )
    layer.set_deepspeed_parallelism()

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        out, aux_loss, _ = layer(x)
        return out, AUX_LOSS_WEIGHT * aux_loss

    scorer = Scorer(layer.deepspeed_moe.gate.wg.weight)
    note = "capacity factor 1.0: drops tokens where routing is uneven; second expert not sampled"
    return Layer(layer, apply, scorer, shape.useful_flops, note)


def import_torchscale(*names: str) -> list[ModuleType]:
    """TorchScale's modules, without two packages that it imports for features that are off here."""
    stand_ins: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": None},
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
    }
    missing = [name for name in ("timm", "fairscale") if importlib.util.find_spec(name) is None]
    added = [name for name in stand_ins if name.split(".")[0] in missing]
    for name in added:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(stand_ins[name])
    try:
        return [importlib.import_module(f"torchscale.{name}") for name in names]
    finally:
        for name in added:
            del sys.modules[name]


def integer_histograms(device: torch.device) -> AbstractContextManager[Any]:
    """In the block, torch.histc of integers works on CPUs, as TorchScale's statistics need."""
    if device.type == "cuda":
        return nullcontext()
    histc = torch.histc

    def histogram(values: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return histc(values.float(), *arguments, **keywords)

    return mock.patch.object(torch, "histc", histogram)


def build_torchscale(shape: Shape) -> Layer:
    """TorchScale's `MOELayer` with the X-MoE gate, as its config sets it up."""
    need("torchscale")
    experts, moe_layer, routing = import_torchscale(
        "component.feedforward_network", "component.xmoe.moe_layer", "component.xmoe.routing"
    )
    if shape.top_k > 2:
        raise ValueError(f"at most 2 experts a token, not {shape.top_k}")
    join_process_group(shape.device)
    args = SimpleNamespace(
        moe_expert_count=shape.num_experts,
        ddp_rank=0,
        activation_fn="gelu",
        dropout=0.0,
        activation_dropout=0.0,
        layernorm_eps=1e-5,
        subln=False,
    )
    keys: dict[str, Any] = {"use_fp32": True, "use_xmoe": True}
    gate_class = routing.Top1Gate
    if shape.top_k == 2:
        gate_class = routing.Top2Gate
        keys |= {
            "second_expert_policy": "random",
            "normalize_gate_prob_before_dropping": True,
        }
    with drawn_as(shape):
        # Orthogonal weights cannot be drawn in bf16.
        torch.set_default_dtype(torch.float32)
        gate = gate_class(shape.d_model, shape.num_experts, **keys).to(shape.dtype)
        torch.set_default_dtype(shape.dtype)
        layer = moe_layer.MOELayer(
            gate, experts.make_experts(args, shape.d_model, shape.d_ff), args
        )

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        with integer_histograms(x.device):
            out, aux_loss = layer(x)
        return out, AUX_LOSS_WEIGHT * aux_loss

    scorer = Scorer(gate.wg, gate.wg_reduction.weight)
    note = "capacity factor 1.0: drops tokens where routing is uneven; second expert used at random"
    return Layer(layer, apply, scorer, shape.useful_flops, note)


def build_mixtral(shape: Shape) -> Layer:
    """Transformers' Mixtral block over `torch._grouped_mm`, its SwiGLU at 2/3 of the width."""
    need("transformers")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralSparseMoeBlock,
        load_balancing_loss_func,
    )

    width = max(16, 2 * shape.d_ff // 3)
    width -= width % (128 if width >= 128 else 16)
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=width,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation="grouped_mm",
    )
    with drawn_as(shape):
        block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=config.initializer_range)
    logits: list[Tensor] = []
    block.gate.register_forward_hook(lambda module, inputs, out: logits.append(out[0]))

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        out = block(x)
        aux_loss = load_balancing_loss_func((logits.pop(),), shape.num_experts, shape.top_k)
        return out, AUX_LOSS_WEIGHT * aux_loss

    flops = 18 * shape.tokens * shape.top_k * shape.d_model * width
    note = (
        f"SwiGLU: three matrices of width {width}, {flops / shape.useful_flops:.1%} of the FLOPs; "
        "its ratio is per FLOP"
    )
    return Layer(block, apply, Scorer(block.gate.weight), flops, note)


def build_megatron(shape: Shape) -> Layer:
    """Megatron-Core's `MoELayer`; its grouped experts where Transformer Engine is installed."""
    need("megatron")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it would do with other packages
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

    has_engine = importlib.util.find_spec("transformer_engine") is not None
    is_cuda = shape.device.type == "cuda"
    join_process_group(shape.device)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    if is_cuda:
        model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.d_model,
        num_attention_heads=math.gcd(shape.d_model, 16),
        ffn_hidden_size=shape.d_ff,
        moe_ffn_hidden_size=shape.d_ff,
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=AUX_LOSS_WEIGHT,
        moe_token_dispatcher_type="alltoall" if is_cuda else "allgather",  # streams, of a GPU
        moe_grouped_gemm=has_engine,
        moe_permute_fusion=has_engine,
        add_bias_linear=False,
        activation_func=F.gelu,
        bf16=shape.dtype == torch.bfloat16,
        params_dtype=shape.dtype,
        use_cpu_initialization=not is_cuda,
    )
    spec = get_moe_module_spec(has_engine, shape.num_experts, moe_grouped_gemm=has_engine)
    # Up to 0.18 a description of the module, from 0.19 on a function that builds it.
    layer = spec(config) if callable(spec) else build_module(spec, config=config)
    layer.set_layer_number(1)
    layer.to(device=shape.device, dtype=shape.dtype)

    def apply(x: Tensor) -> tuple[Tensor, None]:
        return layer(x)[0], None  # it adds the balance loss to the gradient itself

    note = "no biases; " + (
        "grouped matmuls of Transformer Engine"
        if has_engine
        else "one expert after the other: its grouped matmuls need transformer_engine"
    )
    return Layer(layer, apply, Scorer(layer.router.weight), shape.useful_flops, note)


PEERS: dict[str, tuple[str, Callable[[Shape], Layer]]] = {
    "mixtral": ("transformers Mixtral, grouped_mm", build_mixtral),
    "deepspeed": ("deepspeed.moe", build_deepspeed),
    "torchscale": ("torchscale X-MoE", build_torchscale),
    "megatron": ("megatron-core", build_megatron),
}
