"""Training with torch.compile against training without."""

from typing import Any

import pytest

from magnetar.engine.config.schema import check_config
from tests.engine.programs import BASE, with_keys
from tests.ranks import run_on_ranks

COMPILED = {"magnetar.training.compile": True}
CHECKPOINTED = {"magnetar.training.activation_checkpointing": True}


@pytest.mark.needs("a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"magnetar.model.dropout": 0.1}], ids=["", "dropout"])
def test_the_same_run_but_for_rounding(sizes: dict[str, Any]) -> None:
    cases = [sizes, sizes | COMPILED, sizes | COMPILED | CHECKPOINTED]
    if sizes:  # what is dropped is drawn otherwise, but alike in both that are compiled
        cases = cases[1:]
    (curves,) = run_on_ranks("tests.engine.programs:losses_and_norms", 1, cases, 6, timeout=600)
    # Fused operators round float32 elsewhere, and steps of Adam amplify it, as they do between
    # layouts: test_layouts.py has the same bounds for 20 steps, and half as much for norms.
    for curve in curves[1:]:
        assert curve["loss"] == pytest.approx(curves[0]["loss"], abs=2e-5)
        assert curve["norm"] == pytest.approx(curves[0]["norm"], rel=2e-4)
        assert curve["valid"] == pytest.approx(curves[0]["valid"], abs=2e-5)
    assert curves[0]["loss"][-1] < curves[0]["loss"][0]


def test_zero_3_is_refused() -> None:
    changes = COMPILED | {"zero_optimization.stage": 3}
    _, (problem,) = check_config(with_keys(BASE, changes), 1)
    assert "magnetar.training.compile=true contradicts zero_optimization.stage=3" in str(problem)
    assert "use stage 1 or 2" in str(problem)
