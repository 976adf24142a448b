"""The table of norm styles: measured residual scales, measured initial gains, LayerNorms."""

import math
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.config import ModelConfig, NormName
from magnetar.models.layers.norms import NORM_STYLES, Residual
from magnetar.models.transformer import Transformer, build_model, empty_model
from tests.models import brute_force

N, M = 4, 6  # layers of an encoder and of a decoder that stand together; N alone
STACKS = {
    ("decoder", ""): N,
    ("encoder", ""): N,
    ("encoder_decoder", "encoder"): N,
    ("encoder_decoder", "decoder"): M,
}
# By hand from the papers' tables: alone, encoder of two, decoder of two.
ALPHA = {"deepnorm": (8**0.25, 1.28126, 18**0.25)}  # 0.81 * (4^4 * 6)^(1/16)
GAIN = {
    "deepnorm": (32**-0.25, 0.55001, 72**-0.25),  # 0.87 * (4^4 * 6)^(-1/16)
    "subln": (math.log(8) ** 0.5, 1.41543, math.log(18) ** 0.5),  # sqrt(ln 18 * ln 8 / 3)
}
NORMS = get_args(NormName)
# LayerNorms of self-attention, cross-attention, feed-forward, and after the last block.
LAYER_NORMS = {
    "pre": (1, 1, 1, 1),
    "post": (1, 1, 1, 0),
    "subln": (2, 2, 2, 1),
    "deepnorm": (1, 1, 1, 0),
    "normformer": (2, 1, 2, 1),
    "admin": (1, 1, 1, 0),
}
ONES = (1.0, 1.0, 1.0)


def config(**keys: object) -> ModelConfig:
    base = {
        "vocab_size": 11,
        "num_layers": N,
        "d_model": 64,
        "d_ff": 96,
        "num_heads": 4,
        "max_seq_len": 8,
    }
    if keys.get("architecture") == "encoder_decoder":
        base["num_decoder_layers"] = M
    return ModelConfig.model_validate(base | keys)


def column(architecture: str, stack: str) -> int:
    return ["", "encoder", "decoder"].index(stack) if architecture == "encoder_decoder" else 0


def stack_of(model: nn.Module, stack: str) -> Transformer:
    found = model.get_submodule(stack)
    assert isinstance(found, Transformer)
    return found


def residuals(stack: Transformer) -> Iterator[tuple[int, Residual]]:
    for index, block in enumerate(stack.blocks):
        for _, module in block.named_modules():
            if isinstance(module, Residual):
                yield index, module


def test_the_table_has_a_row_for_each_key_of_the_config() -> None:
    assert sorted(NORM_STYLES) == sorted(NORMS)
    for norm in NORMS:
        assert config(norm=norm).norm == norm


