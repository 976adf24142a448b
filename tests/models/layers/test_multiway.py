"""Each modality has parameters of its own, and none of the other's."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.config import NormName
from magnetar.models.layers.multiway import Multiway, per_modality
from magnetar.models.transformer import Transformer
from tests.models import brute_force
from tests.models.small import random_model

T = 6


def model(**keys: object) -> Transformer:
    base = {"architecture": "encoder", "multiway": True, "embedding_norm": True}
    built = random_model(**base | keys)
    assert isinstance(built, Transformer)
    return built


def tokens() -> Tensor:
    return torch.randint(23, (2, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("split", "first"), [(None, T), (0, 0), (1, 1), (4, 4), (T, T), (T + 1, T), (-1, 0)]
)
def test_positions_before_the_split_are_the_first_pools(split: int | None, first: int) -> None:
    module = Multiway(nn.Linear(3, 5))
    brute_force.randomize(module)
    x = torch.randn(2, T, 3)
    out = module(x, split)
    # Matrices of other shapes: sums of 3 products in another order (assert_close allows 1e-5).
    torch.testing.assert_close(out[:, :first], module.pools[0](x[:, :first]))
    torch.testing.assert_close(out[:, first:], module.pools[1](x[:, first:]))
    assert not torch.allclose(module.pools[0](x), module.pools[1](x), atol=1e-2)
    torch.testing.assert_close(per_modality(module, x, split), out)
    plain = nn.Linear(3, 5)
    assert torch.equal(per_modality(plain, x, split), plain(x))


@pytest.mark.parametrize("norm", get_args(NormName))
def test_a_modality_that_is_absent_gets_no_gradient(norm: str) -> None:
    for split, used in ((None, {0}), (0, {1}), (T, {0}), (2, {0, 1})):
        built = model(norm=norm)
        # Squares of the logits: the sum of a LayerNorm's output would have no gradient.
        built(tokens(), split_position=split).logits.square().sum().backward()
        for name, parameter in built.named_parameters():
            if ".pools." in name:
                pool = int(name.split(".pools.")[1][0])
                has_gradient = parameter.grad is not None and bool(parameter.grad.any())
                assert has_gradient == (pool in used), (name, split)


def test_everything_that_the_paper_doubles_is_doubled_and_nothing_else() -> None:
    shared = {
        name for name, _ in model(norm="normformer").named_parameters() if "pools" not in name
    }
    assert shared == {
        "embedding.weight",
        "positions.weight",
        "blocks.0.attention.head_scale",
        "blocks.1.attention.head_scale",
        "output.weight",
    } - {"output.weight"}  # tied
    names = {name for name, _ in model(norm="subln").named_parameters()}
    for prefix in (
        "embedding_norm",
        "blocks.0.attention.qkv_proj",
        "blocks.0.attention.out_proj",
        "blocks.0.attention.inner_norm",
        "blocks.1.attention_residual.norm",
        "blocks.1.ffn_residual.norm",
        "final_norm",
    ):
        for pool in (0, 1):
            assert {f"{prefix}.pools.{pool}.weight", f"{prefix}.pools.{pool}.bias"} <= names
    assert {f"blocks.0.ffn.pools.{pool}.w1.weight" for pool in (0, 1)} <= names
    assert {f"blocks.0.ffn.pools.{pool}.inner_norm.weight" for pool in (0, 1)} <= names
