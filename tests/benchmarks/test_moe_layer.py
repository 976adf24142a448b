"""The layer benchmark measures what it says, at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import moe_layer
from benchmarks.layer_profile import PASS, own_times, report
from benchmarks.layers import (
    Contender,
    Layer,
    Scorer,
    Shape,
    build_dense,
    build_ours,
    need,
)
from benchmarks.moe_layer import ROUTINGS, Runner, main
from tests.ranks import ROOT

TINY = ["--tokens", "64", "--d-model", "32", "--d-ff", "48", "--repeats", "2", "--steps", "1"]
CPU = torch.device("cpu")


def shape(num_experts: int = 8, dtype: torch.dtype = torch.float32, **keys: Any) -> Shape:
    sizes = {"tokens": 64, "d_model": 32, "d_ff": 48, "top_k": 2} | keys
    return Shape(**sizes, num_experts=num_experts, device=CPU, dtype=dtype)


def test_results_and_picture_are_written_and_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "layer.json"
    only = "dense,ours,dense_norm,ours_norm"
    main([*TINY, "--experts", "4,8", "--only", only, "--out", str(out)])
    found = json.loads(out.read_text())
    assert (found["tokens"], found["experts"], found["top_k"]) == (64, [4, 8], 2)
    assert {"hardware", "versions", "commit", "date"} <= set(found)
    assert len(found["results"]) == len(only.split(",")) * 2 * len(ROUTINGS)
    by_name = {(r["experts"], r["routing"], r["name"]): r for r in found["results"]}
    for (experts, routing, name), record in by_name.items():
        assert record["status"] == "measured"
        assert len(record["milliseconds"]) == found["rounds"] == 2
        assert record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
        dense = by_name[experts, routing, "dense_norm" if "norm" in name else "dense"]
        assert record["ratio"] == pytest.approx(record["median_ms"] / dense["median_ms"])
    printed = capsys.readouterr().out
    assert "| **Magnetar, X-MoE router, inner LayerNorm** |" in printed

    picture = out.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    main(["--draw", str(out)])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_peers_that_run_on_a_cpu_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("torchscale")
    out = tmp_path / "layer.json"
    only = ["--only", "dense,deepspeed,torchscale", "--experts", "8", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.moe_layer", *TINY, *only],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [(r["name"], r["status"]) for r in results] == [
        (name, "measured") for name in ("dense", "deepspeed", "torchscale")
    ] * 2
    assert [r["busiest_expert"] for r in results[-2:]] == [1.0, 1.0]


def test_peers_that_fail_or_are_missing_stop_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(shape: Shape) -> Layer:
        need("no_such_package_anywhere")
        raise AssertionError("it is not there")

    def broken(shape: Shape) -> Layer:
        raise OSError("first line\nsecond line")

    def wrong(shape: Shape) -> Layer:
        layer = build_dense(shape)
        return Layer(layer.module, lambda x: (x[..., :1], None), None, 1)

    def frozen(shape: Shape) -> Layer:
        layer = build_dense(shape)
        return Layer(layer.module, lambda x: (2 * x, None), None, 1)

    def tiring(shape: Shape) -> Layer:
        layer, calls = build_dense(shape), []

        def apply(x: Tensor) -> tuple[Tensor, None]:
            calls.append(None)
            if len(calls) > 4:
                raise RuntimeError("no more")
            return layer.apply(x)[0], None

        return Layer(layer.module, apply, None, 1)

    builders = (missing, broken, wrong, frozen, tiring)
    peers = {build.__name__: Contender(build.__name__, build) for build in builders}
    everybody = {"dense": moe_layer.CONTENDERS["dense"], **peers}
    monkeypatch.setattr(moe_layer, "CONTENDERS", everybody)
    out = tmp_path / "layer.json"
    main([*TINY, "--experts", "4", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    statuses = {r["name"]: r["status"] for r in results if r["routing"] == ROUTINGS[0]}
    assert statuses == {
        "dense": "measured",
        "missing": "not installed",
        "broken": "failed: build: OSError: first line",
        "wrong": "failed: first pass: RuntimeError: the output is torch.float32 (1, 64, 1)",
        "frozen": "failed: first pass: RuntimeError: no gradient for "
        "w1.weight, w1.bias, w2.weight, w2.bias",
        "tiring": "failed: round 1: RuntimeError: no more",
    }
    assert "| missing | not installed |" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["xmoe", "linear"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (16, 2), (64, 2), (12, 3)])
def test_balanced_routing_gives_every_expert_equally_many(
    num_experts: int, top_k: int, router: str, dtype: torch.dtype
) -> None:
    sizes = shape(num_experts, dtype, tokens=768, d_model=64, top_k=top_k)
    runner = Runner(build_ours(sizes, router=router), sizes)
    even = [768 * top_k // num_experts] * num_experts
    runner.set_tokens("balanced")
    _, stats = runner.layer.module(runner.x)
    assert stats.load.tolist() == even
    assert runner.load == even
    if top_k == 2:  # first choices are drawn within the pairs
        pairs = stats.first_choices.view(-1, 2)
        assert (pairs.min(1).values > 0).float().mean() > 0.5
    runner.set_tokens("as it falls")
    runner_as_built = Runner(build_ours(sizes, router=router), sizes)
    runner_as_built.set_tokens("as it falls")
    assert runner_as_built.load != even


def test_a_narrow_space_of_the_router_is_balanced_too() -> None:
    """TorchScale's has 16 dimensions, whatever the number of experts."""
    sizes = shape(256, torch.bfloat16, tokens=1024, d_model=128)
    scorer = Scorer(
        torch.empty(256, 16, dtype=sizes.dtype), torch.empty(16, 128, dtype=sizes.dtype)
    )
    x = scorer.balance(sizes, torch.Generator().manual_seed(1))
    assert scorer.load(x, 2).tolist() == [8] * 256