@pytest.mark.parametrize(("architecture", "stack"), STACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_measured_residual_scale_is_that_of_the_table(
    norm: str, architecture: str, stack: str
) -> None:
    expected = ALPHA.get(norm, ONES)[column(architecture, stack)]
    n, m = (0 if architecture == "decoder" else N), (0 if architecture == "encoder" else M)
    if architecture == "decoder":
        m = N
    by_formula = brute_force.residual_scale(norm, n, m, stack or architecture)
    assert by_formula == pytest.approx(expected, rel=1e-5)  # the table has six digits
    modules = list(
        residuals(stack_of(empty_model(config(architecture=architecture, norm=norm)), stack))
    )
    assert len(modules) == STACKS[architecture, stack] * (3 if stack == "decoder" else 2)
    x, output = torch.randn(2, 1, 3, 64, generator=torch.Generator().manual_seed(0))
    for _, module in modules:
        module.norm = nn.Identity()
        if module.output_norm is not None:
            module.output_norm = nn.Identity()
        # The table has six digits; alpha and x are below 5.
        torch.testing.assert_close(module(x, output), expected * x + output, rtol=1e-5, atol=1e-5)


def matrices(stack: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every matrix of every layer under its role, experts one by one."""
    for block in stack.blocks:
        q, k, v = block.attention.qkv_proj.weight.chunk(3)
        yield from {
            "query": q,
            "key": k,
            "value": v,
            "out": block.attention.out_proj.weight,
        }.items()
        if block.cross_attention is not None:
            k, v = block.cross_attention.kv_proj.weight.chunk(2)
            yield from {
                "query (cross)": block.cross_attention.q_proj.weight,
                "key (cross)": k,
                "value (cross)": v,
                "out (cross)": block.cross_attention.out_proj.weight,
            }.items()
        if hasattr(block.ffn, "w1"):
            for name in ("w1", "w2", "w3"):
                yield name, getattr(block.ffn, name).weight
        else:
            experts = block.ffn.deepspeed_moe.experts
            for name in ("w1", "w2", "w3"):
                for index, weight in enumerate(getattr(experts, name)):
                    yield f"{name} of expert {index}", weight


@pytest.mark.parametrize(("architecture", "stack"), STACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_measured_initial_gain_is_that_of_the_table(
    norm: str, architecture: str, stack: str
) -> None:
    moe = {"num_experts": 2, "every": 2}
    cfg = config(architecture=architecture, norm=norm, activation="swiglu", moe=moe)
    gain = GAIN.get(norm, ONES)[column(architecture, stack)]
    roles = set()
    for role, weight in matrices(stack_of(build_model(cfg, seed=0), stack)):
        roles.add(role)
        expected = 1.0 if role.startswith(("query", "key")) else gain
        expected *= math.sqrt(2 / sum(weight.shape))
        # A sample of 4096 has a relative error of 1 / sqrt(2 * 4096) = 1.1 %: five of them. The
        # wrong fan of a packed matrix is 1.41 (q, k, v) or 1.22 (k, v) off.
        assert weight.double().std().item() == pytest.approx(expected, rel=0.055), role
    assert len(roles) == 4 + 3 + 2 * 3 + 4 * (stack == "decoder")


@pytest.mark.parametrize(
    ("architecture", "stack"), [("decoder", ""), ("encoder_decoder", "decoder")]
)
@pytest.mark.parametrize("norm", ["subln", "deepnorm"])
def test_alpha_and_gain_follow_the_depth(norm: str, architecture: str, stack: str) -> None:
    for layers in (1, 24):
        keys = {"d_model": 4, "d_ff": 4, "num_heads": 1, "num_layers": layers}
        if stack:
            keys["num_decoder_layers"] = 5
        block = stack_of(
            empty_model(config(architecture=architecture, norm=norm, **keys)), stack
        ).blocks[0]
        n, m = (layers, 5) if stack else (0, layers)
        assert block.ffn.gain == pytest.approx(brute_force.initial_gain(norm, n, m, "decoder"))
        assert block.attention.gain == block.ffn.gain
        assert block.ffn_residual.alpha == pytest.approx(
            brute_force.residual_scale(norm, n, m, "decoder")
        )


@pytest.mark.parametrize(
    ("architecture", "stack", "multiway"),
    [(*stack, False) for stack in STACKS] + [("encoder", "", True)],
)
@pytest.mark.parametrize("norm", NORMS)
def test_the_table_says_how_many_layer_norms_a_sublayer_has(
    norm: str, architecture: str, stack: str, multiway: bool
) -> None:
    model = empty_model(config(architecture=architecture, norm=norm, multiway=multiway))

    def count(*parts: nn.Module | None) -> int:
        modules = [module for part in parts if part is not None for module in part.modules()]
        return sum(isinstance(module, nn.LayerNorm) for module in modules) // (1 + multiway)

    own = stack_of(model, stack)
    attention, cross_attention, ffn, final = LAYER_NORMS[norm]
    for block in own.blocks:
        assert count(block.attention, block.attention_residual) == attention
        assert count(block.ffn, block.ffn_residual) == ffn
        has_cross = stack == "decoder"
        assert (block.cross_attention is not None) == has_cross
        if has_cross:
            parts = block.cross_attention, block.cross_attention_residual
            assert count(*parts) == cross_attention
    assert count(own.final_norm) == final


def test_cross_attention_may_go_without_sub_lns_inner_norm() -> None:
    keys = {"architecture": "encoder_decoder", "norm": "subln"}
    with_norm = empty_model(config(**keys)).decoder.blocks[0]
    without = empty_model(config(**keys, cross_attention_inner_norm=False)).decoder.blocks[0]
    assert isinstance(with_norm.cross_attention.inner_norm, nn.LayerNorm)
    assert isinstance(without.cross_attention.inner_norm, nn.Identity)
    assert isinstance(without.attention.inner_norm, nn.LayerNorm)


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_norm_eps_reaches_every_layer_norm(architecture: str) -> None:
    for norm in NORMS:
        keys = {"qk_norm": True, "embedding_norm": True, "stable_embedding": True}
        moe = {"num_experts": 2, "every": 2}
        cfg = config(architecture=architecture, norm=norm, norm_eps=0.07, moe=moe, **keys)
        for name, module in empty_model(cfg).named_modules():
            if isinstance(module, nn.LayerNorm):
                assert module.eps == 0.07, name
            if name.endswith("deepspeed_experts") or hasattr(module, "norm_eps"):
                assert module.norm_eps == 0.07, name


def test_admin_starts_as_post_ln() -> None:
    for architecture in ("decoder", "encoder", "encoder_decoder"):
        tokens = torch.arange(8).unsqueeze(0)
        models = [
            build_model(config(architecture=architecture, norm=n), 0) for n in ("admin", "post")
        ]
        inputs = (tokens, tokens) if architecture == "encoder_decoder" else (tokens,)
        first, second = (model(*inputs).logits for model in models)
        assert torch.equal(first, second)  # a factor of 1 rounds nothing
        omegas = [p for name, p in models[0].named_parameters() if name.endswith("omega")]
        assert len(omegas) == (2 * N + 3 * M if architecture == "encoder_decoder" else 2 * N)
        assert all(bool((omega == 1).all()) for omega in omegas)
        first.square().sum().backward()
        assert all(omega.grad.any() for omega in omegas)


def residual(norm: str, **keys: float) -> Residual:
    options = {"dropout": 0.0, "drop_path": 0.0, "norm_eps": 1e-5} | keys
    module = Residual(NORM_STYLES[norm], "ffn", 5, 1.0, multiway=False, **options)
    module.norm = nn.Identity()
    return module


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_drop_path_drops_a_samples_whole_output_and_scales_the_others(norm: str) -> None:
    torch.manual_seed(0)
    module, samples = residual(norm, drop_path=0.4), 4000
    x, output = torch.randn(samples, 3, 5), 1 + torch.rand(samples, 3, 5)
    ratio = (module(x, output) - x) / output
    kept = ratio[:, 0, 0] > 0.5
    expected = kept.view(-1, 1, 1).expand_as(ratio) / 0.6
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=1e-4)  # all or nothing
    # Four standard deviations of a binomial share: 4 * sqrt(0.24 / 4000) = 0.031.
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.031)
    assert torch.equal(module.eval()(x, output), x + output)


def test_drop_path_keeps_the_dtype() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    assert residual("pre", drop_path=0.5)(x, x).dtype == torch.bfloat16


@pytest.mark.parametrize(("architecture", "stack"), STACKS)
def test_drop_path_rises_linearly_from_0_in_the_first_layer(architecture: str, stack: str) -> None:
    torch.manual_seed(0)
    model = empty_model(config(architecture=architecture, drop_path=0.6, norm="pre"))
    layers, output = STACKS[architecture, stack], torch.ones(3000, 1, 1)
    for index, module in residuals(stack_of(model, stack)):
        dropped = (module(torch.zeros(1), output) == 0).float().mean().item()
        expected = 0.6 * index / (layers - 1)
        # Four standard deviations of a binomial share, at most 4 * 0.5 / sqrt(3000) = 0.037.
        assert dropped == pytest.approx(expected, abs=0.037 if index else 0.0)


def test_dropout_acts_on_the_sublayers_output_and_not_on_the_residual() -> None:
    torch.manual_seed(0)
    module, x = residual("pre", dropout=0.3), torch.full((40, 30, 5), 10.0)
    out = module(x, torch.ones_like(x))
    dropped = out == 10
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 10 + 1 / 0.7))
