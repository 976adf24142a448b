"""The scaling benchmark measures what it says, and loses nothing that it has."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.measurement import launch
from benchmarks.scaling import (
    Session,
    corpus,
    expert_parallel_sizes,
    main,
    paper_configs,
    parse,
    require_gpus,
    small_model,
    weak_config,
)
from benchmarks.scaling_chart import apart, draw, summary, table
from magnetar.data.errors import UserError
from magnetar.data.text.token_files import open_prepared
from magnetar.engine.checkpoint import format as checkpoint_files
from tests.faults import resume

GIB = 2**30


def options_for(gpus: int, *arguments: str) -> Any:
    options = parse(["--gpus", str(gpus), "--out", "x.json", *arguments])
    require_gpus(options, there=16)
    return options


def test_both_ends_of_the_scaling_come_first() -> None:
    assert expert_parallel_sizes(2) == [1, 2]
    assert expert_parallel_sizes(8) == [1, 8, 2, 4]


def test_every_gpu_has_as_many_experts_and_sequences_at_every_size() -> None:
    options = options_for(8)
    for ep_size in (1, 2, 4, 8):
        config = weak_config(options, ep_size)
        moe, sizes = config.model.moe, config.deepspeed
        assert (moe.num_experts, moe.ep_size, moe.dispatch) == (16 * ep_size, ep_size, "dropless")
        assert sizes["train_batch_size"] == 256 * ep_size
        assert sizes["gradient_accumulation_steps"] == 1
        assert (config.dtype, config.zero_stage, config.data.seq_len) == ("bf16", 1, 128)


@pytest.mark.parametrize(
    ("gpus", "gib", "num_experts", "micro_batch"),
    [(8, 79, 256, 256), (4, 79, 256, 128), (2, 79, 128, 128), (2, 139, 256, 128), (2, 30, 32, 256)],
)
def test_as_many_experts_are_taken_as_fit(
    gpus: int, gib: int, num_experts: int, micro_batch: int
) -> None:
    configs, states_bytes = paper_configs(options_for(gpus), gib * GIB)
    assert states_bytes <= 0.8 * gib * GIB
    assert list(configs) == [
        f"{kind}, {batch} sequences" for batch in (256, 2048) for kind in ("dense", "sparse")
    ]
    for name, config in configs.items():
        sequences = 256 if "256" in name else 2048
        assert config.deepspeed["train_batch_size"] == sequences * gpus
        assert config.deepspeed["train_micro_batch_size_per_gpu"] == micro_batch
        assert config.training.compile
        assert config.zero_stage == 1
        if "sparse" in name:
            assert config.model.moe.num_experts == num_experts
            assert config.model.moe.ep_size == gpus


def test_experts_that_never_fit_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"16 experts on 8 GPUs keep .* leave out `paper`"):
        paper_configs(options_for(8), GIB)


def test_as_many_experts_a_gpu_as_on_eight_can_be_asked_for() -> None:
    configs, _ = paper_configs(options_for(2, "--paper-experts", "64"), 79 * GIB)
    assert configs["sparse, 2048 sequences"].model.moe.num_experts == 64
    assert configs["sparse, 2048 sequences"].deepspeed["train_micro_batch_size_per_gpu"] == 256


def test_the_small_model_has_an_expert_and_a_sequence_for_each_gpu() -> None:
    assert small_model(4, Path("text"))["magnetar.model.moe.num_experts"] == 8
    assert small_model(16, Path("text"))["train_batch_size"] == 16


def test_the_text_is_the_projects_own(tmp_path: Path) -> None:
    prepared = open_prepared(corpus(tmp_path))
    assert prepared.train.num_tokens > 16 * 33 * 40  # the batches of 40 steps
    assert prepared.valid.num_tokens > 16 * 33


def session_of(tmp_path: Path, *arguments: str) -> Session:
    return Session(parse(["--out", str(tmp_path / "x.json"), *arguments]), {})


def test_a_failure_is_kept_and_the_next_launch_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(tmp_path)

    def fail(_limit: float) -> None:
        raise RuntimeError("no more memory")

    def run_out(limit: float) -> None:
        raise subprocess.TimeoutExpired("deepspeed", limit)

    limits: list[float] = []
    session.attempt("one", fail)
    session.attempt("two", run_out)
    session.attempt("three", limits.append)
    assert json.loads((tmp_path / "x.json").read_text())["failed"] == {
        "one": "RuntimeError: no more memory",
        "two": "killed, for it was not done after 260 s",
    }
    assert limits == [260]
    assert "one FAILED: RuntimeError: no more memory" in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session, limits = session_of(tmp_path), list[float]()
    session.begun -= 500
    session.attempt("checkpoint", limits.append)
    assert limits == [pytest.approx(20 + scaling.GRACE, abs=5)]
    session.begun -= 21
    session.attempt("numbers", lambda _limit: pytest.fail("it began"))
    assert json.loads((tmp_path / "x.json").read_text())["skipped"] == ["numbers"]
    assert "numbers: skipped, --seconds 520 are over" in capsys.readouterr().out


def test_what_ranks_found_before_they_failed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_done(_module: str, ranks: int, arguments: list[Path], *_: Any) -> Any:
        job = json.loads(arguments[0].read_text())
        Path(job["out"]).write_text('{"dense": 1}')
        return subprocess.CompletedProcess([], 1, f"{ranks} ranks, {job['rounds']} rounds: killed")

    monkeypatch.setattr(scaling, "launch", half_done)
    into: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="the ranks ended with 1:\n2 ranks, 5 rounds: killed"):
        session_of(tmp_path).launch(2, {"runs": {}}, into, 1.0)
    assert into == {"dense": 1}


def test_fewer_gpus_continue_from_the_middle_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[resume.Layout, list[str]]] = []

    def train(layout: resume.Layout, run_dir: Path, last: int, *_: Any) -> list[float]:
        if not run_dir.exists():
            for step in (20, 40):
                (run_dir / f"{step}").mkdir(parents=True)
        calls.append((layout, sorted(path.name for path in run_dir.iterdir())))
        return [float(step) for step in range(1, last + 1)]

    def checkpoints(run_dir: Path) -> list[SimpleNamespace]:
        return [SimpleNamespace(path=path) for path in sorted(run_dir.iterdir())]

    monkeypatch.setattr(resume, "train", train)
    monkeypatch.setattr(checkpoint_files, "complete_checkpoints", checkpoints)
    session = session_of(tmp_path, "--gpus", "8")
    scaling.measure_checkpoint(session, tmp_path / "text", tmp_path)
    assert calls == [
        (resume.Layout(8, 8, 1), ["20", "40"]),
        (resume.Layout(2, 2, 1), ["20"]),
        (resume.Layout(4, 4, 1), ["20"]),
    ]
    assert session.found["checkpoint"] == {n: list(range(21, 41)) for n in ("8", "2", "4")}
    assert session.found["failed"] == {}


def test_a_run_that_failed_is_continued_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> list[float]:
        raise SystemExit("world 8, ep 8, ZeRO 1 ended with 1")

    monkeypatch.setattr(resume, "train", train)
    session = session_of(tmp_path, "--gpus", "8")
    scaling.measure_checkpoint(session, tmp_path / "text", tmp_path)
    assert session.found["failed"] == {
        "checkpoint, EP 8, uninterrupted": "SystemExit: world 8, ep 8, ZeRO 1 ended with 1"
    }


def record(ranks: int, milliseconds: list[float], **more: Any) -> dict[str, Any]:
    sizes = {"sequences": 10, "seq_len": 100, "num_experts": 2 * ranks, "num_parameters": 10**9}
    about = {"ranks": ranks, "dtype": "bf16", "flops_per_token": 989e8, "profile": []}
    return {"step_ms": milliseconds, "peak_bytes": 3 * GIB} | sizes | about | more


def results() -> dict[str, Any]:
    profile = [{"exposed_ms": 1.0, "step_ms": 100.0}, {"exposed_ms": 3.0, "step_ms": 100.0}]
    curve = {"loss": [4.0, 2.0], "norm": [1.0, 1.0]}
    return {
        "benchmark": "scaling",
        "gpus": 2,
        "date": "2026-01-02T00:00:00",
        "hardware": {"gpu": "NVIDIA H100", "machine": "x"},
        "versions": {"torch": "2", "deepspeed": "0"},
        "skipped": [],
        "failed": {},
        "scaling": {
            "1": record(1, [100.0, 90.0, 110.0]),
            "2": record(2, [125.0], profile=profile),
        },
        "paper": {
            "asked_experts": 8,
            "num_experts": 4,
            "runs": {
                "dense, 10 sequences": record(2, [80.0]),
                "sparse, 10 sequences": record(2, [100.0]),
            },
        },
        "numbers": {"1": curve, "2": {"loss": [4.0, 2.002], "norm": [1.0, 1.0]}},
        "checkpoint": {"2": [3.0, 3.0], "1": [3.0, 3.00003]},
    }


def test_speeds_are_over_one_gpus_and_over_the_dense_models() -> None:
    about = summary(results())
    one, two = about["scaling"]["1"], about["scaling"]["2"]
    assert one["tokens_per_second_per_gpu"] == 10_000
    assert (one["slowest"], one["fastest"]) == (1e6 / 110, 1e6 / 90)
    assert one["mfu"] == pytest.approx(1.0)
    assert two["over_one_gpu"] == pytest.approx(0.8)
    assert two["exposed_share"] == pytest.approx(0.02)
    assert two["largest_exposed_share"] == pytest.approx(0.03)
    assert about["paper"]["sparse, 10 sequences"]["over_dense"] == pytest.approx(0.8)
    assert about["numbers"] == {
        "EP 2, loss": pytest.approx(1e-3),
        "EP 2, norm": 0.0,
    }
    assert about["checkpoint"] == {"EP 1, loss": pytest.approx(1e-5)}


def test_the_table_says_what_holds_and_what_is_missing() -> None:
    found = results() | {"skipped": ["checkpoint"], "failed": {"scaling, EP 4": "killed"}}
    text = table(found)
    assert (
        "| 2 | 4 | 1,000.0 | 8,000 (8,000 to 8,000) | 0.800 | 80.0% | 2.0% (3.0%) | 3.0 |" in text
    )
    assert "numbers: EP 2, loss: 1.0e-03 from EP 1, BEYOND 5e-05" in text
    assert "checkpoint: EP 1, loss: 1.0e-05 from the run that went on, within 5e-05" in text
    assert "8 experts do not fit, 4 do" in text
    assert "skipped for lack of time: checkpoint" in text
    assert "failed: scaling, EP 4" in text


def test_differences_are_relative() -> None:
    assert apart([2.2, 1.0], [2.0, 1.0]) == [pytest.approx(0.1), 0.0]


@pytest.mark.parametrize("missing", [(), ("paper",), ("scaling", "numbers"), scaling.PARTS])
def test_a_picture_is_drawn_of_whatever_there_is(missing: tuple[str, ...], tmp_path: Path) -> None:
    found = {key: value for key, value in results().items() if key not in missing}
    draw(found, tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").stat().st_size > 10_000
    assert table(found)


def test_results_without_a_picture_say_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(results()))
    main(["--draw", str(file)])
    assert f"wrote {file} and {file.with_suffix('.png')}" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(["--draw", str(file)])
    assert "a picture needs matplotlib: --draw it where that is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "arguments", "shown"),
    [
        (0, [], "this machine has no GPU"),
        (1, [], "has 1 GPU, .* two at least: use --c"),
        (4, ["--gpus", "8"], "--gpus 8: this machine has 4; use as many at most"),
        (8, ["--paper-experts", "100"], r"--paper-experts 100: .* a power of two, such as 64"),
    ],
)
def test_gpus_that_are_not_there_are_refused(there: int, arguments: list[str], shown: str) -> None:
    with pytest.raises(UserError, match=shown):
        require_gpus(parse(["--out", "a.json", *arguments]), there)


def test_the_largest_power_of_two_of_the_gpus_is_taken() -> None:
    options = parse(["--out", "a.json"])
    require_gpus(options, there=7)
    assert options.gpus == 4


@pytest.mark.slow
def test_ranks_that_take_too_long_are_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    for seconds in (20, 60, 180):  # on a busy machine the first of them ends before the rank begins
        with pytest.raises(subprocess.TimeoutExpired):
            launch("tests.benchmarks.sleeping_rank", 1, [file], quietly=True, seconds=seconds)
        if file.exists():
            break
    rank = Path("/proc", file.read_text())
    for _ in range(50):  # the system takes a moment
        if not rank.exists():
            return
        time.sleep(0.1)
    pytest.fail("the rank goes on")


@pytest.mark.slow
def test_every_size_gives_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = tmp_path / "new" / "scaling.json"
    main(["--cpu", "--only", "numbers", "--out", str(out)])
    found = json.loads(out.read_text())
    assert max(summary(found)["numbers"].values()) < 5e-5
    assert len(found["numbers"]["2"]["loss"]) == 20
    assert out.with_suffix(".png").is_file()
    assert "within 5e-05" in capsys.readouterr().out
