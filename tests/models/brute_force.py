"""The formulas of models/ once more, as float64 loops that share no code with it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import MoEConfig

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


def gelu_tanh(h: Tensor) -> Tensor:
    """Gelu by the hyperbolic tangent (arXiv 1606.08415, sec. 2)."""
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "swish": swish, "swiglu": swish}


def layer_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = LAYER_NORM_EPS,
    kind: str = "layernorm",
) -> Tensor:
    """(h - mean) / sqrt(var + eps) * weight + bias over the last dimension; RMSNorm has no mean."""
    centred = h if kind == "rmsnorm" else h - h.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + (0 if bias is None else bias)


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
    p: dict[str, Tensor],
    h: Tensor,
    activation: str,
    expert: int,
    eps: float = LAYER_NORM_EPS,
    norm_type: str = "layernorm",
) -> Tensor:
    """(D,) -> (D,) by one expert of stacked parameters."""

    def own(name: str) -> Tensor | None:
        return p[f"experts.{name}"][expert] if f"experts.{name}" in p else None

    def linear(x: Tensor, number: int) -> Tensor:
        bias = own(f"b{number}")
        return x @ p[f"experts.w{number}"][expert] + (0 if bias is None else bias)

    hidden = ACTIVATIONS[activation](linear(h, 1))
    if "experts.w3" in p:
        hidden = hidden * linear(h, 3)
    weight = own("norm_weight")
    if weight is not None:
        hidden = layer_norm(hidden, weight, own("norm_bias"), eps, norm_type)
    return linear(hidden, 2)


def moe_layer(
    p: dict[str, Tensor],
    h: Tensor,
    moe: MoEConfig,
    activation: str,
    capacity: int | None,
    eps: float = LAYER_NORM_EPS,
    norm_type: str = "layernorm",
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
                    p, h[token], activation, expert, eps, norm_type
                )
        if moe.top_k > 1 and moe.normalize_weights == "after_dropping" and any(kept[token]):
            out = out / total
        outputs.append(out * moe.weight_scale)
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


def below(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters under a prefix, without it."""
    return {name[len(prefix) :]: t for name, t in p.items() if name.startswith(prefix)}


def residual_scale(norm: str, encoder: int, decoder: int, stack: str) -> float:
    """DeepNorm's alpha of a stack ("encoder", "decoder") of N and M layers; 0: no such stack."""
    if norm != "deepnorm":
        return 1.0
    if encoder == 0 or decoder == 0:
        return (2 * (encoder + decoder)) ** (1 / 4)
    if stack == "encoder":
        return 0.81 * (encoder * encoder * encoder * encoder * decoder) ** (1 / 16)
    return (3 * decoder) ** (1 / 4)


def initial_gain(norm: str, encoder: int, decoder: int, stack: str) -> float:
    """DeepNorm's beta, Sub-LN's gamma: of feed-forward, value and output matrices."""
    alone = encoder == 0 or decoder == 0
    if norm == "deepnorm":
        if alone:
            return 1 / (8 * (encoder + decoder)) ** (1 / 4)
        if stack == "encoder":
            return 0.87 / (encoder * encoder * encoder * encoder * decoder) ** (1 / 16)
        return 1 / (12 * decoder) ** (1 / 4)
    if norm == "subln":
        if alone:
            return math.log(2 * (encoder + decoder)) ** 0.5
        if stack == "encoder":
            return (math.log(3 * decoder) * math.log(2 * encoder) / 3) ** 0.5
        return math.log(3 * decoder) ** 0.5
    return 1.0


