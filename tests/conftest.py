"""What holds for every test: where it runs, and on how many threads."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """For tensors of a few kilobytes: several threads only wait for each other.

    MAGNETAR_TEST_THREADS: another number, to see what holds on several threads too.
    """
    torch.set_num_threads(int(os.environ.get("MAGNETAR_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need more GPUs than there are, and say so."""
    num_gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if (item.get_closest_marker("gpu") or needed == 2) and num_gpus < needed:
            reason = f"needs {needed} GPU{'s' * (needed > 1)}, found {num_gpus}"
            item.add_marker(pytest.mark.skip(reason=reason))
