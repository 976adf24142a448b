"""SparseClip and the MoE layer in programs that know nothing of Magnetar's configuration."""

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from magnetar import MoE, SparseClip
from magnetar.data.errors import UserError
from magnetar.engine.sparse_clip import mark_experts
from magnetar.models.moe.drop_in import grouped_experts
from tests.engine.foreign import THRESHOLD, llama
from tests.machine import as_param, case_id, is_runnable
from tests.ranks import run_on_ranks

EP = [{"ep_size": ep_size, "stage": stage} for ep_size in (1, 2) for stage in (0, 1, 2)]
BF16 = [case | {"bf16.enabled": True} for case in EP]
FP16 = [case | {"fp16.enabled": True} for case in EP if case["stage"]]
OFFLOADED = {"zero": {"offload_optimizer": {"device": "cpu"}}}
CASES = EP + BF16 + FP16
CASES += [{"ep_size": 2, "fused": True, "bf16.enabled": True}]
CASES += [{"ep_size": 2, "stage": 1, "bf16.enabled": True, "float32_sums": True}]
CASES += [{"ep_size": 2, "stage": 2} | OFFLOADED, {"ep_size": 1, "stage": 1} | OFFLOADED]
CASES += [{"ep_size": 2, "stage": stage, "gradient_clipping": 0.0} for stage in (0, 2)]
CASES += [{"ep_size": 2, "client": name} for name in ("SGD", "Adagrad")]
CASES += [{"ep_size": 2, "accumulation": 2, "stage": stage} for stage in (0, 2)]
OURS = {"model": "magnetar", "ep_size": 2}
CASES += [OURS | {"stage": stage} for stage in (0, 1, 2, 3)]
CASES += [OURS | {"router": "linear"}, OURS | {"stage": 3} | OFFLOADED]
LLAMA = {"model": "llama", "num_experts": [4]}
CASES += [LLAMA | {"ep_size": ep_size, "stage": 2} for ep_size in (1, 2)]
ALONE = [{"stage": 0}, {"stage": 2}, {"model": "magnetar", "stage": 3}]
RUNS = {2: CASES, 1: ALONE}


def has_package(case: dict) -> bool:
    if case.get("model") != "llama":
        return True
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def measured(world_size: int) -> dict[str, dict]:
    cases = [case for case in RUNS[world_size] if is_runnable(case) and has_package(case)]
    found = run_on_ranks("tests.engine.foreign:clipped_steps", world_size, cases, timeout=900)
    return dict(zip(map(case_id, cases), found[0], strict=True))


PARAMS = [
    as_param(world_size, case, cases=[case], id=f"{world_size} ranks,{case_id(case)}")
    for world_size, cases in RUNS.items()
    for case in cases
]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "case"), PARAMS)
def test_any_engines_norm_is_the_brute_forces_and_every_gradient_shrinks(
    world_size: int, case: dict
) -> None:
    if not has_package(case):
        pytest.importorskip("transformers")
    found = measured(world_size)[case_id(case)]
    # See tests/engine/test_sparse_clip.py: float32 sums part by 1e-6, half-precision gradients are
    # rounded when they are averaged.
    rel = 1e-2 if case.get("bf16.enabled") else 1e-3 if case.get("fp16.enabled") else 1e-5
    assert found["norm"] == pytest.approx(found["raw_norm"], rel=rel)
    assert found["found_expert"] == pytest.approx(found["raw_expert"], rel=rel)
    assert found["reported"] == pytest.approx(found["raw_norm"], rel=rel)
    assert found["norm"] > 2 * THRESHOLD
    assert found["coefficient"] == pytest.approx(THRESHOLD / found["raw_norm"], rel=rel)
    assert found["given"] == pytest.approx(found["coefficient"] * found["raw_plain"], rel=2 * rel)


@pytest.mark.slow
def test_every_wrapper_was_met() -> None:
    wrappers = {found["optimizer"] for world in RUNS for found in measured(world).values()}
    assert {"AdamW", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "SGD"} <= wrappers
    if is_runnable({"bf16.enabled": True}):
        assert {"FP16_Optimizer", "FP16_UnfusedOptimizer", "BF16_Optimizer"} <= wrappers


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_as_without_sparse_clip() -> None:
    cases = [{"stage": stage, "poisoned": True} for stage in (1, 2)]
    found = run_on_ranks("tests.engine.foreign:clipped_steps", 1, cases)[0]
    assert [each["skipped"] for each in found] == [1, 1]


