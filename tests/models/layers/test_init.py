"""Initial weights: what they depend on, how large they are, and that none is forgotten."""

import math

import pytest
import torch
from torch import Tensor

from magnetar.models.config import ModelConfig
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.experts import Experts
from magnetar.models.transformer import EncoderDecoder, Transformer, build_model

GAMMA = {"subln": math.sqrt(math.log(2 * 3)), "pre": 1.0}  # three layers


def config(**keys: object) -> ModelConfig:
    base = {
        "vocab_size": 300,
        "num_layers": 3,
        "d_model": 128,
        "d_ff": 256,
        "num_heads": 4,
        "max_seq_len": 100,
        "moe": {"num_experts": 4, "every": 3, "d_router": 64},
    }
    return ModelConfig.model_validate(base | keys)


def initial(seed: int = 0, **keys: object) -> dict[str, Tensor]:
    return build_model(config(**keys), seed).state_dict()


def xavier(rows: int, columns: int, gain: float) -> float:
    return gain * math.sqrt(2 / (rows + columns))


@pytest.mark.parametrize("norm", ["subln", "pre"])
def test_standard_deviations_are_xaviers_with_the_gain_of_each_role(norm: str) -> None:
    state, gamma = initial(norm=norm, tie_embeddings=False), GAMMA[norm]
    layer = "blocks.2."
    q, k, v = state[layer + "attention.qkv_proj.weight"].chunk(3)
    expected = [
        (q, xavier(128, 128, 1.0)),
        (k, xavier(128, 128, 1.0)),
        (v, xavier(128, 128, gamma)),
        (state[layer + "attention.out_proj.weight"], xavier(128, 128, gamma)),
        (state["blocks.0.ffn.w1.weight"], xavier(128, 256, gamma)),
        (state["blocks.0.ffn.w2.weight"], xavier(128, 256, gamma)),
        (state[layer + "ffn.deepspeed_moe.gate.projection.weight"], xavier(128, 64, 1.0)),
        (state["embedding.weight"], 0.02),
        (state["positions.weight"], 0.02),
        (state["output.weight"], 0.02),
    ]
    for expert in range(4):
        for name in ("w1", "w2"):
            weight = state[f"{layer}ffn.deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"]
            expected.append((weight, xavier(128, 256, gamma)))
    for weight, std in expected:
        # A sample of n has a relative error of 1 / sqrt(2 n): 0.8 % at 8192; four of them. Gamma
        # is 1.34, and the wrong fan of a packed matrix would be 1.41 off.
        assert weight.double().std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * 8192))
        assert abs(weight.double().mean().item()) < 4 * std / math.sqrt(weight.numel())


def test_the_linear_router_is_drawn_by_xavier_with_gain_1() -> None:
    moe = {"num_experts": 64, "every": 3, "router": "linear"}
    weight = initial(moe=moe)["blocks.2.ffn.deepspeed_moe.gate.wg.weight"]
    assert weight.std().item() == pytest.approx(xavier(128, 64, 1.0), rel=0.04)  # as above


def test_biases_start_at_0_and_norms_at_1() -> None:
    state = initial()
    biases = [t for name, t in state.items() if name.endswith((".bias", ".b1", ".b2", "norm_bias"))]
    gains = [t for name, t in state.items() if name.endswith(("norm.weight", "norm_weight"))]
    # 3 layers: two matrices of attention, 2 of each dense FFN, 2 * 4 of the experts, and the norms.
    assert (len(biases), len(gains)) == (6 + 4 + 8 + 16, 16)
    assert all(not bias.any() for bias in biases)
    assert all(bool((gain == 1).all()) for gain in gains)


def build_poisoned(
    monkeypatch: pytest.MonkeyPatch, seed: int, cfg: ModelConfig
) -> Transformer | EncoderDecoder:
    """Build with NaN in memory that torch.empty leaves as it finds it."""
    empty = torch.empty

    def poisoned(*size: object, **keys: object) -> Tensor:
        tensor = empty(*size, **keys)  # type: ignore[call-overload]
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        return build_model(cfg, seed)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"norm": "pre", "tie_embeddings": False},
        {"moe": None},
        {"moe": {"num_experts": 4, "router": "linear", "gate": "sigmoid"}},
        {"moe": {"num_experts": 4, "learned_temperature": False}, "activation": "swiglu"},
        {"architecture": "encoder_decoder", "norm": "admin", "attention_positions": "relative"},
        {
            "architecture": "encoder_decoder",
            "norm": "normformer",
            "share_embeddings": True,
            "attention_positions": "xpos_relative",
            "activation": "swiglu",
            "qk_norm": True,
        },
        {"architecture": "encoder", "multiway": True, "moe": None, "embedding_norm": True},
        {"architecture": "encoder", "stable_embedding": True, "positions": "sinusoidal_fairseq"},
        {"positions": "sinusoidal", "output_projection": False, "tie_embeddings": False},
    ],
    ids=str,
)
def test_every_parameter_is_initialised_and_depends_on_the_seed_alone(
    keys: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)  # torch's own initialisation would differ
        states.append(build_poisoned(monkeypatch, 5, config(**keys)).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, first in states[0].items():
        assert not first.isnan().any(), f"{name} is not initialised"
        # Both are drawn by the same calls.
        assert torch.equal(first, states[1][name]), f"{name} depends on torch's global generator"


@pytest.mark.parametrize("parts", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)])
def test_an_experts_weights_depend_on_its_global_index_and_not_on_the_layout(
    parts: tuple[int, ...],
) -> None:
    whole = Experts(4, 8, 16, "gelu", True, 1.3)
    whole.init_weights(RandomSource(7, "blocks.1.ffn"), 0)
    stacked: dict[str, list[Tensor]] = {"w1": [], "w2": []}
    first = 0
    for size in reversed(parts):  # whichever rank is built first
        part = Experts(size, 8, 16, "gelu", True, 1.3)
        part.init_weights(RandomSource(7, "blocks.1.ffn"), 4 - first - size)
        first += size
        for name in stacked:
            stacked[name].insert(0, getattr(part, name))
    for name, tensors in stacked.items():
        # Each expert has a generator of its own, which draws the same matrix.
        assert torch.equal(torch.cat(tensors), getattr(whole, name))


