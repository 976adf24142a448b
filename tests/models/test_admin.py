"""Admin: the profile against variances by hand, and folding against the unfolded model."""

import math

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.admin import (
    fold_admin,
    omegas,
    recorded_moments,
    set_omegas,
    stacks,
    sublayers,
    variances,
)
from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, Transformer, build_model, empty_model
from tests.models.brute_force import randomize

VOCAB, LENGTH = 29, 12
# Folding multiplies other numbers: some 40 float32 roundings of logits below 4, 40 * 4 * 2^-24.
FOLDED = 1e-5
MOE = {"num_experts": 4, "every": 2}
OPTIONS = [
    {},
    {"tie_embeddings": False},
    {"embedding_norm": True, "dropout": 0.2},
    {"stable_embedding": True},
    {"scale_embedding": True, "qk_norm": True},
    {"positions": "sinusoidal"},
    {"positions": "sinusoidal_fairseq", "stable_embedding": True},
    {"attention_positions": "relative"},
    {"attention_positions": "xpos", "activation": "swiglu"},
    {"moe": MOE},
    {"moe": MOE | {"router": "linear"}, "activation": "swiglu"},
    {"norm_type": "rmsnorm", "bias": False, "embedding_norm": True, "num_kv_heads": 1},
    {"moe": MOE | {"shared_d_ff": 12, "shared_gate": True}, "norm_type": "rmsnorm"},
    {"architecture": "encoder", "multiway": True},
    {"architecture": "encoder", "moe": MOE},
    {"architecture": "encoder_decoder"},
    {"architecture": "encoder_decoder", "share_embeddings": True, "moe": MOE},
    {"architecture": "encoder_decoder", "share_embeddings": True, "stable_embedding": True},
]


def config(**keys: object) -> ModelConfig:
    base = {"vocab_size": VOCAB, "num_layers": 3, "d_model": 16, "d_ff": 24, "num_heads": 2}
    return ModelConfig.model_validate(base | {"max_seq_len": LENGTH, "norm": "admin"} | keys)


def inputs_of(model: nn.Module, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    count = 2 if isinstance(model, EncoderDecoder) else 1
    return tuple(torch.randint(0, VOCAB, (3, LENGTH), generator=generator) for _ in range(count))


def trained(**keys: object) -> Transformer | EncoderDecoder:
    """A model none of whose numbers is what it started as."""
    model = build_model(config(**keys), seed=1).eval()
    randomize(model, std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("omega"):
            parameter.data.abs_().add_(0.5)
    return model


@pytest.mark.parametrize("keys", OPTIONS, ids=str)
@torch.no_grad()
def test_a_folded_model_is_post_ln_with_the_same_logits(keys: dict) -> None:
    model = trained(**keys)
    folded_config, tensors = fold_admin(model.config, model.state_dict())
    folded = empty_model(folded_config).eval()
    missing, unexpected = folded.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert all("output.weight" in name or "encoder.embedding" in name for name in missing), missing
    assert folded_config.norm == "post"
    assert not any("omega" in name for name in tensors)
    found, expected = folded(*inputs_of(model)).logits, model(*inputs_of(model)).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=FOLDED)


def test_folding_leaves_the_given_model_as_it_was() -> None:
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_admin(model.config, model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_of_another_norm_has_nothing_to_fold() -> None:
    model = build_model(config(norm="post"), seed=1)
    with pytest.raises(ValueError, match="norm='post' has no omega to fold: give a model with"):
        fold_admin(model.config, model.state_dict())


@torch.no_grad()
def test_omegas_of_any_size_and_sign_are_folded() -> None:
    """Training moves some of them through 0."""
    model = trained()
    assert isinstance(model, Transformer)
    for block in model.blocks:
        omega = block.attention_residual.omega
        omega[:6] = torch.tensor([0.0, -0.0, 1e-7, -1e-7, -0.5, 1e3])
    config, tensors = fold_admin(model.config, model.state_dict())
    folded = empty_model(config).eval()
    folded.load_state_dict(tensors, strict=False)
    inputs = inputs_of(model)
    torch.testing.assert_close(folded(*inputs).logits, model(*inputs).logits, rtol=0, atol=FOLDED)


def test_an_omega_that_is_no_number_is_not_folded() -> None:
    model = trained()
    assert isinstance(model, Transformer)
    model.blocks[1].attention_residual.omega.data[3] = math.nan
    with pytest.raises(ValueError, match="omega of sublayer 3 of the decoder is not finite"):
        fold_admin(model.config, model.state_dict())


def by_hand(stack: Transformer, x: Tensor) -> list[float]:
    """Population variances of the embedding and of each sublayer's output, omega being 1."""
    found = [x]
    for block in stack.blocks:
        f = block.attention(x, is_causal=True)
        x = block.attention_residual.norm(x + f)
        g = block.ffn(x)
        x = block.ffn_residual.norm(x + g)
        found += [f, g]
    return [((value - value.mean()) ** 2).mean().item() for value in found]


@torch.no_grad()
def test_the_profile_is_the_variance_of_every_sublayers_output() -> None:
    model = build_model(config(), seed=1).eval()
    assert isinstance(model, Transformer)
    (tokens,) = inputs_of(model)
    with recorded_moments(model) as moments:
        for row in tokens:  # moments add up over batches
            model(row.unsqueeze(0))
    expected = by_hand(model, model.embed(tokens))
    assert variances(moments["decoder"]) == pytest.approx(expected, rel=1e-5)  # float32 outputs
    model(tokens)  # no longer recorded
    assert variances(moments["decoder"]) == pytest.approx(expected, rel=1e-5)


def test_omega_is_the_root_of_the_variances_so_far() -> None:
    profile = [0.5, 1.0, 2.0, 4.0, 8.0]
    expected = [1.0, math.sqrt(1.5), math.sqrt(3.5), math.sqrt(7.5)]
    assert omegas(profile) == pytest.approx(expected, rel=1e-15)  # float64, the same sums


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_every_sublayer_of_every_stack_gets_its_omega(architecture: str) -> None:
    model = build_model(config(architecture=architecture, num_layers=2), seed=1)
    per_layer = {"encoder": 2, "decoder": 3 if architecture == "encoder_decoder" else 2}
    profile = {
        name: [float(i + 1) for i in range(1 + 2 * per_layer[name])] for name in stacks(model)
    }
    set_omegas(model, profile)
    for name, stack in stacks(model).items():
        values = [residual.omega for _, residual in sublayers(stack)]
        expected = omegas(profile[name])
        assert len(values) == 2 * per_layer[name]
        for value, number in zip(values, expected, strict=True):
            assert torch.equal(value, torch.full_like(value, number))  # float32(number) each
