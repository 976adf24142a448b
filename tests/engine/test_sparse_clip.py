import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magnetar.data.errors import UserError
from magnetar.engine.sparse_clip import SparseClip, clip_coefficient, squared_sum
from tests.machine import as_param, case_id, is_runnable
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("norm", "threshold", "expected"), [(0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25)]
)
def test_coefficient_is_threshold_over_the_larger_of_both(
    norm: float, threshold: float, expected: float
) -> None:
    assert clip_coefficient(torch.tensor(norm), threshold).item() == expected  # powers of two


def test_an_infinite_threshold_never_clips() -> None:
    assert clip_coefficient(torch.tensor(1e30), math.inf).item() == 1.0


def test_squares_are_summed_in_float32_for_bf16_gradients() -> None:
    gradient = torch.full((1_000_000,), 0.01, dtype=torch.bfloat16)
    expected = 1_000_000 * float(gradient[0]) ** 2
    # A sum in bf16 stops growing long before a million terms, and one float32 accumulator, which
    # is what torch's norm has on a CPU, is 1e-3 off by then.
    assert squared_sum([gradient], CPU).item() == pytest.approx(expected, rel=1e-5)


def test_no_gradients_have_norm_zero() -> None:
    assert squared_sum([], CPU).item() == 0.0


FP32 = [
    {"magnetar.model.moe.ep_size": ep_size, "zero_optimization.stage": stage}
    for ep_size in (1, 2)
    for stage in (0, 1, 2, 3)
]
BF16 = [
    case | {"bf16.enabled": True} | extra
    for case in FP32
    for extra in ({}, {"data_types.grad_accum_dtype": "fp32"})
    if case["zero_optimization.stage"]
]
EP_2 = FP32[4:]
ACCUMULATED = [case | {"train_micro_batch_size_per_gpu": 2} for case in EP_2]
VANILLA = [case | {"magnetar.sparse_clip.enabled": False} for case in (EP_2[1], EP_2[3])]
UNCLIPPED = [
    case | {"gradient_clipping": 0.0, "magnetar.sparse_clip.enabled": False} for case in EP_2
]
# Partitions that end in padding (heads of 3 numbers), and updates of many parts.
UNEVEN = [
    EP_2[3] | {"magnetar.model.num_heads": 4, "magnetar.model.d_model": 12, **extra}
    for extra in (
        {"magnetar.model.qk_norm": True},
        {"zero_optimization.sub_group_size": 500},
        {"zero_optimization.reduce_scatter": False},
    )
]
# Two MoE layers, of 16 and 64 experts.
SIZES = [
    case | {"magnetar.model.num_layers": 4, "magnetar.model.moe.num_experts": [16, 64]} | extra
    for case in FP32
    for extra in ({}, {"bf16.enabled": True})
    if case["zero_optimization.stage"] or not extra
]
OFFLOADED = [
    case | {"zero_optimization.offload_optimizer": {"device": "cpu"}} | extra
    for case in FP32
    for extra in ({}, {"bf16.enabled": True}, {"train_micro_batch_size_per_gpu": 2})
    if case["zero_optimization.stage"]
]
FP16 = [
    case | {"fp16.enabled": True, "fp16.initial_scale_power": 8}
    for case in FP32
    if case["zero_optimization.stage"]
]
EIGHT_BITS = [
    case | {"optimizer.type": "AdamW8bit", "optimizer.params.min_8bit_size": 512}
    for case in FP32 + BF16[:2]
]
OTHERS = [
    case | {"optimizer.type": optimizer}
    for optimizer in ("RAdam", "Lion")
    for case in [*EP_2, BF16[0], OFFLOADED[-3]]
]
CASES = FP32 + BF16 + FP16 + ACCUMULATED + VANILLA + UNCLIPPED + UNEVEN + SIZES + OFFLOADED
CASES += EIGHT_BITS + OTHERS


# On GPUs DeepSpeed's fused Adam is compiled when it is first used.
FUSED = [case | {"optimizer.params.torch_adam": False} for case in FP32 + BF16 + FP16]
RUNS = {"torch_adam": CASES, "fused_adam": FUSED}
MARKS = {"torch_adam": [], "fused_adam": [pytest.mark.multi_gpu]}


@cache
def measured(run: str) -> dict[str, dict]:
    """What is found of each case of a run that this machine can run, by the case's id."""
    cases = [case for case in RUNS[run] if is_runnable(case)]
    program = "tests.engine.programs:clipping_against_every_gradient"
    found = run_on_ranks(program, 2, cases, timeout=900)[0]
    return dict(zip(map(case_id, cases), found, strict=True))


@pytest.fixture
def found(run: str, case: dict) -> dict:
    return measured(run)[case_id(case)]


def every_case(condition: Callable[[dict], bool] = lambda _: True) -> pytest.MarkDecorator:
    """A test for each case, which alone is skipped where this machine cannot run it."""
    params = []
    for run, cases in RUNS.items():
        for case in filter(condition, cases):
            param = as_param(run, case, cases=[case], id=f"{run},{case_id(case)}")
            params.append(param._replace(marks=[*param.marks, *MARKS[run]]))
    return pytest.mark.parametrize(("run", "case"), params)


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in RUNS.values():
        assert len(set(map(case_id, cases))) == len(cases)


def expected_norm(case: dict, found: dict) -> float:
    if case.get("magnetar.sparse_clip.enabled", True):
        return found["raw_weighted"]
    return math.hypot(found["raw_dense"], found["raw_expert"])


def tolerance(case: dict) -> float:
    """How far two norms may part, as a share.

    float32 sums in another order part by some 1e-6. Half-precision gradients are rounded when they
    are added up and averaged: bf16 by up to 2^-9 = 2e-3 each time, fp16 by 2^-12 = 2.4e-4.
    """
    if case.get("bf16.enabled"):
        return 1e-2
    return 1e-3 if case.get("fp16.enabled") else 1e-5


