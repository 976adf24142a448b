"""A run and an export that an earlier version has written, read by this one.

`fixtures/run_before_one_opener.tar.xz` was written by the commit in its file WRITTEN_BY: a text run
of four steps with its checkpoint after two, the export of that, the prepared data, and the last
logits of a few tokens as that commit computed them.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from magnetar.engine.checkpoint.open_run import open_run
from tests.ranks import ROOT
from tests.runs import environment, records

FIXTURE = Path(__file__).parent / "fixtures" / "run_before_one_opener.tar.xz"
# Activations are about 1. A logit is at the end of some 300 float32 roundings of 2^-24 each, which
# another machine may do in another order. One weight that is read wrongly moves logits by 1e-3.
TOLERANCE = 300 * 2**-24


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_its_checkpoint_and_its_export_give_the_logits_that_they_gave(earlier: Path) -> None:
    expected = json.loads((earlier / "expected.json").read_text())
    tokens = torch.tensor(expected["tokens"])
    found = []
    for folder in ("run", "run/checkpoints/step_00000002", "export"):
        run = open_run(earlier / folder, data=earlier / "prepared")
        assert run.step == 2
        with torch.no_grad():
            logits = run.model.eval()(tokens.to(run.device)).logits[0, -1].cpu()
        torch.testing.assert_close(
            logits, torch.tensor(expected["logits"]), rtol=0.0, atol=TOLERANCE
        )
        found.append(logits)
    assert all(torch.equal(found[0], logits) for logits in found)


@pytest.mark.slow
def test_training_goes_on_from_its_checkpoint_with_the_losses_that_it_had(earlier: Path) -> None:
    then = records(earlier / "run")
    command = [sys.executable, "-m", "magnetar", "train", "--deepspeed_config", "config.json"]
    done = subprocess.run(
        command,
        cwd=earlier,  # the data's path in the checkpoint is relative
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming after step 2" in done.stdout
    now = records(earlier / "run")
    assert [record["step"] for record in now] == [record["step"] for record in then]
    for before, after in zip(then, now, strict=True):
        for name in before.keys() & {"loss", "grad_norm", "valid_loss"}:
            # Float32 sums in another order on another machine; bit for bit the same on one.
            assert after[name] == pytest.approx(before[name], rel=1e-5), (before["step"], name)
