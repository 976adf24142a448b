"""A run goes on with the same batch on whatever ranks are left."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.engine.config.schema import check_config
from magnetar.engine.supervise.shrink_run import (
    Layout,
    fitted_settings,
    fitting_layout,
    wanted_layout,
)
from tests.engine.programs import with_keys
from tests.runs import TINY

MOE = "magnetar.model.moe"
DIVISORS = {n: [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 129)}


def checked(num_ranks: int, **changes: Any) -> Any:
    config, problems = check_config(
        with_keys(TINY, {"magnetar.data.path": "x"} | changes), num_ranks
    )
    assert config is not None, problems
    return config


@st.composite
def runs(draw: st.DrawFn) -> tuple[Any, int]:
    ranks, micro = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    accumulation = draw(st.integers(1, 4))
    ep_size = draw(st.sampled_from(DIVISORS[ranks]))
    experts = ep_size * draw(st.integers(2, 4))
    config = checked(
        ranks,
        **{
            "train_batch_size": ranks * micro * accumulation,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            f"{MOE}.num_experts": experts,
            f"{MOE}.ep_size": ep_size,
            f"{MOE}.balance_scope": draw(st.sampled_from(["batch", "micro_step"])),
        },
    )
    return config, draw(st.integers(1, 10))


@settings(max_examples=150, deadline=None)
@given(runs())
def test_a_fitting_layout_keeps_the_batch_and_breaks_no_rule(case: tuple[Any, int]) -> None:
    config, num_ranks = case
    wanted, layout = wanted_layout(config), fitting_layout(config, num_ranks)
    batch = config.deepspeed["train_batch_size"]
    assert layout.num_ranks * layout.micro * layout.accumulation == batch
    assert 1 <= layout.num_ranks <= num_ranks
    assert layout.ep_size == math.gcd(wanted.ep_size, layout.num_ranks)
    if config.model.moe.balance_scope == "batch":
        assert layout.micro <= wanted.micro
        assert all(batch % more for more in range(layout.num_ranks + 1, num_ranks + 1))
    else:
        assert layout.accumulation == wanted.accumulation
    again, problems = check_config(
        with_keys(
            config.to_dict(),
            {
                "train_micro_batch_size_per_gpu": layout.micro,
                "gradient_accumulation_steps": layout.accumulation,
                f"{MOE}.ep_size": layout.ep_size,
            },
        ),
        layout.num_ranks,
    )
    assert again is not None, problems


def test_as_many_ranks_as_wanted_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(TINY))
    layout, found = fitted_settings(path, ["magnetar.training.seed=3"], 2, 2)
    assert layout == Layout(2, 2, 2, 1)
    assert found == ["magnetar.training.seed=3"]


def test_settings_of_the_user_give_way_to_those_of_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(TINY))
    given = [
        "train_batch_size=8",
        f"{MOE}.ep_size=4",
        f"{MOE}.placement=across_nodes",
        "gradient_clipping=2",
    ]
    layout, found = fitted_settings(path, given, 4, 3)
    assert layout == Layout(2, 2, 4, 1)
    assert found == [
        *(f"{MOE}.placement=across_nodes", "gradient_clipping=2"),
        *("train_batch_size=8", "train_micro_batch_size_per_gpu=4"),
        *("gradient_accumulation_steps=1", f"{MOE}.ep_size=2"),
    ]
    layout, found = fitted_settings(path, given, 4, 1)
    assert layout == Layout(1, 1, 8, 1)
    assert sorted(found[-2:]) == [f"{MOE}.ep_size=1", f'{MOE}.placement="within_nodes"']
    assert len(found) == 6


def test_micro_batches_stay_as_small_where_accumulation_does_not_count() -> None:
    changes = {"train_batch_size": 16, f"{MOE}.balance_scope": "batch"}
    assert fitting_layout(checked(4, **changes), 2) == Layout(2, 2, 4, 2)
    assert fitting_layout(checked(4, **changes), 3) == Layout(2, 2, 4, 2)
    assert fitting_layout(checked(4, **changes), 8) == Layout(8, 2, 2, 1)


def test_capacity_of_a_rank_is_refused_on_other_ranks() -> None:
    changes = {f"{MOE}.dispatch": "capacity", f"{MOE}.capacity_factor": 1.0}
    config = checked(2, **changes, **{f"{MOE}.capacity_scope": "rank"})
    assert fitting_layout(config, 2) == Layout(2, 2, 2, 1)
    with pytest.raises(UserError, match=r'capacity_scope="rank" ties the numbers to 2 ranks'):
        fitting_layout(config, 1)
    assert fitting_layout(checked(2, **changes), 1) == Layout(1, 1, 4, 1)


def test_pairs_whose_balance_is_of_a_micro_step_are_refused_on_other_ranks() -> None:
    changes = {
        "magnetar.model.architecture": "encoder_decoder",
        "magnetar.data.pairs": {"bin_tokens": 64},
        "train_micro_batch_size_per_gpu": 1,
    }
    config = checked(2, **changes)
    with pytest.raises(UserError, match=r"train_batch_size=4 in 2 bins a rank cannot be divided"):
        fitting_layout(config, 1)
    assert fitting_layout(checked(2, **changes, **{f"{MOE}.balance_scope": "batch"}), 1) == Layout(
        1, 1, 1, 4
    )
