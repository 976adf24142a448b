"""Memory of a rank as planned and as DeepSpeed allocates it, and which layouts are refused."""

from typing import Any

import pytest

from magnetar.data.errors import UserError
from magnetar.engine.config.schema import Layout, RunConfig, check_config
from magnetar.engine.memory_planner import (
    Memory,
    memory_of_rank,
    nearest_layout,
    parameters_of,
    problems_of,
    require_host_memory,
    with_layout,
)
from magnetar.models.cost import num_parameters
from tests.engine.programs import BASE, with_keys
from tests.machine import as_param, case_id, is_runnable
from tests.ranks import run_on_ranks

STAGE, EP = "zero_optimization.stage", "magnetar.model.moe.ep_size"
ACCUMULATION = "gradient_accumulation_steps"
BF16, SUMS = {"bf16.enabled": True}, {"data_types.grad_accum_dtype": "fp32"}
ALL_DIVIDED = {"zero_optimization.stage3_param_persistence_threshold": 0}
OFFLOAD = {"zero_optimization.offload_optimizer.device": "cpu"}
DENSE = {"magnetar.model.moe": None}
EIGHT_BITS = {
    "optimizer.type": "AdamW8bit",
    "optimizer.params.min_8bit_size": 1024,
}


def config(changes: dict[str, Any], world_size: int) -> RunConfig:
    result, problems = check_config(with_keys(BASE, changes), world_size)
    assert result is not None, problems
    return result


def planned(changes: dict[str, Any], world_size: int) -> Memory:
    resolved = config(changes, world_size)
    return memory_of_rank(parameters_of(resolved.model), resolved, world_size)


def test_parameters_are_all_there_once() -> None:
    model = config({}, 1).model
    parameters = parameters_of(model)
    assert sum(parameter.numel for parameter in parameters) == num_parameters(model)[0] == 34_401
    assert sum(p.numel for p in parameters if p.is_experts) == 17_280
    frozen = config({"magnetar.model.moe.frozen": "router"}, 1).model
    assert sum(p.numel for p in parameters_of(frozen) if not p.trains) == 289


DENSE_NUMEL, EXPERTS_NUMEL = 17_121, 17_280
# On four ranks that share two sets of experts: what a rank holds, and its share of all.
HELD, SHARE = DENSE_NUMEL + EXPERTS_NUMEL / 2, (DENSE_NUMEL + EXPERTS_NUMEL) / 4


@pytest.mark.parametrize(
    ("stage", "keys", "accumulation", "expected"),
    [
        (0, {}, 1, (4 * HELD, 4 * HELD, 0, 8 * HELD)),
        (1, {}, 1, (4 * HELD, 4 * SHARE, 4 * SHARE, 8 * SHARE)),
        (1, {}, 2, (4 * HELD, 4 * HELD, 4 * SHARE, 8 * SHARE)),
        (1, BF16, 2, (2 * HELD, 2 * HELD, 4 * SHARE, 8 * SHARE)),
        (1, BF16 | SUMS, 1, (2 * HELD, 6 * HELD, 4 * SHARE, 8 * SHARE)),
        (2, {}, 2, (4 * HELD, 4 * SHARE, 4 * SHARE, 8 * SHARE)),
        (2, BF16, 1, (2 * HELD, 2 * SHARE, 4 * SHARE, 8 * SHARE)),
        (2, BF16 | SUMS, 1, (2 * HELD, 4 * SHARE, 4 * SHARE, 8 * SHARE)),
        (3, BF16 | ALL_DIVIDED, 2, (2 * SHARE, 2 * SHARE, 4 * SHARE, 8 * SHARE)),
        (3, BF16, 2, (2 * (SHARE + HELD), 2 * SHARE, 4 * SHARE, 8 * SHARE)),
    ],
)
def test_bytes_are_those_of_the_table(
    stage: int, keys: dict, accumulation: int, expected: tuple[float, ...]
) -> None:
    got = planned({STAGE: stage, EP: 2, ACCUMULATION: accumulation, **keys}, 4)
    # A share is rounded up to whole numbers, of each of 38 parameters.
    assert got == pytest.approx(expected, abs=38 * 8)