def position_vector(kind: str, position: int, d_model: int) -> Tensor:
    """What a sinusoidal kind of positions adds to an embedding: (D,) of float32's precision."""
    sines, cosines = [], []
    for i in range(d_model // 2):
        if kind == "sinusoidal":
            angle = position / 10000 ** (2 * i / d_model)
        else:
            angle = (position + 2) / 10000 ** (i / (d_model // 2 - 1))
        sines.append(math.sin(angle))
        cosines.append(math.cos(angle))
    if kind == "sinusoidal":
        numbers = [value for pair in zip(sines, cosines, strict=True) for value in pair]
    else:
        numbers = sines + cosines
    return torch.tensor(numbers, dtype=torch.float32).double()


def relative_bucket(distance: int, num_buckets: int, max_distance: int, both: bool) -> int:
    """T5's bucket of key position minus query position, in whole numbers alone."""
    first, behind = 0, -distance
    if both:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        behind = abs(distance)
    behind = max(behind, 0)
    exact = num_buckets // 2
    if behind < exact:
        return first + behind
    ranges = num_buckets - exact
    # The largest k with (behind / exact)^ranges >= (max_distance / exact)^k.
    k = 0
    while k + 1 < ranges and (
        behind**ranges * exact ** (k + 1) >= max_distance ** (k + 1) * exact**ranges
    ):
        k += 1
    return first + exact + k


def rotary_product(
    q: Tensor, k: Tensor, distance: int, scale_base: float | None, theta: float = 10000
) -> Tensor:
    """q . k after both are turned by their positions, from query position minus key position."""
    a, b = (row.tolist() for row in (q, k))
    width, total = len(a), 0.0
    for i in range(width // 2):
        angle = distance * theta ** (-2 * i / width)
        real = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]
        imaginary = a[2 * i + 1] * b[2 * i] - a[2 * i] * b[2 * i + 1]
        term = real * math.cos(angle) - imaginary * math.sin(angle)
        if scale_base is not None:
            zeta = (2 * i / width + 0.4) / 1.4
            term = term * zeta ** (distance / scale_base)
        total += term
    return torch.tensor(total, dtype=torch.float64)


class Stack:
    """One stack of a model, a sequence at a time, one head and one position after another."""

    def __init__(
        self,
        p: dict[str, Tensor],
        config: ModelConfig,
        stack: str,
        *,
        padding: list[bool] | None = None,
        split: int | None = None,
    ) -> None:
        self.p, self.config, self.stack = p, config, stack
        self.padding, self.split = padding, split
        encoder = 0 if config.architecture == "decoder" else config.num_layers
        decoder = 0 if config.architecture == "encoder" else config.num_layers
        if config.architecture == "encoder_decoder" and config.num_decoder_layers:
            decoder = config.num_decoder_layers
        self.num_layers = encoder if stack == "encoder" else decoder
        self.alpha = residual_scale(config.norm, encoder, decoder, stack)
        self.starts_with_norm = config.norm in ("pre", "subln", "normformer")
        self.width = config.head_dim or config.d_model // config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads

    def of(self, name: str, position: int) -> dict[str, Tensor]:
        """A module's parameters for the token at a position."""
        if self.config.multiway:
            pool = 1 if self.split is not None and position >= self.split else 0
            name = f"{name}.pools.{pool}"
        return below(self.p, name + ".")

    def linear(self, name: str, x: Tensor) -> Tensor:
        """(T, D) -> (T, D')."""
        own = [self.of(name, position) for position in range(len(x))]
        rows = [m["weight"] @ row + m.get("bias", 0) for m, row in zip(own, x, strict=True)]
        return torch.stack(rows)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        own = [self.of(name, position) for position in range(len(x))]
        return torch.stack([self.normed(row, m) for m, row in zip(own, x, strict=True)])

    def normed(self, row: Tensor, m: dict[str, Tensor]) -> Tensor:
        """One row after a norm with these parameters."""
        config = self.config
        return layer_norm(row, m["weight"], m.get("bias"), config.norm_eps, config.norm_type)

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D)."""
        config, rows = self.config, []
        kind = config.positions
        if kind is None:
            kind = "learned" if config.attention_positions == "none" else "none"
        for position, token in enumerate(tokens.tolist()):
            row = self.p["embedding.weight"][token]
            if config.stable_embedding:
                row = self.normed(row, below(self.p, "token_norm."))
            if config.scale_embedding:
                row = row * config.d_model**0.5
            if kind == "learned":
                row = row + self.p["positions.weight"][position]
            elif kind != "none":
                row = row + position_vector(kind, position, config.d_model)
            rows.append(row)
        x = torch.stack(rows)
        return self.norm("embedding_norm", x) if config.embedding_norm else x

    def residual(self, name: str, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream after one sublayer: x + f(LN(x)), or LN(scale * x + f(x))."""
        if self.starts_with_norm:
            out = sublayer(self.norm(f"{name}.norm", x))
            if self.config.norm == "normformer" and name.endswith(".attention_residual"):
                out = self.norm(f"{name}.output_norm", out)
            return x + out
        scale = self.p[f"{name}.omega"] if self.config.norm == "admin" else self.alpha
        return self.norm(f"{name}.norm", scale * x + sublayer(x))

    def head(self, norm: str, row: Tensor, head: int) -> Tensor:
        """(H * d,) -> (d,): one head's part of a query or key, normed where the config says so."""
        is_whole = self.config.qk_norm_over == "all_heads"
        if self.config.qk_norm and is_whole:
            row = self.normed(row, below(self.p, f"{norm}."))
        part = row[head * self.width : (head + 1) * self.width]
        if not self.config.qk_norm or is_whole:
            return part
        return self.normed(part, below(self.p, f"{norm}."))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        name: str,
        hidden: Callable[[int, int], bool],
        bias_name: str,
        both: bool,
    ) -> Tensor:
        """(T, H * d), (S, G * d), (S, G * d) -> (T, H * d), before the output projection."""
        config, width = self.config, self.width
        is_cross = name.endswith("cross_attention")
        scale_base = None if config.attention_positions == "rotary" else config.xpos_scale_base
        turned = config.attention_positions in ("rotary", "xpos", "xpos_relative") and not is_cross
        biased = config.attention_positions in ("relative", "xpos_relative")
        queries, keys = (
            [
                [self.head(f"{name}.{which}_norm", row, head) for head in range(num_heads)]
                for row in x
            ]
            for which, x, num_heads in (("q", q, config.num_heads), ("k", k, self.num_kv_heads))
        )
        rows = []
        for t in range(len(q)):
            seen = [s for s in range(len(k)) if not hidden(t, s)]
            heads = []
            for head in range(config.num_heads):
                other = head * self.num_kv_heads // config.num_heads  # of keys and values
                part = slice(other * width, (other + 1) * width)
                scores = []
                for s in seen:
                    a, b = queries[t][head], keys[s][other]
                    product = a @ b
                    if turned:
                        product = rotary_product(a, b, t - s, scale_base, config.rope_theta)
                    score = product / math.sqrt(width)
                    if biased:
                        bucket = relative_bucket(
                            s - t, config.relative_buckets, config.relative_max_distance, both
                        )
                        score = score + self.p[bias_name][bucket, head]
                    scores.append(score)
                if not seen:  # padding alone
                    heads.append(torch.zeros(width, dtype=torch.float64))
                    continue
                probs = softmax(torch.stack(scores))
                out = sum(probs[i] * v[s, part] for i, s in enumerate(seen))
                if config.norm == "normformer" and not is_cross:
                    out = out * self.p[f"{name}.head_scale"][head]
                heads.append(out)
            rows.append(torch.cat(heads))
        return torch.stack(rows)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """(T, D) -> (T, D): each position sees itself, the past, and in an encoder the future."""
        causal = self.stack == "decoder"
        padding = self.padding or [False] * len(x)
        num_heads = [self.config.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = self.linear(f"{name}.qkv_proj", x)
        q, k, v = qkv.split([self.width * number for number in num_heads], dim=-1)
        heads = self.attend(
            q,
            k,
            v,
            name,
            lambda t, s: padding[s] or (causal and s > t),
            "relative_bias.weight",
            both=not causal or self.config.relative_bidirectional,
        )
        if self.config.norm == "subln":
            heads = self.norm(f"{name}.inner_norm", heads)
        return self.linear(f"{name}.out_proj", heads)

    def cross_attention(
        self, name: str, x: Tensor, memory: Tensor, padding: list[bool] | None
    ) -> Tensor:
        """(T, D) and the encoder's output (S, D) -> (T, D)."""
        hidden = padding or [False] * len(memory)
        k, v = self.linear(f"{name}.kv_proj", memory).chunk(2, dim=-1)
        heads = self.attend(
            self.linear(f"{name}.q_proj", x),
            k,
            v,
            name,
            lambda t, s: hidden[s],
            "cross_relative_bias.weight",
            both=True,
        )
        if self.config.norm == "subln" and self.config.cross_attention_inner_norm:
            heads = self.norm(f"{name}.inner_norm", heads)
        return self.linear(f"{name}.out_proj", heads)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        """(T, D) -> (T, D), dense."""
        rows = []
        for position, row in enumerate(x):
            m = self.of(name, position)
            h = ACTIVATIONS[self.config.activation](m["w1.weight"] @ row + m.get("w1.bias", 0))
            if self.config.activation == "swiglu":
                h = h * (m["w3.weight"] @ row + m.get("w3.bias", 0))
            if self.config.norm in ("subln", "normformer"):
                h = self.normed(h, below(m, "inner_norm."))
            rows.append(m["w2.weight"] @ h + m.get("w2.bias", 0))
        return torch.stack(rows)

    def experts(self, name: str, x: Tensor) -> Tensor:
        """(T, D) -> (T, D), 0 at padding, which reaches no expert."""
        assert self.config.moe is not None
        real = [t for t in range(len(x)) if not (self.padding and self.padding[t])]
        out = torch.zeros_like(x)
        if real:
            p = below(self.p, f"{name}.deepspeed_moe.")
            config = self.config
            norm = (config.norm_eps, config.norm_type)
            routed = moe_layer(p, x[real], config.moe, config.activation, None, *norm)
            out[real] = routed.output
        if config.moe.shared_d_ff is not None:
            shared = self.feed_forward(f"{name}.shared", x)
            if config.moe.shared_gate:
                gate = self.p[f"{name}.shared.weight_proj.weight"]
                shared = shared / (1 + torch.exp(-x @ gate.T))
            out = out + shared
        return out

    def __call__(
        self,
        tokens: Tensor,
        memory: Tensor | None = None,
        memory_padding: list[bool] | None = None,
    ) -> Tensor:
        """(T,) -> (T, V), or the features (T, D) of a stack without an output."""
        x = self.embed(tokens)
        for index in range(self.num_layers):
            block = f"blocks.{index}"
            x = self.residual(
                f"{block}.attention_residual",
                x,
                lambda h, name=f"{block}.attention": self.attention(name, h),
            )
            if memory is not None:
                x = self.residual(
                    f"{block}.cross_attention_residual",
                    x,
                    lambda h, name=f"{block}.cross_attention": self.cross_attention(
                        name, h, memory, memory_padding
                    ),
                )
            moe = self.config.moe
            is_sparse = moe is not None and (index + 1) % moe.every == 0
            is_sparse = is_sparse and index >= moe.first_dense_layers
            ffn = self.experts if is_sparse else self.feed_forward
            x = self.residual(
                f"{block}.ffn_residual", x, lambda h, f=ffn, name=f"{block}.ffn": f(name, h)
            )
        if self.starts_with_norm:
            x = self.norm("final_norm", x)
        feeds_decoder = self.config.architecture == "encoder_decoder" and self.stack == "encoder"
        if feeds_decoder or not self.config.output_projection:
            return x
        return x @ self.p.get("output.weight", self.p["embedding.weight"]).T


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters in float64, those that are tied under each of their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.detach().double() for name, parameter in named}


def model_output(
    p: dict[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    padding: list[bool] | None = None,
    *,
    source: Tensor | None = None,
    source_padding: list[bool] | None = None,
    split: int | None = None,
) -> Tensor:
    """(T,) -> (T, V) of a whole model, a source (S,) beside it in an encoder-decoder."""
    if config.architecture != "encoder_decoder":
        return Stack(p, config, config.architecture, padding=padding, split=split)(tokens)
    assert source is not None
    encoder = Stack(below(p, "encoder."), config, "encoder", padding=source_padding)
    decoder = Stack(below(p, "decoder."), config, "decoder", padding=padding)
    return decoder(tokens, encoder(source), source_padding)