BOTH = [
    {"expert": expert, "ep_size": ep_size, "k": k, **extra}
    for expert in ("grouped", "looped")
    for ep_size in (1, 2)
    for k, extra in (
        (1, {"drop_tokens": False}),
        (1, {"drop_tokens": False, "has_unused": True}),
        (2, {"drop_tokens": False, "use_residual": True}),
        (2, {"drop_tokens": True, "capacity_factor": 0.75}),
        (2, {"drop_tokens": True, "capacity_factor": 0.2, "min_capacity": 7}),
        (2, {"drop_tokens": True, "eval_capacity_factor": 0.5, "training": False}),
    )
]


@cache
def both_layers() -> list[list[dict]]:
    return run_on_ranks("tests.engine.foreign:outputs_of_both_layers", 2, BOTH, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BOTH)), ids=[case_id(case) for case in BOTH])
def test_the_layer_computes_what_deepspeeds_does_with_the_same_weights(index: int) -> None:
    for rank in both_layers():
        found = rank[index]
        assert (
            found["experts"]
            == {"grouped": "Experts", "looped": "LoopedExperts"}[BOTH[index]["expert"]]
        )
        names = ("output", "aux_loss", "counts", "gradient of x", "gradient of the router")
        for name, ours, theirs in zip(names, found["ours"], found["theirs"], strict=True):
            # float32 products in another order, sums of some hundred terms
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_of_transformers_keeps_its_function_until_the_experts_differ() -> None:
    pytest.importorskip("transformers")
    tokens = torch.arange(12).view(2, 6)
    dense, sparse = llama(), llama(num_experts=4, k=2, router="linear", ep_size=1)
    experts = sparse.model.layers[1].mlp.moe.deepspeed_moe.experts
    assert type(experts).__name__ == "Experts"
    assert experts.activation_name == "swiglu"
    torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("expert", "activation"),
    [
        (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False)), "gelu"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "relu"),
        (nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)), "swish"),
        (nn.Sequential(nn.Linear(8, 12), nn.GELU("tanh"), nn.Linear(12, 8)), "gelu_tanh"),
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), None),
        (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 8)), None),
        (nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 8)), None),
        (nn.Linear(8, 8), None),
    ],
)
def test_an_expert_is_grouped_only_if_stacked_experts_compute_it(
    expert: nn.Module, activation: str | None
) -> None:
    found = grouped_experts(expert, 8, 2)
    assert (found and found.activation_name) == activation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_tutel": True}, "MoE(use_tutel=True): the layer has kernels of its own"),
        ({"enable_expert_tensor_parallelism": True}, "an expert is whole on its rank"),
        ({"noisy_gate_policy": "RSample"}, "MoE(noisy_gate_policy='RSample')"),
    ],
)
def test_an_argument_that_nothing_computes_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError) as refused:
        MoE(8, nn.Linear(8, 8), **options)
    assert message in str(refused.value)


def engine_with(**attributes: Any) -> Any:
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    usual = {"mp_world_size": 1, "sequence_parallel_size": 1, "module": nn.Linear(1, 1)}
    usual |= {"zero_compute_grad_norm": lambda: True, "optimizer": adam, "basic_optimizer": adam}
    usual |= {"fp16_enabled": lambda: False, "zero_optimization": lambda: False}
    return SimpleNamespace(**usual | attributes)


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (engine_with(pipeline_parallelism=True), "pipeline parallelism"),
        (engine_with(mp_world_size=2), "tensor parallelism"),
        (engine_with(sequence_parallel_size=2), "sequence parallelism"),
        (engine_with(zero_compute_grad_norm=lambda: False), "compute_grad_norm=false"),
        (engine_with(fp16_enabled=lambda: True), "zero_optimization.stage=0"),
    ],
)
def test_an_engine_that_hides_gradients_is_refused(engine: Any, named: str) -> None:
    with pytest.raises(UserError) as refused:
        SparseClip(1.0).install(engine)
    assert named in str(refused.value)
    assert re.search("leave it out|use stage 1", str(refused.value))


def test_an_expert_outside_of_every_moe_layer_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.allreduce = False  # type: ignore[assignment]
    with pytest.raises(UserError, match="parameter weight is marked as an expert's"):
        mark_experts(model)


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_threshold_below_0_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="at least 0"):
        SparseClip(threshold)
