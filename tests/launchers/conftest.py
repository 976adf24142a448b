"""One small trained run for the tests of what comes after training, and how commands refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.runs import launch, make_corpus, write_config


class Trained(NamedTuple):
    folder: Path
    corpus: Path

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], main: Callable, *arguments: object) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two ranks, ep_size 2, eight steps, checkpoints after four and eight."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = make_corpus(folder / "corpus")
    done = launch(write_config(folder, corpus), by_deepspeed=True)
    assert done.returncode == 0, done.stdout
    return Trained(folder / "run", corpus)