@pytest.mark.slow
@every_case()
def test_the_norm_equals_a_brute_force_over_every_gradient_of_every_rank(
    found: dict, case: dict
) -> None:
    rel = tolerance(case)
    assert found["dense_norm"] == pytest.approx(found["raw_dense"], rel=rel)
    assert found["expert_norm"] == pytest.approx(found["raw_expert"], rel=rel)
    assert found["norm"] == pytest.approx(expected_norm(case, found), rel=rel)


@pytest.mark.slow
@every_case(lambda case: "magnetar.model.moe.num_experts" in case and tolerance(case) == 1e-5)
def test_layers_of_16_and_64_experts_have_a_kappa_each(found: dict, case: dict) -> None:
    # The experts' share is 1e-4 of the norm's square, of which float32 knows 1e-7.
    share = found["norm"] ** 2 - found["dense_norm"] ** 2
    exact = found["raw_weighted"] ** 2 - found["raw_dense"] ** 2
    assert share == pytest.approx(exact, rel=0.02)
    for num_experts in (16, 64):
        assert share != pytest.approx(found["raw_expert"] ** 2 / num_experts, rel=0.1)


@pytest.mark.slow
@every_case()
def test_the_coefficient_is_exact_even_for_a_small_threshold(found: dict, case: dict) -> None:
    threshold = case.get("gradient_clipping", 0.05) or math.inf
    expected = min(1.0, threshold / expected_norm(case, found))
    assert found["coefficient"] == pytest.approx(expected, rel=tolerance(case))


@pytest.mark.slow
@every_case()
def test_expert_and_dense_gradients_shrink_alike_before_they_reach_adam(
    found: dict, case: dict
) -> None:
    rel = tolerance(case)
    for kind in ("dense", "expert"):  # the coefficient and the norm may each be off by it
        clipped = found["coefficient"] * found[f"raw_{kind}"]
        assert found[f"seen_{kind}"] == pytest.approx(clipped, rel=2 * rel), kind
    if case.get("gradient_clipping", 0.05):
        assert found["seen_expert"] < 0.5 * found["raw_expert"]


@pytest.mark.slow
@pytest.mark.needs("bf16")  # without which nothing needs BF16_Optimizer
@pytest.mark.parametrize("run", [pytest.param(run, marks=MARKS[run]) for run in RUNS])
def test_every_wrapper_of_deepspeed_was_met(run: str) -> None:
    wrappers = {found["optimizer"] for found in measured(run).values()}
    assert wrappers - {"AdamW", "FusedAdam", "BlockwiseAdamW", "RAdam", "Lion"} == {
        "BF16_Optimizer",
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
    }
    assert wrappers & {"AdamW", "FusedAdam"}


# A threshold of a hundredth of the norm, and no decay, which is no part of the gradient.
CLIPPED = [
    {
        "gradient_clipping": 0.02,
        "optimizer.type": optimizer,
        "optimizer.params.weight_decay": 0.0,
        "optimizer.params.lr": 0.3 if optimizer == "RAdam" else 3e-3,
        "zero_optimization.stage": stage,
        "magnetar.model.moe.ep_size": 2,
    }
    for optimizer in ("AdamW", "RAdam", "Lion")
    for stage in (0, 1, 2, 3)
]


@pytest.fixture(scope="module")
def beside_unclipped() -> list[list[dict[str, Any]]]:
    """Of each rank, what it finds of CLIPPED."""
    program = "tests.engine.programs:clipped_beside_unclipped"
    return run_on_ranks(program, 2, CLIPPED, 4, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CLIPPED)), ids=map(case_id, CLIPPED))
def test_what_is_multiplied_reaches_the_update(
    beside_unclipped: list[list[dict[str, Any]]], index: int
) -> None:
    optimizer = CLIPPED[index]["optimizer.type"]
    for of_rank in beside_unclipped:
        found = of_rank[index]
        assert found["coefficient"] < 0.1
        assert found["moments"].keys() == {"exp_avg", "exp_avg_sq"} - {
            "exp_avg_sq" if optimizer == "Lion" else ""
        }
        # Gradients times a float32 coefficient, and averaged with 0.
        assert all(error < 1e-6 for error in found["moments"].values()), found
        if optimizer == "RAdam":
            # Its first updates are the momentum itself, so they shrink with it. Weights of 1 round
            # to 2^-24 = 6e-8 what is 4e-5 at most on one of the ranks: 1.5e-3 of it.
            assert found["update"] < 1e-2, found
        else:
            # A first update without scale: Adam's but for eps, Lion's sign. The later ones weigh
            # gradients that are clipped differently.
            assert found["update"] > 0.5, found
        assert found["difference"] > 1e-4, found


def engine_with(basic_name: str, wrapper_name: str | None) -> Any:
    basic = type(basic_name, (), {})()
    optimizer = type(wrapper_name, (), {})() if wrapper_name else basic
    return SimpleNamespace(basic_optimizer=basic, optimizer=optimizer)


@pytest.mark.parametrize(
    ("engine", "named", "way_out"),
    [
        (engine_with("FusedLamb", None), "FusedLamb", "use Adam or AdamW"),
        (engine_with("FusedAdam", "MiCS_Optimizer"), "MiCS_Optimizer", "stage 1, 2 or 3"),
    ],
)
def test_an_optimizer_it_does_not_know_is_refused(engine: Any, named: str, way_out: str) -> None:
    with pytest.raises(UserError) as refused:
        SparseClip(1.0).install(engine)
    assert named in str(refused.value)
    assert "would not be clipped" in str(refused.value)
    assert way_out in str(refused.value)
