"""`import magnetar` in other people's programs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import magnetar
from magnetar.models.config import ModelConfig
from magnetar.models.weights.load_save import save_weights
from tests.ranks import ROOT

KEYS = {"vocab_size": 50, "num_layers": 2, "d_model": 16, "d_ff": 24, "num_heads": 2}
KEYS |= {"max_seq_len": 8}
TOKENS = torch.arange(12).view(2, 6)


def test_importing_the_package_imports_neither_torch_nor_deepspeed() -> None:
    program = "import sys, magnetar; dir(magnetar)"
    program += (
        "; print([name for name in ('torch', 'deepspeed', 'pydantic') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_is_there_and_any_other_is_refused() -> None:
    for name in magnetar._PLACES:
        assert name in dir(magnetar)
        assert getattr(magnetar, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        magnetar.Transformer  # noqa: B018


def test_a_model_of_keys_equals_one_of_a_config_and_comes_back_from_its_folder(
    tmp_path: Path,
) -> None:
    model = magnetar.build_model(KEYS, seed=1).eval()
    logits = model(TOKENS).logits
    of_config = magnetar.build_model(ModelConfig.model_validate(KEYS), seed=1).eval()
    assert torch.equal(of_config(TOKENS).logits, logits)
    save_weights(tmp_path / "lm", model.config, dict(model.state_dict()))
    loaded = magnetar.load(str(tmp_path / "lm"))
    assert loaded.config == model.config
    assert torch.equal(loaded.model(TOKENS).logits, logits)


def test_keys_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="d_model=16 must be a multiple of num_heads=3"):
        magnetar.build_model(KEYS | {"num_heads": 3}, seed=1)
