"""The decoder against a float64 reference written from the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data.packed_lm
from models.attention import SelfAttention
from models.config import ModelConfig, MoEConfig
from models.norms import NORM_STYLES, subln_gain
from models.transformer import (
    IGNORE_INDEX,
    Decoder,
    build_model,
    flops_per_token,
    num_parameters,
    token_losses,
)
from tests.models import brute_force

VOCAB, T = 23, 10
MOE = {"num_experts": 4, "every": 2}


def config(**keys: object) -> ModelConfig:
    base = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "num_heads": 4,
        "max_seq_len": 12,
    }
    return ModelConfig.model_validate(base | keys)


def random_model(**keys: object) -> Decoder:
    model = Decoder(config(**keys))
    brute_force.randomize(model)
    return model


def token_ids(batch: int = 2, length: int = T, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


@pytest.mark.parametrize("inner_norm", [True, False])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_equals_an_explicit_softmax(num_heads: int, inner_norm: bool) -> None:
    layer = SelfAttention(16, num_heads, dropout=0.0, inner_norm=inner_norm, gain=1.0).double()
    brute_force.randomize(layer)
    x = torch.randn(2, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, parameters = layer(x), dict(layer.named_parameters())
    for row, found in zip(x, out, strict=True):
        expected = brute_force.attention(row, parameters, num_heads)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # float64 both


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", ["subln", "pre"])
def test_a_dense_decoder_equals_the_formulas(norm: str, activation: str, tie: bool) -> None:
    model = random_model(norm=norm, activation=activation, tie_embeddings=tie).double()
    tokens, parameters = token_ids(), dict(model.named_parameters())
    logits, routing = model(tokens)
    assert routing == []
    for row, found in zip(tokens, logits, strict=True):
        expected = brute_force.decoder(parameters, row, 2, 4, activation)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # float64 both


@pytest.mark.parametrize("norm", ["subln", "pre"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_sparse_decoder_equals_the_formulas(norm: str, every: int) -> None:
    moe = MoEConfig(num_experts=4, every=every)
    model = random_model(norm=norm, num_layers=3, moe=moe.model_dump())
    tokens, parameters = token_ids(batch=1), brute_force.float64_parameters(model)
    with torch.no_grad():
        logits, routing = model(tokens)
        expected = brute_force.decoder(parameters, tokens[0], 3, 4, moe=moe)
    assert len(routing) == 3 // every
    # float32 through three layers; logits are of size 1 to 5.
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-3, atol=2e-4)


def test_sub_ln_has_two_norms_in_each_sublayer_and_pre_ln_one() -> None:
    per_block = {"pre": 2, "subln": 4}
    for norm, count in per_block.items():
        names = [n for n, _ in Decoder(config(norm=norm)).named_parameters() if "norm.weight" in n]
        assert len(names) == 2 * count + 1, names  # two blocks and the final norm
        assert NORM_STYLES[norm].inner == (norm == "subln")


@pytest.mark.parametrize("layers", [1, 6, 96])
def test_the_gain_of_sub_ln_is_the_root_of_ln_2m(layers: int) -> None:
    assert math.exp(subln_gain(layers) ** 2) == pytest.approx(2 * layers, rel=1e-12)
    assert NORM_STYLES["subln"].gain(layers) == subln_gain(layers)
    assert NORM_STYLES["pre"].gain(layers) == 1.0


@pytest.mark.parametrize("moe", [None, MOE])
def test_a_later_token_changes_no_earlier_logit(moe: dict | None) -> None:
    model = random_model(moe=moe).eval()
    tokens = token_ids()
    before = model(tokens).logits
    for position in range(1, T):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = model(changed).logits
        if moe is None:
            assert torch.equal(after[:, :position], before[:, :position])
        else:
            # Another token's expert moves the borders of the matmuls' blocks, nothing else.
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-5)
        difference = (after[:, position:] - before[:, position:]).abs().amax(-1)
        assert (difference > 1e-3).all(), "later logits must depend on the token"


def test_a_sequence_changes_no_logit_of_another_one() -> None:
    model = random_model(moe=MOE).eval()
    tokens = token_ids(batch=3)
    alone = model(tokens[1:2]).logits
    # Matmuls of other sizes sum in another order.
    torch.testing.assert_close(model(tokens).logits[1:2], alone, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_alone_and_each_of_both_acts() -> None:
    tokens, plain = token_ids(), random_model(moe=MOE)
    expected = plain(tokens).logits
    for key in ("dropout", "attention_dropout"):
        model = random_model(moe=MOE, **{key: 0.5})
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-2), key
        assert torch.equal(model.eval()(tokens).logits, plain.eval()(tokens).logits), key


def test_the_output_projection_is_the_embedding_only_if_tied() -> None:
    tied, untied = random_model(), random_model(tie_embeddings=False)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight
    assert not torch.equal(untied.output.weight, untied.embedding.weight)


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    model = build_model(config(d_model=256, d_ff=256, vocab_size=500, num_layers=1), seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(500, (16, 13), generator=generator)
    total, count = token_losses(model(tokens[:, :-1]).logits, tokens[:, 1:])
    # Logits of variance s^2 = 256 * 0.02^2 add s^2 / 2 = 0.05 to ln V.
    assert (total / count).item() == pytest.approx(math.log(500) + 0.05, abs=0.05)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("norm", ["subln", "pre"])
@pytest.mark.parametrize(
    "moe",
    [
        None,
        {"num_experts": 4, "every": 2},
        {"num_experts": 6, "every": 1, "top_k": 1, "d_router": 3},
        {"num_experts": 40, "every": 3, "router": "linear"},
        {"num_experts": 40, "every": 2, "gate": "sigmoid"},
    ],
    ids=str,
)
def test_num_parameters_equals_a_count(moe: dict | None, norm: str, tie: bool) -> None:
    cfg = config(num_layers=4, moe=moe, norm=norm, tie_embeddings=tie)
    total = active = 0
    for name, parameter in Decoder(cfg).named_parameters():
        total += parameter.numel()
        if name == "positions.weight" or (name == "embedding.weight" and not tie):
            continue  # a look-up; a tied embedding is the output projection as well
        if ".experts." in name:
            assert cfg.moe is not None
            active += cfg.moe.top_k * parameter[0].numel()
        else:
            active += parameter.numel()
    assert num_parameters(cfg) == (total, active)


@pytest.mark.parametrize("seq_len", [4, 64])
def test_flops_equal_the_ones_that_torch_counts(seq_len: int) -> None:
    cfg = config(max_seq_len=64, num_layers=3)
    model = build_model(cfg, seed=0)
    tokens = token_ids(2, seq_len)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).logits.sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    # torch counts the whole square of attention, of which a causal model needs half, and counts
    # no vector: 6 FLOPs a token each in ours.
    matrices = counts["aten.mm"] + counts["aten.addmm"] + counts["aten.bmm"] / 2
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert flops_per_token(cfg, seq_len) == matrices / tokens.numel() + 6 * vectors


def test_flops_grow_with_top_k_and_not_with_the_number_of_experts() -> None:
    def flops(**moe: object) -> float:
        return flops_per_token(config(moe={"every": 2, "router": "linear"} | moe), T)

    expert = 2 * 16 * 24 + 24 + 16 + 2 * 24
    assert flops(num_experts=8, top_k=2) - flops(num_experts=8, top_k=1) == 6 * expert
    assert flops(num_experts=8) - flops(num_experts=4) == 6 * 4 * 16  # four more router rows
    assert flops(num_experts=1, top_k=1) == flops_per_token(config(), T) + 6 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_equal_cross_entropy_in_float64(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(3, T, VOCAB, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets = token_ids(3)
    targets[0, 4:] = IGNORE_INDEX
    targets[2] = IGNORE_INDEX
    total, count = token_losses(logits, targets)
    expected = 0.0
    for b, t in [(b, t) for b in range(3) for t in range(T) if targets[b, t] != IGNORE_INDEX]:
        row = logits[b, t].double()
        expected -= math.log(row.exp()[targets[b, t]] / row.exp().sum())
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count.item() == 4 + T
    ours = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert expected == pytest.approx(ours.item(), rel=1e-12)


def test_a_batch_without_targets_has_loss_0_and_count_0() -> None:
    targets = torch.full((1, T), IGNORE_INDEX)
    total, count = token_losses(torch.randn(1, T, VOCAB), targets)
    assert (total.item(), count.item()) == (0.0, 0)


def test_data_and_model_ignore_the_same_targets() -> None:
    assert data.packed_lm.IGNORE_INDEX == IGNORE_INDEX


def test_a_decoder_learns_to_copy_the_previous_token() -> None:
    model = build_model(config(d_model=32, moe={"num_experts": 4, "every": 2}), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        tokens = token_ids(16, T, seed=step)
        logits, routing = model(tokens)
        loss, count = token_losses(logits[:, 1:], tokens[:, :-1])
        optimizer.zero_grad()
        (loss / count + 0.01 * routing[0].aux_loss).backward()
        optimizer.step()
        losses.append((loss / count).item())
    assert losses[0] > 0.9 * math.log(VOCAB)
    assert losses[-1] < 0.5, "attention cannot reach one token back"
