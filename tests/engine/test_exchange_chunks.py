"""A whole run whose tokens travel in chunks, between real GPUs."""

import pytest

from tests.ranks import run_on_ranks

MOE = "magnetar.model.moe"
SIZES = {"magnetar.model.d_model": 128, "magnetar.model.d_ff": 256, f"{MOE}.num_experts": 8}
ZERO_3 = {
    "zero_optimization.stage": 3,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_prefetch_bucket_size": 5_000,
}
RUNS: dict[str, dict] = {
    "ZeRO 1": {"zero_optimization.stage": 1},
    "ZeRO 3": ZERO_3,
    "ZeRO 3, activations recomputed": ZERO_3 | {"magnetar.training.activation_checkpointing": True},
    "capacity": {
        "zero_optimization.stage": 1,
        f"{MOE}.dispatch": "capacity",
        f"{MOE}.capacity_factor": 1.0,
    },
}


@pytest.mark.multi_gpu
def test_losses_and_norms_are_the_same_in_any_number_of_chunks() -> None:
    changes = [
        SIZES | keys | {f"{MOE}.ep_size": 2, f"{MOE}.exchange_chunks": number}
        for keys in RUNS.values()
        for number in (1, 4)
    ]
    program = "tests.engine.programs:losses_and_norms"
    found = run_on_ranks(program, 2, changes, 5, timeout=600)[0]
    for name, one, other in zip(RUNS, found[::2], found[1::2], strict=True):
        # What else a step does may add with atomics; models/moe/test_all_to_all.py compares bits.
        for key in ("loss", "valid"):
            assert other[key] == pytest.approx(one[key], rel=0, abs=2e-5), (name, key)
        assert other["norm"] == pytest.approx(one["norm"], rel=1e-4), name
        assert one["loss"][-1] < one["loss"][0], name
