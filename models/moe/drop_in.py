"""A layer with the arguments of `deepspeed.moe.layer.MoE`, for models of other people.

Letters: N tokens, D hidden_size, F inner width of an expert, L local experts.
"""

import copy
from collections.abc import Iterator
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from magnetar.data.errors import UserError
from magnetar.models.layers.feed_forward import ACTIVATIONS, GATED_ACTIVATIONS
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe import deepspeed
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.experts import Experts, LoopedExperts
from magnetar.models.moe.router import build_router

DEEPSPEEDS_JITTER = 0.01
PROBED_TOKENS = 8


class _DropIn(deepspeed.GroupedMoE):
    """What `MoE` and `PartitionedMoE` share."""

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = False,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        router: Literal["xmoe", "linear"] = "xmoe",
        **moe_keys: Any,
    ) -> None:
        """Build the layer; each expert starts as a copy of the given one, as in DeepSpeed.

        Args:
            hidden_size: width D of the tokens.
            expert: the module of one expert. Two linear layers with gelu, relu or swish between
                them, or the three of swiglu, run as grouped matmuls; any other module runs expert
                by expert, and has DeepSpeed's names in state dicts.
            num_experts: experts over the whole job.
            ep_size: ranks that share one set of experts.
            k: experts of each token.
            capacity_factor: share of an expert's capacity in training, with drop_tokens.
            eval_capacity_factor: the same outside training.
            min_capacity: least number of tokens that an expert takes, with drop_tokens.
            use_residual: whether a copy of the expert that sees every token is mixed in
                (arXiv 2201.05596).
            noisy_gate_policy: None or "Jitter".
            drop_tokens: whether an expert has a capacity, counted on each rank. DeepSpeed's default
                is True.
            use_rts: whether the tokens of a full expert are drawn, with drop_tokens and k 1.
            use_tutel: False; the kernels are our own.
            enable_expert_tensor_parallelism: False.
            top2_2nd_expert_sampling: whether the second of two experts is drawn in training.
            router: "xmoe" or "linear", which is DeepSpeed's.
            moe_keys: further keys of `magnetar.model.moe`, such as gate or d_router.

        Raises:
            UserError: if an argument has a value that nothing here computes.
        """
        nn.Module.__init__(self)
        _refuse(use_tutel, "use_tutel", True, "the layer has kernels of its own: leave it out")
        _refuse(
            enable_expert_tensor_parallelism,
            "enable_expert_tensor_parallelism",
            True,
            "an expert is whole on its rank: leave it out, or use a larger ep_size",
        )
        _refuse(
            noisy_gate_policy not in (None, "None", "Jitter"),
            "noisy_gate_policy",
            noisy_gate_policy,
            "the router draws no such noise: use 'Jitter' or None",
        )
        if drop_tokens:
            moe_keys |= {
                "dispatch": "capacity",
                "capacity_factor": float(capacity_factor),
                "capacity_scope": "rank",
                "capacity_order": "random" if use_rts and k == 1 else "first_come",
                "eval_capacity_fraction": min(1.0, eval_capacity_factor * k / num_experts),
                "normalize_weights": "after_dropping" if k == 2 else "before_dropping",
            }
        moe = MoELayerConfig(
            num_experts=num_experts,
            top_k=k,
            ep_size=ep_size,
            router=router,
            jitter=DEEPSPEEDS_JITTER if noisy_gate_policy == "Jitter" else 0.0,
            second_expert="sampled" if k == 2 and top2_2nd_expert_sampling else "all",
            **moe_keys,
        )
        self.num_experts, self.ep_size = num_experts, ep_size
        self.num_local_experts = num_experts // ep_size
        gate = build_router(hidden_size, moe)
        gate.init_weights(RandomSource(int(torch.randint(2**62, ())), "gate"))
        experts = grouped_experts(expert, hidden_size, self.num_local_experts)
        self.deepspeed_moe = self.layer_class(
            gate, experts or LoopedExperts(expert, self.num_local_experts), moe
        )
        self.deepspeed_moe.min_capacity = min_capacity
        self.mlp = copy.deepcopy(expert) if use_residual else None
        self.coefficient = nn.Linear(hidden_size, 2) if use_residual else None
        self._mark_experts()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, used_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send every token to its experts.

        Args:
            hidden_states: (..., D).
            used_token: (N,), 0 for a token that no expert gets.

        Returns:
            (..., D), the balance loss () float32, and (E,) float32 tokens of each expert before any
            is dropped.
        """
        tokens = hidden_states.reshape(1, -1, hidden_states.size(-1))  # (1, N, D)
        padding = None if used_token is None else used_token.view(1, -1) == 0  # (1, N)
        output, stats = self.deepspeed_moe(tokens, padding, None)
        output = output.view_as(hidden_states)
        if self.mlp is not None and self.coefficient is not None:
            residual = self.mlp(hidden_states)
            residual = residual[0] if isinstance(residual, tuple) else residual
            weights = self.coefficient(hidden_states).softmax(-1)  # (..., 2)
            output = output * weights[..., :1] + residual * weights[..., 1:]
        return output, stats.aux_loss, stats.load


class MoE(_DropIn, deepspeed.ReplicatedMoE):
    """The layer under ZeRO 0, 1 and 2."""


class PartitionedMoE(_DropIn, deepspeed.PartitionedMoE):
    """The layer under ZeRO 3, which DeepSpeed's own layer does not have."""


