"""The layout is an implementation detail: the same curve on any ranks, ep_size and ZeRO stage."""

from collections.abc import Iterator

import pytest

from tests.ranks import run_on_ranks

NUM_STEPS = 20
MOE = "magnetar.model.moe"
VARIANTS: dict[str, dict] = {
    "X-MoE, softmax, top-2": {},
    "X-MoE, sigmoid, top-1": {f"{MOE}.gate": "sigmoid", f"{MOE}.top_k": 1},
    "linear router, Pre-LN": {f"{MOE}.router": "linear", "magnetar.model.norm": "pre"},
    "dense": {MOE: None},
    "encoder, spans masked, z-losses": {
        "magnetar.model.architecture": "encoder",
        "magnetar.model.vocab_size": 98,
        "magnetar.data.masking": {"unit": "span", "probability": 0.25, "replace": "mask"},
        "magnetar.training.z_loss_weight": 1e-3,
        f"{MOE}.router_z_loss_weight": 1e-2,
    },
    "encoder-decoder": {
        "magnetar.model.architecture": "encoder_decoder",
        "magnetar.model.vocab_size": 98,
    },
}
Curves = dict[str, dict[str, dict[str, list[float]]]]


def layouts(world_size: int) -> Iterator[tuple[str, str, dict]]:
    """(variant, layout, changes): every layout of the first variant, a few of the others."""
    for variant, changes in VARIANTS.items():
        for ep_size in (1,) if world_size == 1 or variant == "dense" else (1, 2):
            for stage in (0, 1, 2) if not changes else (world_size - 1,):
                moe = {} if variant == "dense" else {f"{MOE}.ep_size": ep_size}
                name = f"world {world_size}, ep_size {ep_size}, ZeRO {stage}"
                yield variant, name, changes | moe | {"zero_optimization.stage": stage}


@pytest.fixture(scope="module")
def curves() -> Curves:
    """Variant -> layout -> what happened; the first layout is that of one rank without ZeRO."""
    found: Curves = {variant: {} for variant in VARIANTS}
    for world_size in (1, 2):
        names = list(layouts(world_size))
        answers = run_on_ranks(
            "tests.engine.programs:losses_and_norms",
            world_size,
            [changes for _, _, changes in names],
            NUM_STEPS,
        )[0]
        for (variant, name, _), answer in zip(names, answers, strict=True):
            found[variant][name] = answer
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_gives_the_same_losses(curves: Curves, variant: str) -> None:
    reference, *others = (curve["loss"] for curve in curves[variant].values())
    assert len(others) == {"X-MoE, softmax, top-2": 8, "dense": 1}.get(variant, 2)
    assert reference[-1] < reference[0] - 0.05, "the model must learn, or nothing is compared"
    for losses in others:
        # float32 sums in another order, amplified by 20 steps of Adam.
        assert losses == pytest.approx(reference, rel=0, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_gives_the_same_gradient_norm(curves: Curves, variant: str) -> None:
    reference, *others = (curve["norm"] for curve in curves[variant].values())
    for norms in others:
        assert norms == pytest.approx(reference, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_clip_was_active_on_every_step_compared(curves: Curves, variant: str) -> None:
    for name, curve in curves[variant].items():
        assert max(curve["coefficient"]) < 1, name
