"""Reading a file and applying --set."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.data.errors import UserError
from magnetar.engine.config.errors import apply_overrides, read_config_file
from magnetar.engine.config.schema import load_config
from tests.ranks import ROOT

EXAMPLE = Path(__file__).with_name("example.json")  # like the quickstart, but nobody tunes it


def complaint(folder: Path, text: str | bytes) -> str:
    """The error that a file of this text leads to."""
    path = folder / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{\n "a": 1,\n}', ["line 3, column 1", "found '}'", "comma before it"]),
        ('{\n // no\n "a": 1}', ["line 2, column 2", "JSON has no comments"]),
        ('{"a": 1 "b": 2}', ["line 1, column 9", "is a comma missing before it?"]),
        ('{"a": True}', ["line 1, column 7", "found 'T'", "JSON writes true"]),
        ("{'a': 1}", ["double quotes"]),
        ('{"a": 1', ["the end of the file"]),
        ("", ["the end of the file"]),
        ("[1, 2]", ["holds [1, 2]", "a config is an object"]),
        ('{"train_batch_size": NaN}', ["NaN is not JSON"]),
        ("[" * 100_000 + "]" * 100_000, ["nested more than 50 deep: is a bracket repeated"]),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, ["nested more than 50 deep"]),
        ('{"a": ' * 52 + "1" + "}" * 52, ["nested more than 50 deep"]),
        ("[" * 50 + "]" * 50, ["a config is an object"]),
        (b'{"a": "\xff"}', ["is not UTF-8 text (byte 7)", "save it as UTF-8"]),
    ],
)
def test_what_is_not_json_is_located(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    found = complaint(tmp_path, text)
    assert "x.json" in found
    for part in parts:
        assert part in found


def test_a_key_given_twice_is_an_error_at_any_depth(tmp_path: Path) -> None:
    found = complaint(
        tmp_path,
        '{"bf16": {"enabled": true}, "bf16": {"enabled": false},'
        ' "magnetar": {"model": {"num_layers": 4, "num_layers": 8}}}',
    )
    assert 'bf16 is given 2 times ({"enabled": true}, then {"enabled": false}): keep one' in found
    assert "magnetar.model.num_layers is given 2 times (4, then 8): keep one of them" in found


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exampel\.json does not exist: did you mean .*example"):
        load_config(EXAMPLE.with_name("exampel.json"))
    with pytest.raises(UserError, match="there is no folder"):
        load_config(tmp_path / "none" / "x.json")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="check the path"):
        load_config(tmp_path / "x.json")
    (tmp_path / "abc.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds abc\.json"):
        load_config(tmp_path / "zzzzzz.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_config_file(path) == ({"a": 1}, [])


def test_set_replaces_and_creates() -> None:
    config = load_config(
        EXAMPLE,
        [
            "magnetar.model.num_layers=4",
            "zero_optimization.stage=2",
            "bf16.enabled=true",
            "magnetar.training.run_dir=runs/a=b",
            "optimizer.params.betas=[0.9, 0.95]",
        ],
        world_size=2,
    )
    assert config.model.num_layers == 4
    assert (config.zero_stage, config.dtype) == (2, "bf16")
    assert config.training.run_dir == "runs/a=b"
    assert config.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.95]


def test_set_makes_a_dense_model() -> None:
    assert load_config(EXAMPLE, ["magnetar.model.moe=null"]).model.moe is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("magnetar.model.num_layers", ["is not path=value", "--set magnetar.model.num_layers=4"]),
        ("=4", ["is not path=value"]),
        ("magnetar..model=4", ["is not path=value"]),
        ("gradient_clipping.x=1", ["gradient_clipping=1.0 is not an object", "as a whole"]),
        ("optimizer.params.betas.0=1", ["optimizer.params.betas=[0.9, 0.98] is not an object"]),
        ('magnetar.model.moe={"top_k": 1, "top_k": 2}', ["magnetar.model.moe.top_k is given 2"]),
        (
            "magnetar.model.num_layrs=4",
            [
                "magnetar.model.num_layrs=4 is not a known key: did you mean "
                "magnetar.model.num_layers? (from --set magnetar.model.num_layrs=4)"
            ],
        ),
        ("magnetar.model.num_layers=four", ['num_layers="four" must be a whole number', "(from"]),
        (
            "magnetar.model.vocab_size=50304000000",
            ["vocab_size=50304000000 must be a whole number, at least 2, at most 16777216"],
        ),
        ("optimizer.params.betas=[1, 2]", ["betas[0]=1", "(from --set optimizer.params.betas="]),
        ("bf16.enabled=" + "[" * 100_000, ["--set bf16.enabled: objects and lists are nested"]),
        (
            "bogus.deep.path=1",
            ['bogus={"deep": {"path": 1}} is not a known key', "(from --set bogus.deep.path=1)"],
        ),
        ("zero_optimisation.stage=2", ["(from --set zero_optimisation.stage=2)"]),
        ("scheduler.type=WarmupLR", ["is refused", "(from --set scheduler.type=WarmupLR)"]),
    ],
)
def test_a_wrong_set_is_named(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(EXAMPLE, [override], world_size=2)
    for part in parts:
        assert part in str(caught.value)


def test_the_same_path_set_twice_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--set bf16\.enabled is given twice: keep one of them"):
        load_config(EXAMPLE, ["bf16.enabled=true", "bf16.enabled=false"])


def test_overrides_do_not_leak_between_paths() -> None:
    raw: dict = {"a": {"b": 1}}
    assert apply_overrides(raw, ["a.c=2", "d.e.f=x"]) == (["a.c", "d.e.f"], [])
    assert raw == {"a": {"b": 1, "c": 2}, "d": {"e": {"f": "x"}}}


def test_checking_a_config_loads_neither_torch_nor_deepspeed() -> None:
    code = "import sys, engine.config.docs; print({'torch', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_arguments: object, **_options: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"example\.json cannot be read: Permission denied: check"):
        load_config(EXAMPLE)
