"""Small models and commands for the tests of conversions."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magnetar.engine.config.errors import apply_overrides
from magnetar.launchers.convert import main
from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, empty_model
from magnetar.models.weights.load_save import load_model, save_weights, tensor_shapes
from tests.models import brute_force

SHAPE: dict[str, Any] = {
    "vocab_size": 23,
    "num_layers": 4,
    "d_model": 16,
    "d_ff": 24,
    "num_heads": 4,
    "max_seq_len": 12,
}
BOTH = {"architecture": "encoder_decoder"}
# Activations are about 1. In each of the 4 layers the sums of a feed-forward network (16 and 24
# products) may run in another order for experts than for a dense network: 160 float32 roundings of
# 2^-24 before a logit. One expert of eight that is off by a hundredth moves logits by 1e-4.
TOLERANCE = 160 * 2**-24


def config(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | keys)


def save_random(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> nn.Module:
    """A model whose every number matters, written to a folder, in evaluation mode."""
    model = empty_model(config(**keys))
    brute_force.randomize(model, seed=3)
    model.to(dtype)
    state = model.state_dict()
    names = tensor_shapes(model.config)
    save_weights(folder, model.config, {name: state[name] for name in names})
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of two sequences of twelve tokens, one of them padded."""
    tokens = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 9:] = True
    if isinstance(model, EncoderDecoder):
        return model(tokens, tokens.flip(1), padding, padding).logits[~padding]
    return model(tokens, padding).logits[~padding]


def folder_logits(folder: Path) -> Tensor:
    return logits(load_model(folder))


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def flip_bit(file: Path, place: int = -1) -> None:
    """Damage one byte of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pasted(printed: str) -> dict[str, Any]:
    """The keys that the arguments in a line `train ...` set, read as a shell and a run do."""
    (line,) = (line for line in printed.splitlines() if line.startswith("train "))
    words = shlex.split(line)[1:]
    assert set(words[::2]) == {"--set"}
    keys: dict[str, Any] = {}
    assert apply_overrides(keys, words[1::2])[1] == []
    return keys


Refusal = Callable[..., str]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one message with which the command ends, with status 2."""
    with pytest.raises(SystemExit) as ended:
        convert(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def assert_refused(
    refused: Refusal,
    command: str,
    tmp_path: Path,
    model: dict[str, Any],
    options: tuple,
    messages: list[str],
) -> None:
    """A command refuses a model of these keys with these words, and leaves nothing behind."""
    save_random(tmp_path / "source", **model)
    said = refused(command, tmp_path / "source", "--out", tmp_path / "made", *options)
    for message in messages:
        assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
