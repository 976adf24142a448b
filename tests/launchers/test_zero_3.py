"""The real launcher under ZeRO 3: one number of the JSON changes, and nothing that is reported."""

import json
from pathlib import Path

import pytest

from magnetar.launchers import evaluate
from tests.runs import launch, make_corpus, records, write_config

pytestmark = pytest.mark.slow

STAGE_3 = {"zero_optimization.stage": 3}
# Small models' parameters would all stay whole between uses.
NOTHING_WHOLE = STAGE_3 | {"zero_optimization.stage3_param_persistence_threshold": 0}
RUNS: dict[str, dict] = {
    "zero_1": {},
    "zero_3": STAGE_3,
    "nothing_whole": NOTHING_WHOLE | {"zero_optimization.offload_optimizer": {"device": "cpu"}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    corpus = make_corpus(folder)
    found = {}
    for name, changes in RUNS.items():
        done = launch(write_config(folder, corpus, name, changes))
        assert done.returncode == 0, done.stdout
        assert "continued by the model" in done.stdout
        assert "Warning" not in done.stdout, done.stdout
        found[name] = folder / name
    return found


@pytest.mark.parametrize("name", ["zero_3", "nothing_whole"])
def test_every_record_is_that_of_zero_1(runs: dict[str, Path], name: str) -> None:
    expected, found = records(runs["zero_1"]), records(runs[name])
    assert len(found) == len(expected) == 8 + 3
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # float32 sums in another order; eight steps.
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_a_run_under_zero_3_is_evaluated_in_one_process(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(runs["nothing_whole"]), "--json"])
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((runs["nothing_whole"] / "summary.json").read_text())
    # The same weights; float32 sums of one process and of two.
    assert found["loss"] == pytest.approx(expected["validation_after"]["loss"], rel=1e-5)
