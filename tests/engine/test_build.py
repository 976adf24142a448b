"""What is refused before an engine is built."""

from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from magnetar.engine.build import missing_types
from tests.runs import launch, make_corpus, write_config


def test_a_type_that_the_device_lacks_is_named_with_those_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = type(get_accelerator())
    monkeypatch.setattr(device, "is_bf16_supported", lambda _: False)
    monkeypatch.setattr(device, "is_fp16_supported", lambda _: True)
    (text,) = missing_types().values()
    assert text.endswith("does not compute in bf16: use fp16.enabled=true or neither, for float32")
    monkeypatch.setattr(device, "is_bf16_supported", lambda _: True)
    assert missing_types() == {}


@pytest.mark.slow
def test_training_in_a_type_that_no_device_has_ends_with_status_2(tmp_path: Path) -> None:
    if "fp16" not in missing_types():
        pytest.skip("this machine computes in fp16")
    changes = {"fp16": {"enabled": True}, "magnetar.training.num_steps": 1}
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"), changes=changes)
    done = launch(config)
    assert done.returncode == 2
    assert done.stdout.count("fp16.enabled=true: the ") == 1
    assert "Traceback" not in done.stdout
    assert launch(config, "--set", "fp16.enabled=false").returncode == 0
