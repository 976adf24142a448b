"""The formulas of models/ once more, as float64 loops that share no code with it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.config import MoEConfig

LAYER_NORM_EPS = 1e-5  # torch's default, which Magneto and TorchScale use as well


def float64_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, as leaves that collect gradients of their own."""
    return {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in module.named_parameters()
    }


def randomize(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Draw every parameter anew, biases and norms too, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_gain = "norm" in name and name.endswith("weight")
        parameter.data.copy_(noise.abs() + 0.5 if "temperature" in name else noise + is_gain)


def gelu(h: Tensor) -> Tensor:
    """h * Phi(h), Phi the normal distribution's cumulative function."""
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def relu(h: Tensor) -> Tensor:
    """max(h, 0)."""
    return torch.where(h > 0, h, torch.zeros_like(h))


def swish(h: Tensor) -> Tensor:
    """h / (1 + exp(-h)); the first factor of SwiGLU as well."""
    return h / (1 + torch.exp(-h))


ACTIVATIONS = {"gelu": gelu, "relu": relu, "swish": swish, "swiglu": swish}


def layer_norm(h: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """(h - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    centred = h - h.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def softmax(scores: Tensor) -> Tensor:
    """exp(s_i) / sum_j exp(s_j) over the last dimension."""
    exponentials = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def cosine_scores(
    h: Tensor, projection: Tensor, centroids: Tensor, normalize_tokens: bool = True
) -> Tensor:
    """(N, E): s_i = (W h . e_i) / (||W h|| ||e_i||), one token and one expert at a time."""
    rows = []
    for token in h:
        projected = projection @ token
        length = projected.square().sum().sqrt() if normalize_tokens else 1.0
        rows.append(
            torch.stack(
                [
                    (projected * centroid).sum() / (length * centroid.square().sum().sqrt())
                    for centroid in centroids
                ]
            )
        )
    return torch.stack(rows)


def gate(
    scores: Tensor, top_k: int, kind: str, normalize: bool = True
) -> tuple[list[list[int]], list[list[Tensor]]]:
    """Chosen experts of each token, best first, and the weights of their outputs."""
    experts, weights = [], []
    for row in scores:
        chosen = sorted(range(len(row)), key=lambda expert: -row[expert].item())[:top_k]
        if kind == "sigmoid":
            gates = [1 / (1 + torch.exp(-row[expert])) for expert in chosen]
        else:
            gates = [torch.exp(row[expert] - row.logsumexp(0)) for expert in chosen]
        total = sum(gates) if normalize and top_k > 1 else 1.0
        experts.append(chosen)
        weights.append([gate / total for gate in gates])
    return experts, weights


def balance_loss(probs: Tensor, first_choices: list[int]) -> Tensor:
    """E * sum over experts of (share of first choices) * (mean probability), a double loop."""
    num_tokens, num_experts = probs.shape
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(num_experts):
        share = sum(choice == expert for choice in first_choices) / num_tokens
        for token in range(num_tokens):
            total = total + share * probs[token, expert] / num_tokens
    return num_experts * total


def kept_choices(
    experts: list[list[int]],
    num_experts: int,
    capacity: int | None,
    token_order: list[int] | None = None,
    used: list[list[bool]] | None = None,
) -> list[list[bool]]:
    """Which choices of which tokens are kept: first choices first, then by position or order."""
    filled = [0] * num_experts
    kept = [[False] * len(chosen) for chosen in experts]
    for choice in range(len(experts[0])):
        for token in token_order or range(len(experts)):
            expert = experts[token][choice]
            if used is not None and not used[token][choice]:
                continue
            if capacity is None or filled[expert] < capacity:
                filled[expert] += 1
                kept[token][choice] = True
    return kept


class MoEResult(NamedTuple):
    """What `moe_layer` returns: (N, D), losses, counts and numbers of dropped choices."""

    output: Tensor
    aux_loss: Tensor
    entropy: Tensor
    load: list[int]
    dropped: int
    kept: list[list[bool]]
    z_loss: Tensor


def feed_forward(
    p: dict[str, Tensor], h: Tensor, activation: str, expert: int, eps: float = LAYER_NORM_EPS
) -> Tensor:
    """(D,) -> (D,) by one expert of stacked parameters."""
    hidden = ACTIVATIONS[activation](h @ p["experts.w1"][expert] + p["experts.b1"][expert])
    if "experts.w3" in p:
        hidden = hidden * (h @ p["experts.w3"][expert] + p["experts.b3"][expert])
    if "experts.norm_weight" in p:
        hidden = layer_norm(
            hidden, p["experts.norm_weight"][expert], p["experts.norm_bias"][expert], eps
        )
    return hidden @ p["experts.w2"][expert] + p["experts.b2"][expert]


def moe_layer(
    p: dict[str, Tensor],
    h: Tensor,
    moe: MoEConfig,
    activation: str,
    capacity: int | None,
    eps: float = LAYER_NORM_EPS,
) -> MoEResult:
    """A MoE layer without noise over (N, D) float64, token by token.

    The names of `p` are those of MoE.deepspeed_moe's parameters.
    """
    if moe.router == "linear":
        scores = torch.stack([p["gate.wg.weight"] @ token for token in h])
        balance_probs = softmax(scores)
    else:
        scores = cosine_scores(
            h, p["gate.projection.weight"], p["gate.centroids"], moe.normalize_tokens
        )
        tau_0 = {"softmax": 0.3, "sigmoid": 0.07}[moe.gate] if moe.learned_temperature else 1.0
        balance_probs = softmax(scores / tau_0)
        if moe.learned_temperature:
            scores = scores / p["gate.temperature"][0]
    before_dropping = moe.normalize_weights == "before_dropping"
    experts, weights = gate(scores, moe.top_k, moe.gate, before_dropping)
    probs = softmax(scores)
    token_order = None
    if moe.capacity_order == "batch_prioritized":
        token_order = sorted(range(len(h)), key=lambda token: -probs[token].max().item())
    kept = kept_choices(experts, moe.num_experts, capacity, token_order)
    outputs = []
    for token in range(len(h)):
        out = torch.zeros_like(h[token])
        total = torch.zeros((), dtype=torch.float64)
        for choice, expert in enumerate(experts[token]):
            if kept[token][choice]:
                total = total + weights[token][choice]
                out = out + weights[token][choice] * feed_forward(
                    p, h[token], activation, expert, eps
                )
        if moe.top_k > 1 and not before_dropping and any(kept[token]):
            out = out / total
        outputs.append(out)
    flat = [expert for chosen in experts for expert in chosen]
    return MoEResult(
        output=torch.stack(outputs),
        aux_loss=balance_loss(balance_probs, [chosen[0] for chosen in experts]),
        entropy=-(probs * probs.log()).sum(-1).mean(),
        load=[flat.count(expert) for expert in range(moe.num_experts)],
        dropped=sum(not keep for keeps in kept for keep in keeps),
        kept=kept,
        z_loss=scores.exp().sum(-1).log().square().mean(),
    )


def attention(x: Tensor, p: dict[str, Tensor], num_heads: int) -> Tensor:
    """(T, D) -> (T, D): causal softmax attention, one head and one position at a time."""
    length, d_model = x.shape
    width = d_model // num_heads
    q, k, v = (
        x @ p["qkv_proj.weight"][i * d_model : (i + 1) * d_model].T
        + p["qkv_proj.bias"][i * d_model : (i + 1) * d_model]
        for i in range(3)
    )
    rows = []
    for position in range(length):
        heads = []
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            seen = range(position + 1)
            scores = torch.stack([(q[position, part] * k[j, part]).sum() for j in seen])
            probs = softmax(scores / math.sqrt(width))
            heads.append(sum(probs[j] * v[j, part] for j in seen))
        rows.append(torch.cat(heads))
    heads_out = torch.stack(rows)
    if "inner_norm.weight" in p:
        heads_out = layer_norm(heads_out, p["inner_norm.weight"], p["inner_norm.bias"])
    return heads_out @ p["out_proj.weight"].T + p["out_proj.bias"]


def below(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters under a prefix, without it."""
    return {name[len(prefix) :]: t for name, t in p.items() if name.startswith(prefix)}


def dense_ffn(x: Tensor, p: dict[str, Tensor], activation: str) -> Tensor:
    """(T, D) -> (T, D): w2 LN(activation(w1 x)), the LayerNorm where it has parameters."""
    hidden = ACTIVATIONS[activation](x @ p["w1.weight"].T + p["w1.bias"])
    if "inner_norm.weight" in p:
        hidden = layer_norm(hidden, p["inner_norm.weight"], p["inner_norm.bias"])
    return hidden @ p["w2.weight"].T + p["w2.bias"]


def decoder(
    p: dict[str, Tensor],
    tokens: Tensor,
    num_layers: int,
    num_heads: int,
    activation: str = "gelu",
    moe: MoEConfig | None = None,
) -> Tensor:
    """(T,) -> (T, V): Pre-LN, and Sub-LN where a sublayer has an inner norm's parameters."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])

    x = torch.stack(
        [p["embedding.weight"][t] + p["positions.weight"][i] for i, t in enumerate(tokens)]
    )
    for index in range(num_layers):
        block = f"blocks.{index}"
        attended = attention(
            norm(x, f"{block}.attention_norm"), below(p, f"{block}.attention."), num_heads
        )
        x = x + attended
        ffn, h = below(p, f"{block}.ffn."), norm(x, f"{block}.ffn_norm")
        if moe is not None and (index + 1) % moe.every == 0:
            x = x + moe_layer(below(ffn, "deepspeed_moe."), h, moe, activation, None).output
        else:
            x = x + dense_ffn(h, ffn, activation)
    return norm(x, "final_norm") @ p.get("output.weight", p["embedding.weight"]).T
