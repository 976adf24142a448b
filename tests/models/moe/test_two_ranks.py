"""Experts spread over two ranks compute what one rank computes: the same tokens, the same sums."""

import math
import re

import pytest
import torch
from torch import Tensor

from magnetar.models.moe.config import MoEConfig
from tests.models import brute_force, programs
from tests.models.programs import CASES, NUM_EXPERTS
from tests.ranks import run_on_ranks

# The same float32 numbers through matmuls of other sizes, which sum in another order (see
# OTHER_ORDER in test_layer.py).
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_on_ranks("tests.models.programs:everything", 2)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_statistics_equal_those_of_one_rank(ranks: list, case: str) -> None:
    for rank in ranks:
        one, two = rank["layers"][case, 1], rank["layers"][case, 2]
        torch.testing.assert_close(two["output"], one["output"], **ROUNDING)
        torch.testing.assert_close(two["uneven"], one["uneven"], **ROUNDING)
        # Routing precedes the all-to-all: the same operations on the same tokens.
        for name in ("load", "dropped", "aux_loss", "z_loss", "entropy"):
            assert torch.equal(two[name], one[name]), name
        assert (one["dropped"] > 0) == ("capacity" in case)
    different = [rank["layers"][case, 2]["output"] for rank in ranks]
    if case != "all is padding":
        assert not torch.allclose(*different), "the ranks must have tokens of their own"


@pytest.mark.parametrize("case", [case for case in CASES if "padding" in case])
def test_padding_gets_zeros_and_no_gradient(ranks: list, case: str) -> None:
    for index, rank in enumerate(ranks):
        mask = programs.padding(case, index)
        for ep_size in (1, 2):
            layer = rank["layers"][case, ep_size]
            assert (layer["output"][mask] == 0).all()
            assert (layer["input_grad"][mask] == 0).all()
            num_real = (~mask).sum()
            assert layer["load"].sum() == CASES[case].get("top_k", 2) * num_real
            assert layer["output"].any() == (num_real > 0)
            if case == "all is padding":
                assert layer["aux_loss"] == layer["z_loss"] == layer["entropy"] == 0
                assert not any(grad.any() for grad in layer["grads"].values())


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_rank(ranks: list, case: str) -> None:
    whole = [rank["layers"][case, 1] for rank in ranks]
    for index, rank in enumerate(ranks):
        own = rank["layers"][case, 2]
        torch.testing.assert_close(own["input_grad"], whole[index]["input_grad"], **ROUNDING)
        for name, grad in own["grads"].items():
            if ".experts." in name:
                # An expert's gradient sums over the tokens of both ranks, wherever it lives.
                local = slice(2 * index, 2 * index + 2)
                expected = whole[0]["grads"][name][local] + whole[1]["grads"][name][local]
            else:
                expected = whole[index]["grads"][name]
            # Sums over up to 108 rows of numbers up to 10, in another order: 108 * 10 * 2^-24.
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_ranks_without_any_token_have_zero_gradients(ranks: list) -> None:
    for case, idle in (("no token for rank 1", 1), ("no token for rank 0", 0)):
        for rank in range(2):
            layer = ranks[rank]["layers"][case, 2]
            assert not layer["load"][programs.UNWANTED[case]].any()
            norms = [g.norm() for name, g in layer["grads"].items() if ".experts." in name]
            assert len(norms) == 6
            assert all((norm == 0) == (rank == idle) for norm in norms)


def real_tokens(case: str, seed: int) -> Tensor:
    """(N, D) float64, those of both ranks that are not padding."""
    found = []
    for rank in range(2):
        mask, x = programs.padding(case, rank), programs.tokens(rank + seed)
        found.append(x.flatten(0, 1) if mask is None else x[~mask])
    return torch.cat(found).double()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("capacity of each rank", "all is padding")]
)
def test_two_ranks_compute_what_one_would_of_both_their_tokens(ranks: list, case: str) -> None:
    layer = programs.build(case, ep_size=1)
    parameters = brute_force.float64_parameters(layer.deepspeed_moe)
    moe = MoEConfig(num_experts=NUM_EXPERTS, **programs.moe_keys(case))
    activation = CASES[case].get("activation", "gelu")
    h = real_tokens(case, 0)
    capacity = None
    if moe.capacity_factor is not None:
        capacity = math.ceil(moe.capacity_factor * moe.top_k * len(h) / NUM_EXPERTS)
    expected = brute_force.moe_layer(parameters, h, moe, activation, capacity)
    # Each rank adds the sum over its tokens to its own losses, and the mean is trained on.
    own = (expected.output * real_tokens(case, 10)).sum() / 2
    (own + expected.aux_loss + expected.z_loss).backward()
    layers = [rank["layers"][case, 1] for rank in ranks]
    outputs = []
    # From here on float32 against float64: a router, a LayerNorm, matrices, and for losses and
    # gradients sums over up to 36 tokens, 36 * 2^-24 = 2e-6 of their size, which is up to 10.
    for index, layer in enumerate(layers):
        mask, out = programs.padding(case, index), layer["output"]
        outputs.append(out.flatten(0, 1) if mask is None else out[~mask])
    torch.testing.assert_close(
        torch.cat(outputs).double(), expected.output.detach(), rtol=1e-4, atol=1e-4
    )
    assert sum(layer["load"] for layer in layers).tolist() == expected.load
    assert sum(layer["dropped"].item() for layer in layers) == expected.dropped
    for name in ("aux_loss", "z_loss", "entropy"):
        mean = sum(layer[name].item() for layer in layers) / 2
        assert mean == pytest.approx(getattr(expected, name).item(), rel=1e-5), name
    for name, parameter in parameters.items():
        grads = [layer["grads"][f"deepspeed_moe.{name}"] for layer in layers]
        reference = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            (sum(grads) / 2).double(), reference, rtol=1e-4, atol=1e-4, msg=name
        )


def global_names(state: dict[str, Tensor], first_expert: int) -> dict[str, Tensor]:
    """Keys with an expert's global index in place of the local one."""
    return {
        re.sub(
            r"deepspeed_experts\.(\d+)\.",
            lambda found: f"deepspeed_experts.{int(found[1]) + first_expert}.",
            name,
        ): tensor
        for name, tensor in state.items()
    }


def test_a_capacity_of_each_rank_drops_other_tokens(ranks: list) -> None:
    for rank in ranks:
        own, shared = (rank["layers"][case, 1] for case in ("capacity of each rank", "capacity"))
        assert torch.equal(own["load"], shared["load"])
        assert own["dropped"] == sum((own["load"] - 6).clamp(min=0))  # ceil(0.6 * 2 * 18 / 4)
    dropped = {
        case: [rank["layers"][case, 1]["dropped"].item() for rank in ranks]
        for case in ("capacity of each rank", "capacity")
    }
    assert len(set(map(tuple, dropped.values()))) == 2, "both scopes drop the same"


def test_initial_weights_are_equal_by_global_index(ranks: list) -> None:
    one, other = (rank["states"][0] for rank in ranks)
    # Weights are drawn by name and index, by the same calls on each rank.
    assert all(torch.equal(one[name], other[name]) for name in one)
    spread = [global_names(rank["states"][1], 2 * index) for index, rank in enumerate(ranks)]
    assert set(spread[0]) | set(spread[1]) == set(one)
    assert not [name for name in set(spread[0]) & set(spread[1]) if "deepspeed_experts" in name]
    for state in spread:
        for name, tensor in state.items():
            assert torch.equal(tensor, one[name]), name
