"""A run and an export that an earlier version has written, read by this one.

`fixtures/run_before_one_opener.tar.xz` was written by the commit in its file WRITTEN_BY: a text run
of four steps with its checkpoint after two, the export of that, the prepared data, and the last
logits of a few tokens as that commit computed them.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from magnetar.convert.export import export
from magnetar.convert.run_folders import import_weights
from magnetar.engine.checkpoint.format import MANIFEST, manifest_digest
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.checkpoint.run_folder import check_run_folder
from magnetar.engine.config.schema import load_config
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


@pytest.fixture
def with_retired_keys(earlier: Path, tmp_path: Path) -> Path:
    """A copy of the run whose config says more of what did nothing in earlier versions."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    manifest = json.loads((step / MANIFEST).read_text())
    config = manifest["config"]
    assert config["zero_optimization"]["load_from_fp32_weights"] is True
    config["checkpoint"] = {"tag_validation": "Warn"}
    manifest["sha256"] = manifest_digest(manifest)
    (step / MANIFEST).write_text(json.dumps(manifest))
    for file in ("config.json", "run/config.json"):
        (tmp_path / file).write_text(json.dumps(config))
    return tmp_path


def test_a_run_with_keys_that_did_nothing_is_read_and_converted(with_retired_keys: Path) -> None:
    run = with_retired_keys / "run"
    saved = open_run(run)
    assert saved.run_config is not None
    check_run_folder(load_config(run / "config.json", ["magnetar.training.run_dir=" + str(run)]))
    out = with_retired_keys / "converted"
    export(run, out, tokenizer=with_retired_keys / "prepared" / "tokenizer.model")
    assert open_run(out).run_config == saved.run_config
    import_weights(out, with_retired_keys / "imported")
    assert open_run(with_retired_keys / "imported").run_config == saved.run_config


@pytest.mark.slow
def test_training_goes_on_from_its_checkpoint_with_the_losses_that_it_had(
    with_retired_keys: Path,
) -> None:
    earlier = with_retired_keys
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
