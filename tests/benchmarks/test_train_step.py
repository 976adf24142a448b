"""The step benchmark measures what it says, at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.chart import step_table, summarised
from benchmarks.step_contenders import ClipTimer, cost, dense_config, sparse_config
from benchmarks.step_worker import OUT_OF_MEMORY, Job, random_batch, status_of
from benchmarks.train_step import Stopped, chosen_configs, main, parse
from magnetar.engine.config.schema import RunConfig, load_config
from tests.benchmarks import TINY as sizes
from tests.ranks import ROOT

PAPER = ROOT / "ds_configs" / "lm_xmoe.json"
QUICK = ROOT / "ds_configs" / "quickstart.json"
STAGE = "zero_optimization.stage"
TINY = ["--config", str(QUICK), "--batch", "4", "--micro-batch", "2", "--experts", "4", *sizes]


def paper(num_experts: int = 32) -> RunConfig:
    return sparse_config(load_config(PAPER), num_experts)


def test_our_model_and_the_dense_one_are_measured_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "step.json"
    main([*TINY, "--only", "dense,ours", "--out", str(out)])
    found = json.loads(out.read_text())
    assert (found["batch"], found["seq_len"], found["experts"]) == (4, 16, [4])
    assert {"hardware", "versions", "commit", "date", "data"} <= set(found)
    dense, ours = found["results"]
    for record in (dense, ours):
        assert record["status"] == "measured"
        (timing,) = record["rounds"]
        assert record["tokens_per_second"] == pytest.approx(64_000 / timing["step_ms"])
        assert 0 < timing["clip_ms"] < timing["step_ms"]
        assert timing["deepspeed_clip_ms"] > 0
        assert record["micro_batch"] == 2
    assert ours["num_parameters"] > dense["num_parameters"]
    assert ours["over_dense"] * dense["ours_over"] ** -1 == pytest.approx(1)
    assert "| **Magnetar, X-MoE** |" in capsys.readouterr().out

    picture = out.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    main(["--draw", str(out)])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_peers_and_compiled_models_train(tmp_path: Path) -> None:
    pytest.importorskip("torchscale")
    out = tmp_path / "step.json"
    names = ["dense_compiled", "ours_compiled", "deepspeed", "torchscale"]
    only = ["--only", ",".join(names), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *TINY, *only],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [(r["name"], r["status"]) for r in results] == [(name, "measured") for name in names]


@pytest.mark.parametrize("num_experts", [32, 64])
def test_the_yardstick_of_the_papers_model_has_its_useful_flops(num_experts: int) -> None:
    sparse = paper(num_experts)
    dense = dense_config(sparse)
    assert dense.model.moe is None
    assert dense.model.d_ff == 6144
    # Routers, and the biases and norms of two experts in place of one.
    assert cost(sparse) == pytest.approx(cost(dense), rel=2e-3)
    assert cost(sparse) >= cost(dense)


def test_the_sparse_run_is_one_rank_and_drops_nothing() -> None:
    moe = paper(64).model.moe
    assert moe is not None
    assert (moe.num_experts, moe.ep_size, moe.of_layer(0).router_width) == (64, 1, 32)
    assert (moe.dispatch, moe.capacity_factor, moe.top_k, moe.every) == ("dropless", None, 2, 2)


def test_micro_batches_fill_the_batch() -> None:
    (config,) = chosen_configs(parse([*TINY]))
    batch = list(random_batch(config, 1, torch.device("cpu")))
    assert [targets.shape for _, targets in batch] == [(2, 16)] * 2
    (tokens,), targets = batch[0]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert not torch.equal(targets, batch[1][1])
    assert int(targets.max()) < 64


def test_the_zero_stage_is_1_but_where_somebody_asks_for_another() -> None:
    stages = [chosen_configs(parse([*TINY, *more])) for more in ([], ["--set", f"{STAGE}=0"])]
    assert [config.zero_stage for (config,) in stages] == [1, 0]
    (config,) = chosen_configs(parse(["--config", str(PAPER), "--experts", "32"]))
    assert config.zero_stage == 1
    assert "tensorboard" not in config.deepspeed


def test_the_clipping_of_either_kind_is_timed() -> None:
    calls: list[str] = []

    class Optimizer:
        def scaled_global_norm(self) -> None:
            calls.append("DeepSpeed")

        def unscale_and_clip_grads(self, gradients: list) -> None:
            pass

        def _get_preflattened_grad_partition(self, index: int) -> None:
            pass

    optimizer: Any = Optimizer()
    optimizer._get_preflattened_grad_partition = lambda index: None
    optimizer.scaled_global_norm = lambda: calls.append("SparseClip")
    optimizer.unscale_and_clip_grads = lambda gradients: None
    timer = ClipTimer(optimizer, torch.device("cpu"))
    for sparse_clip in (True, False, True):
        timer.use(sparse_clip)
        optimizer.scaled_global_norm()
        assert len(timer.spans) == 1
        assert timer.take_milliseconds() > 0
        assert timer.take_milliseconds() == 0
    assert calls == ["SparseClip", "DeepSpeed", "SparseClip"]


class FakeWorker:
    """Contenders that fail each in its way."""

    started: list[tuple[str, int]]

    def __init__(self, job: Job) -> None:
        self.job = job
        self.micro_batch = job.values["train_micro_batch_size_per_gpu"]
        self.started.append((job.name, self.micro_batch))
        product = self.micro_batch * job.values["gradient_accumulation_steps"]
        assert product == job.values["train_batch_size"]

    def report(self) -> dict[str, Any]:
        if self.job.name == "torchscale" and self.micro_batch > 1:
            raise Stopped(OUT_OF_MEMORY)
        if self.job.name == "deepspeed":
            raise Stopped("not installed")
        return {"flops_per_token": 1.0, "note": "", "hardware": {"cpu_threads": 2}}

    def measure(self) -> dict[str, Any]:
        if self.job.name == "ours":
            raise Stopped("failed: round 1: RuntimeError: no | more")
        return {"step_ms": 10.0 if self.job.name == "dense" else 20.0, "peak_bytes": 1}

    def end(self) -> None:
        pass


@pytest.mark.parametrize("together", [True, False])
def test_what_fails_stops_nobody_and_less_memory_is_tried(
    together: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeWorker, "started", [], raising=False)
    monkeypatch.setattr(train_step, "Worker", FakeWorker)
    names = ["dense", "ours", "deepspeed", "torchscale"]
    options = parse([*TINY, "--rounds", "2"])
    options.together = together
    found = train_step.measure(options, names, chosen_configs(options))
    records = {record["name"]: record for record in found["results"]}
    assert records["ours"]["status"] == "failed: round 1: RuntimeError: no | more"
    assert records["deepspeed"]["status"] == "not installed"
    assert records["torchscale"]["micro_batch"] == 1
    assert len(records["torchscale"]["rounds"]) == len(records["dense"]["rounds"]) == 2
    assert records["torchscale"]["over_dense"] == 0.5
    asked = [size for name, size in FakeWorker.started if name == "torchscale"]
    assert asked == [2, 1] if together else asked == [2, 1, 1]
    assert "| the same model with deepspeed.moe | not installed |" in step_table(found)
    assert "failed: round 1: RuntimeError: no / more" in step_table(found)
    assert "torchscale: out of memory, goes on with a micro-batch of 1" in capsys.readouterr().err


def test_ratios_are_those_of_the_rounds() -> None:
    """A round in which the machine is slow is slow for all."""

    def record(name: str, *milliseconds: float) -> dict[str, Any]:
        rounds = [
            {"step_ms": ms, "peak_bytes": 2, "clip_ms": ms / 50, "deepspeed_clip_ms": ms / 25}
            for ms in milliseconds
        ]
        status = {"name": name, "experts": 4, "status": "measured"}
        return {**status, "rounds": rounds, "flops_per_token": 1e9}

    found = {"batch": 8, "seq_len": 128, "dtype": "bf16", "hardware": {"gpu": "NVIDIA H100 80GB"}}
    records = [record("dense", 90, 900, 100), record("ours", 100, 1000, 110)]
    dense, ours = summarised(found, records)
    assert ours["tokens_per_second"] == pytest.approx(1024 / 0.110)
    assert ours["over_dense"] == pytest.approx(0.9)
    assert dense["ours_over"] == pytest.approx(0.9)
    assert ours["clip_share"] == pytest.approx(0.02)
    assert ours["deepspeed_clip_share"] == pytest.approx(0.04)
    assert ours["mfu"] == pytest.approx(1024 / 0.110 * 1e9 / 989e12)
    found["dtype"] = "fp32"
    assert "mfu" not in summarised(found, records)[0]


def test_statuses_say_what_happened() -> None:
    assert status_of("build", torch.OutOfMemoryError("CUDA out of memory.")) == OUT_OF_MEMORY
    assert status_of("build", OSError("first line\nsecond")) == "failed: build: OSError: first line"


def test_the_end_of_a_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "to_json", lambda job: "no JSON")
    worker = train_step.Worker(Job("ours", {}, False, 1, 0))
    with pytest.raises(Stopped, match=r"failed: exit status 1: json\.decoder.JSONDecodeError"):
        worker.measure()
    worker.end()
