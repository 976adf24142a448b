"""Our tables of DeepSpeed's keys hold for the installed DeepSpeed."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from magnetar.engine.config import deepspeed as ours
from magnetar.engine.config.batch_sizes import BatchSizes, batch_problems, filled
from magnetar.engine.config.errors import section_model
from magnetar.engine.config.refused_keys import REFUSED
from magnetar.engine.config.schema import load_config
from tests.engine.config.shipped import CONFIGS, SHIPPED


class _Spy(dict):
    """A config that remembers which keys were looked for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: set[str] = set()

    def __copy__(self) -> "_Spy":
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def test_every_key_that_deepspeed_reads_is_supported_or_refused() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    spy = _Spy({"train_batch_size": 1})
    DeepSpeedConfig(spy)
    known = set(ours.DeepSpeedKeys.model_fields) | set(REFUSED)
    assert len(spy.seen) > 40
    assert spy.seen - known == set()


def _sections() -> list[tuple[str, type, type]]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return [
        ("zero_optimization", ours.ZeroConfig, DeepSpeedZeroConfig),
        ("bf16", ours.Bf16Config, DeepSpeedBF16Config),
        ("fp16", ours.Fp16Config, DeepSpeedFP16Config),
        ("tensorboard", ours.TensorBoardConfig, TensorBoardConfig),
        ("csv_monitor", ours.CsvConfig, CSVConfig),
        ("wandb", ours.WandbConfig, WandbConfig),
        ("comet", ours.CometConfig, CometConfig),
        ("comms_logger", ours.CommsLoggerConfig, CommsLoggerConfig),
        ("timers.throughput", ours.ThroughputTimerConfig, DeepSpeedThroughputTimerConfig),
    ]


def test_sections_have_deepspeeds_names_and_defaults() -> None:
    for path, own, theirs in _sections():
        fields: dict[str, Any] = {}
        for name, field in theirs.model_fields.items():  # type: ignore[attr-defined]
            fields |= {name: field, field.alias or name: field}
        for name, field in own.model_fields.items():  # type: ignore[attr-defined]
            assert name in fields, f"{path}.{name}"
            if field.default is not None:
                assert field.default == fields[name].default, f"{path}.{name}"
        for name in fields:
            assert name in own.model_fields or f"{path}.{name}" in REFUSED, f"{path}.{name}"  # type: ignore[attr-defined]


def _json_types(field: Any) -> set[str]:
    """The JSON types of a key's values."""
    schema = TypeAdapter(field.annotation).json_schema()
    found = set()
    for choice in schema.get("anyOf", [schema]):
        kind = schema["$defs"][choice["$ref"].split("/")[-1]] if "$ref" in choice else choice
        found.add(kind.get("type", "any"))
    return found | ({"integer"} if "number" in found else set())


def test_deepspeeds_sections_take_the_types_of_ours() -> None:
    for path, own, theirs in _sections():
        fields = {f.alias or name: f for name, f in theirs.model_fields.items()}  # type: ignore[attr-defined]
        for name, field in own.model_fields.items():  # type: ignore[attr-defined]
            if section_model(field.annotation) is None:
                is_sent = _json_types(field) - {"null"}  # a key that is null is left out
                assert is_sent <= _json_types(fields[name]), f"{path}.{name}"


def test_the_flops_profiler_has_deepspeeds_defaults() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    theirs = vars(DeepSpeedFlopsProfilerConfig({}))
    assert theirs == ours.FlopsProfilerConfig().model_dump()


def test_activation_checkpointing_has_deepspeeds_names_and_defaults() -> None:
    from deepspeed.runtime.activation_checkpointing.config import (
        DeepSpeedActivationCheckpointingConfig,
    )

    theirs = vars(DeepSpeedActivationCheckpointingConfig({}))
    own = ours.ActivationCheckpointingConfig().model_dump()
    assert own.items() <= theirs.items()
    refused = {f"activation_checkpointing.{name}" for name in theirs.keys() - own.keys()}
    assert refused <= REFUSED.keys()


def test_deepspeed_clips_at_one_when_the_key_is_absent() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    assert DeepSpeedConfig({"train_batch_size": 1}).gradient_clipping == 1.0
    about = ours.DeepSpeedKeys.model_fields["gradient_clipping"].description
    assert about is not None
    assert "would clip at 1.0" in about


def test_torch_adam_takes_our_parameters() -> None:
    import torch

    params = ours.AdamParams(lr=0.1).model_dump(mode="json", exclude_none=True)
    del params["adam_w_mode"]
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], **params)


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_accepts_every_resolved_config(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime import config as deepspeed_config

    # As many ranks as there are samples: a bin of sentence pairs is one, and they are few.
    world_size = min(8, json.loads((CONFIGS / name).read_text())["train_batch_size"])
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: world_size)
    config = load_config(CONFIGS / name, world_size=world_size)
    theirs = deepspeed_config.DeepSpeedConfig(config.to_dict())
    assert theirs.train_batch_size == config.deepspeed["train_batch_size"]
    assert theirs.gradient_clipping == config.gradient_clipping
    assert int(theirs.zero_optimization_stage) == config.zero_stage
    assert theirs.bfloat16_config.enabled == (config.dtype == "bf16")


SIZES = st.none() | st.integers(1, 64)


@settings(max_examples=200, deadline=None)
@given(train=SIZES, micro=SIZES, accumulation=SIZES, world_size=st.integers(1, 8))
def test_batch_sizes_are_filled_in_as_deepspeed_does(
    train: int | None, micro: int | None, accumulation: int | None, world_size: int
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    theirs = DeepSpeedConfig.__new__(DeepSpeedConfig)
    theirs.train_batch_size = train
    theirs.train_micro_batch_size_per_gpu = micro
    theirs.gradient_accumulation_steps = accumulation
    theirs.world_size = world_size
    sizes = BatchSizes(train, micro, accumulation)
    try:
        theirs._configure_train_batch_size()
    except AssertionError:
        assert batch_problems(sizes, world_size) != []
        return
    assert batch_problems(sizes, world_size) == []
    assert filled(sizes, world_size) == (
        theirs.train_batch_size,
        theirs.train_micro_batch_size_per_gpu,
        theirs.gradient_accumulation_steps,
    )
