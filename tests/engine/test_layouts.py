"""The layout is an implementation detail: the same curve on any ranks, ep_size and ZeRO stage."""

import pytest

from tests.ranks import run_on_ranks

NUM_STEPS = 20


def layouts(world_size: int) -> list[dict]:
    return [
        {"magnetar.model.moe.ep_size": ep_size, "zero_optimization.stage": stage}
        for ep_size in ((1,) if world_size == 1 else (1, 2))
        for stage in (0, 1, 2)
    ]


@pytest.fixture(scope="module")
def curves() -> dict[str, dict[str, list[float]]]:
    found = {}
    for world_size in (1, 2):
        cases = layouts(world_size)
        answers = run_on_ranks(
            "tests.engine.programs:losses_and_norms", world_size, cases, NUM_STEPS
        )[0]
        for case, answer in zip(cases, answers, strict=True):
            found[f"world {world_size} {case}"] = answer
    return found


@pytest.mark.slow
def test_every_layout_gives_the_same_losses(curves: dict) -> None:
    reference = next(iter(curves.values()))["loss"]
    assert len(curves) == 9
    assert reference[-1] < reference[0] - 0.05, "the model must learn, or nothing is compared"
    for name, curve in curves.items():
        difference = max(abs(a - b) for a, b in zip(curve["loss"], reference, strict=True))
        # float32 sums in another order, amplified by 20 steps of Adam.
        assert difference < 2e-5, (name, difference)


@pytest.mark.slow
def test_every_layout_gives_the_same_gradient_norm(curves: dict) -> None:
    reference = next(iter(curves.values()))["norm"]
    for name, curve in curves.items():
        difference = max(abs(a / b - 1) for a, b in zip(curve["norm"], reference, strict=True))
        assert difference < 1e-4, (name, difference)


@pytest.mark.slow
def test_sparse_clip_was_active_on_every_step_compared(curves: dict) -> None:
    for name, curve in curves.items():
        assert max(curve["coefficient"]) < 1, name
