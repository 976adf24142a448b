"""Experts spread over two ranks compute what one rank computes: the same tokens, the same sums."""

import re

import pytest
import torch
from torch import Tensor

from models.config import MoEConfig
from tests.models import brute_force, programs
from tests.models.programs import CASES, NUM_EXPERTS
from tests.ranks import run_on_ranks

# The same float32 numbers through matmuls of other sizes, which sum in another order.
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
        for name in ("load", "dropped", "aux_loss"):
            assert torch.equal(two[name], one[name]), name
        assert (one["dropped"] > 0) == (case == "capacity")
    different = [rank["layers"][case, 2]["output"] for rank in ranks]
    assert not torch.allclose(*different), "the ranks must have tokens of their own"


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
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_ranks_without_any_token_have_zero_gradients(ranks: list) -> None:
    for case, idle in (("no token for rank 1", 1), ("no token for rank 0", 0)):
        for rank in range(2):
            layer = ranks[rank]["layers"][case, 2]
            assert not layer["load"][programs.UNWANTED[case]].any()
            norms = [g.norm() for name, g in layer["grads"].items() if ".experts." in name]
            assert len(norms) == 6
            assert all((norm == 0) == (rank == idle) for norm in norms)


@pytest.mark.parametrize("case", [case for case in CASES if case != "capacity"])
def test_the_mean_balance_loss_is_the_one_of_the_whole_batch(ranks: list, case: str) -> None:
    layer = programs.build(case, ep_size=1)
    parameters = brute_force.float64_parameters(layer.deepspeed_moe)
    batch = torch.cat([programs.tokens(rank).flatten(0, 1) for rank in range(2)]).double()
    moe = MoEConfig(num_experts=NUM_EXPERTS, **CASES[case])
    upstream = torch.cat([programs.tokens(rank + 10).flatten(0, 1) for rank in range(2)]).double()
    expected = brute_force.moe_layer(parameters, batch, moe, "gelu", None)
    # Each rank adds the sum over its tokens to its own balance loss, and the mean is trained on.
    ((expected.output * upstream).sum() / 2 + expected.aux_loss).backward()
    layers = [rank["layers"][case, 1] for rank in ranks]
    mean = sum(layer["aux_loss"].item() for layer in layers) / 2
    assert mean == pytest.approx(expected.aux_loss.item(), rel=1e-5)
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


def test_initial_weights_are_equal_by_global_index(ranks: list) -> None:
    one, other = (rank["states"][0] for rank in ranks)
    assert all(torch.equal(one[name], other[name]) for name in one)
    spread = [global_names(rank["states"][1], 2 * index) for index, rank in enumerate(ranks)]
    assert set(spread[0]) | set(spread[1]) == set(one)
    assert not [name for name in set(spread[0]) & set(spread[1]) if "deepspeed_experts" in name]
    for state in spread:
        for name, tensor in state.items():
            assert torch.equal(tensor, one[name]), name
