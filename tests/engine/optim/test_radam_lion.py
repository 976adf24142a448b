"""RAdam and Lion: their updates, their states through checkpoints, who is refused."""

from typing import Any

import pytest
import torch

from magnetar.engine.config.schema import check_config
from magnetar.engine.memory_planner import memory_of_rank, parameters_of
from magnetar.engine.optim.adam import take_client_optimizer
from magnetar.engine.optim.lion import Lion
from tests.engine.programs import BASE, with_keys
from tests.machine import as_param, case_id, is_runnable
from tests.ranks import run_on_ranks

STAGE, EP, TYPE = "zero_optimization.stage", "magnetar.model.moe.ep_size", "optimizer.type"
NUMBERS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def gradients(num_steps: int) -> torch.Tensor:
    """(num_steps, 300) float32; the last third of the elements have none."""
    drawn = torch.randn(num_steps, 300, generator=torch.Generator().manual_seed(1))
    drawn[:, 200:] = 0
    return drawn


def trained(optimizer_of: Any, num_steps: int) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    optimizer = optimizer_of([weight])
    for gradient in gradients(num_steps):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_lion_follows_its_algorithm_in_float64() -> None:
    weight, momentum = torch.linspace(-1, 1, 300).double(), torch.zeros(300).double()
    for gradient in gradients(20).double():
        sign = torch.sign(0.9 * momentum + 0.1 * gradient)
        weight = weight - 1e-2 * (sign + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    found = trained(lambda params: Lion(params, **NUMBERS), 20)
    # 20 updates round to 2^-24 of weights of 1; no mix of these gradients is near 0.
    assert torch.allclose(found.double(), weight, rtol=0, atol=40 * 2**-24)


@pytest.mark.needs("bitsandbytes")
def test_lion_equals_bitsandbytes_lion() -> None:
    from bitsandbytes.optim import Lion32bit

    found = trained(lambda params: Lion(params, **NUMBERS), 20)
    theirs = trained(lambda params: Lion32bit(params, min_8bit_size=1, **NUMBERS), 20)
    assert torch.allclose(found, theirs, rtol=0, atol=40 * 2**-24)


def test_radam_is_pytorchs_with_decoupled_decay() -> None:
    sections = {"optimizer": {"type": "RAdam", "params": {**NUMBERS, "eps": 1e-8}}}
    make = take_client_optimizer(sections)
    assert make is not None
    assert "optimizer" not in sections
    (group,) = make([{"params": [torch.nn.Parameter(torch.zeros(1))]}]).param_groups
    assert group["decoupled_weight_decay"]
    assert {name: group[name] for name in NUMBERS} == NUMBERS


LAYOUTS = [
    *({STAGE: stage, EP: ep} for stage, ep in ((0, 1), (1, 2), (2, 1), (3, 2))),
    {STAGE: 1, EP: 2, "bf16.enabled": True, "data_types.grad_accum_dtype": "fp32"},
    {STAGE: 3, EP: 2, "bf16.enabled": True, "zero_optimization.sub_group_size": 3000},
    {STAGE: 2, "zero_optimization.offload_optimizer": {"device": "cpu"}},
]
SAME = [
    (own | layout, own | layout)
    for own in ({TYPE: "RAdam"}, {TYPE: "Lion", "optimizer.params.lr": 3e-4})
    for layout in LAYOUTS
]
OTHER = [
    (own[0] | LAYOUTS[a], own[0] | LAYOUTS[b])
    for own in (SAME[0], SAME[len(LAYOUTS)])
    for a, b in ((0, 3), (3, 1))
]
PAIRS = SAME + OTHER


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """What happens to each pair of PAIRS that this machine can run."""
    indices = [index for index, pair in enumerate(PAIRS) if is_runnable(*pair)]
    pairs, folder = [PAIRS[index] for index in indices], tmp_path_factory.mktemp("runs")
    found = run_on_ranks("tests.engine.programs:resumed", 2, pairs, str(folder), timeout=900)[0]
    return dict(zip(indices, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "index",
    [
        as_param(index, cases=pair, id=f"{case_id(pair[0])} to {case_id(pair[1])}")
        for index, pair in enumerate(PAIRS)
    ],
)
def test_a_run_resumed_goes_on_as_if_it_had_not_stopped(
    resumed: dict[int, dict], index: int
) -> None:
    found = resumed[index]
    if index < len(SAME):
        assert found["differing"] == 0
        assert found["resumed"] == found["losses"]
    else:
        # Another layout sums in another order, as in test_resume.py.
        assert found["resumed"] == pytest.approx(found["losses"], rel=0, abs=800 * 2**-24)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {TYPE: "Lion", "optimizer.params.torch_adam": False},
            ['torch_adam=false belongs to types "Adam" and "AdamW", not to "Lion"', "remove it"],
        ),
        (
            {TYPE: "RAdam", "optimizer.params.adam_w_mode": False},
            ['adam_w_mode=false contradicts optimizer.type="RAdam"', "remove it"],
        ),
        (
            {TYPE: "Lion", "optimizer.params.eps": 1e-6},
            ['eps=1e-06 says nothing with optimizer.type="Lion"', "no denominator: remove it"],
        ),
    ],
)
def test_what_is_no_number_of_theirs_is_refused(changes: dict, parts: list[str]) -> None:
    (problem,) = check_config(with_keys(BASE, changes), 1)[1]
    assert all(part in problem.text for part in parts), problem.text


def test_lion_has_one_moment_in_memory() -> None:
    moments = {}
    for name in ("AdamW", "RAdam", "Lion"):
        config, problems = check_config(with_keys(BASE, {TYPE: name}), 1)
        assert config is not None, problems
        moments[name] = memory_of_rank(parameters_of(config.model), config, 1).moments
    assert moments["AdamW"] == moments["RAdam"] == 2 * moments["Lion"] > 0
