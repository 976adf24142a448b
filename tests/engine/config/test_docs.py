"""The generated page and schema describe what the loader accepts."""

import json

import jsonschema
import pytest

from magnetar.engine.config.docs import generated_files, readme, schema
from magnetar.engine.config.errors import key_paths
from magnetar.engine.config.refused_keys import REFUSED
from magnetar.engine.config.schema import ConfigFile, load_config
from magnetar.models.config import TorchScaleModelKeys
from magnetar.models.moe.config import TorchScaleMoEKeys
from tests.engine.config.shipped import CONFIGS, SHIPPED, example_config


def errors(value: object) -> list[str]:
    """What the schema finds wrong."""
    return [e.message for e in jsonschema.Draft202012Validator(schema()).iter_errors(value)]


def test_the_generated_files_are_up_to_date() -> None:
    for name, text in generated_files().items():
        assert (CONFIGS / name).read_text() == text, "run: magnetar config docs"


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_accepts_every_shipped_config_as_written_and_resolved(name: str) -> None:
    assert errors(json.loads((CONFIGS / name).read_text())) == []
    world_size = 2 if name.startswith(("mt_", "translate_")) else 8
    assert errors(load_config(CONFIGS / name, world_size=world_size).to_dict()) == []


def test_the_schema_accepts_the_minimal_example() -> None:
    assert errors(example_config()) == []


def test_a_run_of_the_minimal_example_that_is_killed_need_not_start_over() -> None:
    training = example_config()["magnetar"]["training"]
    assert training["save_every"] < training["num_steps"]
    assert "killed starts over" in readme()


def test_the_schema_refuses_unknown_keys_and_wrong_values() -> None:
    raw = example_config()
    magnetar = raw["magnetar"]
    assert errors({**raw, "magnetar": {**magnetar, "modle": {}}})
    assert errors({**raw, "magnetar": {**magnetar, "model": {**magnetar["model"], "x": 1}}})
    assert errors({**raw, "scheduler": {}})
    assert errors({**raw, "gradient_clipping": "1"})
    assert errors({**raw, "zero_optimization": {"stage": 4}})


def test_the_keys_of_imported_models_stand_apart() -> None:
    for_everybody, for_imports = readme().split("## Keys for imported models")
    for name in TorchScaleModelKeys.model_fields.keys() | TorchScaleMoEKeys.model_fields.keys():
        assert f"| `{name}` |" not in for_everybody
        assert f"| `{name}` |" in for_imports


def test_the_page_names_every_key_and_every_refusal() -> None:
    page = readme()
    for path in key_paths(ConfigFile):
        assert f"`{path.rpartition('.')[2]}`" in page
    for path, reason in REFUSED.items():
        assert f"`{path}`" in page
        assert reason in page