def test_moments_of_8_bits_take_a_quarter_but_for_embeddings_and_small_tensors() -> None:
    got = planned({STAGE: 0, **EIGHT_BITS}, 1).moments
    # Of 1024 elements or more: attention's (96, 32) and (32, 32) in two layers, two of (32, 64) in
    # the first one's FFN and in each of the second one's 4 experts.
    in_8_bits = 2 * 4 * 32 * 32 + 2 * 32 * 64 + 4 * 2 * 32 * 64
    expected = (2 + 1 / 32) * in_8_bits + 8 * (34_401 - in_8_bits)
    assert got == expected
    larger = EIGHT_BITS | {"optimizer.params.min_8bit_size": 4096}
    assert planned({STAGE: 0, **larger}, 1).moments == 8 * 34_401


def test_frozen_experts_have_weights_alone() -> None:
    frozen = planned({STAGE: 0, "magnetar.model.moe.frozen": "router_and_experts"}, 1)
    trained = DENSE_NUMEL - 289
    assert frozen == (4 * 34_401, 4 * trained, 0, 8 * trained)


MEASURED = [
    *({STAGE: stage, ACCUMULATION: 2, EP: ep} for stage in range(4) for ep in (1, 2)),
    *({STAGE: stage, ACCUMULATION: 2, EP: 2, **BF16} for stage in (1, 2, 3)),
    *({STAGE: stage, ACCUMULATION: 1, **BF16, **SUMS} for stage in (1, 2, 3)),
    {STAGE: 1, ACCUMULATION: 1},
    *({STAGE: stage, ACCUMULATION: 1, "magnetar.training.ema_decay": 0.9} for stage in range(4)),
    *({STAGE: 3, ACCUMULATION: 1, EP: ep, **ALL_DIVIDED} for ep in (1, 2)),
    *({STAGE: stage, ACCUMULATION: 1, **DENSE} for stage in range(4)),
    {STAGE: 0, ACCUMULATION: 1, "magnetar.model.moe.frozen": "router_and_experts"},
    *({STAGE: stage, ACCUMULATION: 2, EP: 2, **EIGHT_BITS} for stage in range(4)),
]


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, int]]]:
    """Index in MEASURED -> the bytes of each rank, for the cases that this machine can run."""
    cases = {index: changes for index, changes in enumerate(MEASURED) if is_runnable(changes)}
    ranks = run_on_ranks("tests.engine.programs:memory_of_engines", 2, [*cases.values()])
    return dict(zip(cases, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "index", [as_param(i, cases=[keys], id=case_id(keys)) for i, keys in enumerate(MEASURED)]
)
def test_what_is_planned_is_what_deepspeed_allocates(
    measured: dict[int, list[dict[str, int]]], index: int
) -> None:
    changes = MEASURED[index]
    expected = planned(changes, 2)
    for of_rank in measured[index]:
        for name in Memory._fields:
            got, planned_bytes = of_rank[name], getattr(expected, name)
            # Padding to 16 bytes a tensor; under ZeRO 1 and 2 a gradient that two ranks share is
            # kept whole by both, and the largest has 8,640 numbers here.
            slack = 1_000 + (4 * 8_640 if name == "gradients" and changes[STAGE] else 0)
            assert planned_bytes - 1_000 <= got <= planned_bytes + slack, name


@pytest.mark.slow
def test_offloaded_states_are_not_on_the_device() -> None:
    changes = {ACCUMULATION: 2, EP: 2, **OFFLOAD}
    assert planned({STAGE: 1, **changes}, 2)[1:] == (4 * (DENSE_NUMEL + EXPERTS_NUMEL // 2), 0, 0)
    assert planned({STAGE: 2, **changes}, 2)[1:] == (0, 0, 0)
    (of_rank, _) = run_on_ranks(
        "tests.engine.programs:memory_of_engines", 2, [{STAGE: 2, **changes}]
    )
    assert of_rank[0]["gradients"] == 0  # they have gone to the host's buffers


SAVED = config({STAGE: 1, EP: 2, ACCUMULATION: 2, "train_batch_size": 16}, 2).to_dict()
PARAMETERS = parameters_of(config({}, 1).model)


def refused(layout: Layout, saved: dict = SAVED, gpu_memory: float | None = None) -> str:
    fitting, lines = problems_of(saved, layout, PARAMETERS, gpu_memory)
    assert fitting is None
    return "\n".join(lines)


def test_a_layout_that_fits_keeps_batch_accumulation_and_model() -> None:
    fitting, lines = problems_of(SAVED, Layout(4, 4, 2), PARAMETERS, None)
    assert lines == []
    assert fitting is not None
    assert fitting.deepspeed["train_batch_size"] == 16
    assert fitting.deepspeed[ACCUMULATION] == 2
    assert fitting.deepspeed["train_micro_batch_size_per_gpu"] == 2
    assert fitting.zero_stage == 2
    assert fitting.model.moe is not None
    assert fitting.model.moe.ep_size == 4
    other = with_layout(fitting.to_dict(), Layout(2, 2, 1))
    assert check_config(other, 2)[0] == check_config(SAVED, 2)[0]


def test_what_cannot_be_is_said() -> None:
    assert "4 experts cannot be divided into ep_size=3 equal parts" in refused(Layout(6, 3, 1))
    assert "magnetar.model.moe.ep_size=4 must divide the 2 ranks" in refused(Layout(2, 4, 1))
    assert (
        "train_batch_size=16 with gradient_accumulation_steps=2 cannot be divided among 3 ranks: "
        "it must be a multiple of 6"
    ) in refused(Layout(3, 1, 1))
    bf16 = SAVED | {"bf16": {"enabled": True}}
    assert "zero_optimization.stage=0 does not go with bf16" in refused(Layout(2, 2, 0), bf16)
    dense = config({STAGE: 1, **DENSE}, 2).to_dict()
    assert "ep_size=2 needs experts, and the model is dense: use 1" in refused(
        Layout(2, 2, 1), dense
    )
    two = refused(Layout(3, 2, 1))
    assert "cannot be divided among 3 ranks" in two
    assert "ep_size=2 must divide the 3 ranks" in two


def test_memory_is_compared_with_the_gpus() -> None:
    needed = memory_of_rank(PARAMETERS, problems_of(SAVED, Layout(2, 2, 1), [], None)[0], 2)
    assert problems_of(SAVED, Layout(2, 2, 1), PARAMETERS, sum(needed))[1] == []
    message = refused(Layout(2, 2, 1), gpu_memory=sum(needed) - 1)
    assert message.startswith("a rank needs 0.000384 GiB (weights ")
    assert "moments 0.000128) without activations, more than the 0.000384 GiB" in message


@pytest.mark.parametrize(
    ("asked", "gpu_memory", "nearest"),
    [
        (Layout(2, 2, 1), None, Layout(2, 2, 1)),
        (Layout(2, 4, 1), None, Layout(2, 2, 1)),  # the ep_size changes before the world size
        (Layout(4, 3, 2), None, Layout(4, 4, 2)),  # 4 / 3 is less than 3 / 2
        (Layout(3, 1, 1), None, Layout(4, 1, 1)),
        (Layout(7, 4, 3), None, Layout(8, 4, 3)),
        (Layout(5, 2, 1), None, Layout(4, 2, 1)),
        (Layout(4, 2, 0), 310_000, Layout(4, 2, 1)),  # the stage changes first
        (Layout(2, 1, 0), 450_000, Layout(2, 1, 2)),
        (Layout(2, 1, 0), 390_000, Layout(2, 2, 2)),
        (Layout(2, 2, 1), 200_000, Layout(8, 2, 2)),
        (Layout(2, 2, 1), 160_000, Layout(8, 4, 2)),
        (Layout(2, 2, 1), 1_000, None),
    ],
)
def test_the_nearest_layout_that_can(
    asked: Layout, gpu_memory: float | None, nearest: Layout | None
) -> None:
    assert nearest_layout(SAVED, asked, PARAMETERS, gpu_memory) == nearest


@pytest.mark.parametrize(("local_size", "held"), [("1", True), ("4", False)])
def test_ranks_that_a_machine_cannot_hold_are_refused(
    local_size: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = config({STAGE: 0}, 4)
    each = sum(planned({STAGE: 0}, 4))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_SIZE", local_size)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * each}.__getitem__)
    if held:
        require_host_memory(resolved, 4)
        return
    with pytest.raises(UserError, match=r"its ranks would keep .* each\) without activations"):
        require_host_memory(resolved, 4)