def _refuse(is_wrong: bool, name: str, value: object, way_out: str) -> None:
    if is_wrong:
        raise UserError(f"MoE({name}={value!r}): {way_out}")


def grouped_experts(expert: nn.Module, d_model: int, num_local_experts: int) -> Experts | None:
    """Copies of a module as stacked experts; None if it is no network that they compute.

    What the module computes is found by comparing outputs for a few random tokens.
    """
    layers = [m for m in expert.modules() if isinstance(m, nn.Linear)]
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in expert.modules())
    if drops or sum(p.numel() for p in expert.parameters()) != sum(
        p.numel() for layer in layers for p in layer.parameters()
    ):
        return None
    like = next(expert.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBED_TOKENS, d_model, generator=generator).to(like)
    with torch.no_grad():
        wanted = expert(probe)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        for experts in _candidates(layers, d_model, num_local_experts):
            counts = torch.tensor([PROBED_TOKENS] + [0] * (num_local_experts - 1))
            found = experts.to(like)(probe, counts.to(like.device))
            # Twice the rounding of a product; another activation is off by percents.
            if torch.allclose(found, wanted, rtol=0, atol=_rounding(wanted)):
                return experts
    return None


def _rounding(outputs: Tensor) -> float:
    return 64 * torch.finfo(outputs.dtype).eps * float(outputs.abs().max())


def _candidates(layers: list[nn.Linear], d_model: int, num_local_experts: int) -> Iterator[Experts]:
    """Stacked experts of these layers, in every order and with every activation."""
    for order in permutations(layers):
        widths = [(layer.in_features, layer.out_features) for layer in order]
        d_ff = widths[0][1]
        for activation in ACTIVATIONS:
            names = ("w1", "w3", "w2") if activation in GATED_ACTIVATIONS else ("w1", "w2")
            if widths != [(d_model, d_ff)] * (len(names) - 1) + [(d_ff, d_model)]:
                continue
            experts = Experts(num_local_experts, d_model, d_ff, activation, False, 1.0)
            for name, layer in zip(names, order, strict=True):
                getattr(experts, name).data[:] = layer.weight.detach().t()
                bias = getattr(experts, name.replace("w", "b"))
                bias.data.zero_()
                if layer.bias is None:
                    bias.requires_grad_(False)
                else:
                    bias.data[:] = layer.bias.detach()
            yield experts
