"""What a step's statistics become in a record."""

import math

import pytest
import torch

from magnetar.engine.metrics import routing_record
from magnetar.models.moe.layer import RoutingStats


def stats(load: list[float], dropped: float, first_choices: list[int]) -> RoutingStats:
    return RoutingStats(
        probs=torch.tensor(first_choices, dtype=torch.float64),
        first_choices=torch.tensor(first_choices, dtype=torch.float64),
        entropy=torch.tensor(0.7 * sum(first_choices), dtype=torch.float64),
        log_z_squared=torch.tensor(0.0, dtype=torch.float64),
        load=torch.tensor(load, dtype=torch.float64),
        dropped=torch.tensor(dropped, dtype=torch.float64),
        temperature=torch.tensor(0.3, dtype=torch.float64),
    )


def test_a_layers_record_has_shares_and_means() -> None:
    record = routing_record("layer_2", stats([10.0, 6.0, 0.0, 0.0], 4.0, [6, 2, 0, 0]))
    assert record == pytest.approx(
        {
            "layer_2/routing_entropy": 0.7,
            "layer_2/load_max": 2.5,
            "layer_2/load_min": 0.0,
            "layer_2/dropped": 0.25,
            "layer_2/balance_loss": 4 * (0.75**2 + 0.25**2),
            "layer_2/temperature": 0.3,
        }
    )


def test_a_batch_of_padding_alone_has_a_record_of_finite_numbers() -> None:
    record = routing_record("layer_2", stats([0.0] * 4, 0.0, [0] * 4))
    assert record.pop("layer_2/temperature") == pytest.approx(0.3)
    assert set(record.values()) == {0.0}
    assert all(math.isfinite(value) for value in record.values())