def test_the_yardstick_has_the_useful_flops() -> None:
    sizes = shape()
    runner = Runner(build_dense(sizes), sizes)
    runner.set_tokens("as it falls")
    with FlopCounterMode(display=False) as counter:
        runner.step()
    assert counter.get_total_flops() == sizes.useful_flops == runner.layer.flops


def test_the_profile_names_what_a_layer_does(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--experts", "4", "--profile", "ours"])
    printed = capsys.readouterr().out
    assert "## Magnetar, X-MoE router, 4 experts" in printed
    assert "`aten::_grouped_mm`" in printed or "`aten::mm`" in printed


def test_the_profile_counts_launches_and_synchronisations_of_one_pass() -> None:
    def event(cat: str, name: str, ts: float, dur: float, number: int = 0) -> dict[str, Any]:
        return {
            "ph": "X",
            **{"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": number}},
        }

    text = report(
        [
            event("cuda_runtime", "cudaLaunchKernel", 1, 2, 1),  # before the pass
            event("kernel", "warm_up", 12, 50, 1),
            {"ph": "X", "cat": "user_annotation", "name": PASS, "ts": 10, "dur": 100},
            event("cuda_runtime", "cudaLaunchKernel", 20, 2, 2),
            event("cuda_driver", "cuLaunchKernelEx", 30, 2, 3),
            event("cuda_runtime", "cudaMemcpyAsync", 40, 2, 4),
            event("cuda_runtime", "cudaStreamSynchronize", 45, 9, 5),
            event("kernel", "matmul", 1000, 3000, 2),
            event("kernel", "gelu", 5000, 900, 3),  # after the pass has returned
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 5900, 100, 4),
            event("cuda_runtime", "cudaDeviceSynchronize", 200, 9, 6),
        ],
        10,
    )
    assert "first kernel to last 5.000 ms, kernels 4.000 ms, between them 1.000 ms" in text
    assert "2 launches, 1 synchronisations, 1 copies to the host" in text
    assert "| 3.000 | 75.0% | 1 | `matmul` |" in text
    assert "warm_up" not in text


def test_an_operators_own_time_leaves_out_those_it_calls() -> None:
    events = [
        {"tid": 1, "name": name, "ts": ts, "dur": dur}
        for name, ts, dur in [("a", 0, 100), ("b", 10, 50), ("c", 20, 10), ("d", 70, 5)]
    ] + [{"tid": 2, "name": "e", "ts": 5, "dur": 7}]
    assert sorted(own_times(events)) == [("a", 45), ("b", 40), ("c", 10), ("d", 5), ("e", 7)]