def heads_of_matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first 64 numbers of every matrix, one by one where several are packed."""
    found = {}
    for name, tensor in state.items():
        if tensor.dim() == 2:
            parts = tensor.chunk(3 if "qkv_proj" in name else 2 if "kv_proj" in name else 1)
            found |= {f"{name}[{i}]": part.flatten()[:64] for i, part in enumerate(parts)}
    return found


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        # Attention, dense and sparse feed-forward networks, router, embedding, positions, output.
        ({}, 3 * 4 + 2 * 2 + 4 * 2 + 2 + 3),
        ({"activation": "swiglu"}, 3 * 4 + 2 * 3 + 4 * 3 + 2 + 3),
        (
            {"architecture": "encoder_decoder", "attention_positions": "relative"},
            # Six times self-attention, three times cross-attention, two of each stack's layers
            # dense, two embeddings, three tables of biases, the output.
            9 * 4 + 4 * 2 + 2 * (4 * 2 + 2) + 2 + 3 + 1,
        ),
        (
            {"architecture": "encoder", "multiway": True, "moe": None, "activation": "swiglu"},
            2 * (3 * 4 + 3 * 3) + 3,
        ),
    ],
    ids=str,
)
def test_no_two_matrices_start_alike(keys: dict, count: int) -> None:
    state = initial(
        **{"d_ff": 128, "norm": "pre", "max_seq_len": 300, "tie_embeddings": False} | keys
    )
    drawn = heads_of_matrices(state)
    assert len(drawn) == count
    # The first numbers of a generator are the same whatever the shape and scale of what it fills:
    # two matrices of one generator correlate by 1, others by 1 / sqrt(64) or so.
    heads = torch.stack([head.double() for head in drawn.values()])
    correlation = torch.corrcoef(heads).fill_diagonal_(0).abs()
    names = list(drawn)
    alike = [(names[i], names[j]) for i, j in (correlation > 0.9).nonzero().tolist()]
    assert alike == []


def test_both_pools_of_a_modality_are_drawn_apart_with_the_same_spread() -> None:
    state = initial(architecture="encoder", multiway=True, moe=None)
    compared = 0
    for name, first in state.items():
        if ".pools.0." not in name:
            continue
        second = state[name.replace(".pools.0.", ".pools.1.")]
        if first.dim() == 2:
            assert not torch.equal(first, second), name
            assert first.std().item() == pytest.approx(second.std().item(), rel=0.05), name
            compared += 1
        else:
            assert torch.equal(first, second), name
    assert compared == 3 * 4


def test_a_shared_embedding_is_drawn_once() -> None:
    keys = {"architecture": "encoder_decoder", "moe": None}
    shared, apart = initial(share_embeddings=True, **keys), initial(**keys)
    assert torch.equal(shared["decoder.embedding.weight"], apart["decoder.embedding.weight"])
    assert torch.equal(shared["encoder.embedding.weight"], shared["decoder.embedding.weight"])
    assert not torch.equal(apart["encoder.embedding.weight"], apart["decoder.embedding.weight"])


def test_a_stable_embedding_is_xavier_uniform() -> None:
    weight = initial(stable_embedding=True)["embedding.weight"].double()
    limit = math.sqrt(6 / (300 + 128))
    assert weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert weight.abs().max().item() <= limit
    # Uniform: the variance is limit^2 / 3, a quarter of the numbers lie above limit / 2.
    assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert (weight > limit / 2).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_tables_of_relative_positions_start_small() -> None:
    keys = {"architecture": "encoder_decoder", "attention_positions": "relative"}
    state = initial(**keys, relative_buckets=320, relative_max_distance=800)
    tables = {name: t for name, t in state.items() if name.endswith("relative_bias.weight")}
    assert sorted(tables) == [
        "decoder.cross_relative_bias.weight",
        "decoder.relative_bias.weight",
        "encoder.relative_bias.weight",
    ]
    for table in tables.values():
        assert table.std().item() == pytest.approx(0.02, rel=0.08)  # 1280 numbers: 2 % each


def test_another_seed_gives_other_weights() -> None:
    first, second = initial(seed=0), initial(seed=1)
    for name, tensor in first.items():
        if tensor.dim() == 2:
            assert not torch.equal(tensor, second[name]), name


@pytest.mark.gpu
def test_drawn_on_another_device() -> None:
    with torch.device("cuda"):
        on_device = build_model(config(), seed=3).state_dict()
    drawn = build_model(config(), seed=3, drawn_on=torch.device("cuda")).state_dict()
    assert all(torch.equal(drawn[name], tensor.cpu()) for name, tensor in on_device.items())
    assert drawn["embedding.weight"].device.type == "cpu"
