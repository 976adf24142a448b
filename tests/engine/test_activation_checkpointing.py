"""Computing activations again changes memory and time, never numbers."""

import pytest

from tests.ranks import run_on_ranks

MODEL, NUM_STEPS = "magnetar.model", 10
VARIANTS: dict[str, dict] = {
    "dense": {f"{MODEL}.moe": None},
    "MoE": {},
    "MoE with dropout": {
        f"{MODEL}.dropout": 0.1,
        f"{MODEL}.attention_dropout": 0.1,
        f"{MODEL}.activation_dropout": 0.1,
        f"{MODEL}.drop_path": 0.2,
    },
    "encoder-decoder, relative positions, dropout": {
        f"{MODEL}.architecture": "encoder_decoder",
        f"{MODEL}.vocab_size": 98,
        f"{MODEL}.attention_positions": "relative",
        f"{MODEL}.dropout": 0.1,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_and_norms_are_the_same_to_the_last_digit(world_size: int) -> None:
    cases = []
    for changes in VARIANTS.values():
        layout = {"zero_optimization.stage": world_size - 1}
        if f"{MODEL}.moe" not in changes:
            layout[f"{MODEL}.moe.ep_size"] = world_size
        on = {"magnetar.training.activation_checkpointing": True}
        cases += [changes | layout, changes | layout | on]
    program = "tests.engine.programs:losses_and_checkpointed_blocks"
    answers = run_on_ranks(program, world_size, cases, NUM_STEPS)[0]
    for name, plain, again in zip(VARIANTS, answers[::2], answers[1::2], strict=True):
        assert plain["checkpointed_blocks"] == 0
        num_layers = 4 if name.startswith("encoder-decoder") else 2
        assert again["checkpointed_blocks"] == num_layers * NUM_STEPS
        # The same operators run again on the same threads, and a sum over two ranks has one order.
        for kind in ("loss", "norm"):
            assert again[kind] == plain[kind], name
