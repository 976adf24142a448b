"""Which tests run where: those marked gpu or multi_gpu skip themselves and say why."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if (item.get_closest_marker("gpu") or needed == 2) and num_gpus < needed:
            reason = f"needs {needed} GPU{'s' * (needed > 1)}, found {num_gpus}"
            item.add_marker(pytest.mark.skip(reason=reason))
