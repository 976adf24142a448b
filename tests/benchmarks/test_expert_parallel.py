"""The benchmark of expert parallelism measures what it says."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import expert_parallel
from benchmarks.expert_parallel import (
    NOTHING_TRAVELS,
    STEP,
    NothingTravels,
    busiest_rank,
    config_of,
    device_times,
    in_turn,
    main,
    parse,
    summarised,
    table,
    union,
)
from magnetar.data.errors import UserError
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.layer import MoE
from tests.benchmarks import TINY


def test_what_overlaps_is_counted_once() -> None:
    assert union([]) == 0
    assert union([(5, 7), (0, 2), (1, 4), (1, 2), (7, 8)]) == 7


@pytest.mark.parametrize("router", ["xmoe", "linear"])
def test_experts_in_turn_get_as_many_rows(router: str) -> None:
    moe = MoELayerConfig(num_experts=8, top_k=2, router=router)
    layer = MoE(16, 32, moe, "gelu", True, 1.0)
    layer.init_weights(RandomSource(0, "ffn"))
    x = torch.randn(2, 32, 16)
    as_it_falls = layer(x)[1].load
    hook = partial(in_turn, num_experts=8)
    layer.deepspeed_moe.gate.register_forward_hook(hook)
    assert as_it_falls.unique().numel() > 1
    assert layer(x)[1].load.tolist() == [16.0] * 8


def event(name: str, category: str, begin: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": length}


def test_an_exchange_is_exposed_where_nothing_is_computed() -> None:
    all_to_all = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        event(STEP, "user_annotation", 1000, 10_000),
        event("gemm", "kernel", 500, 100),  # before the step
        event("gemm", "kernel", 2000, 2000),
        event("activation", "kernel", 3500, 1000),  # until 4500
        event(all_to_all, "kernel", 4000, 1500),  # 1000 of it beside nothing
        event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "kernel", 5000, 2500),  # 2000 of it
        event("aten::mm", "cpu_op", 1000, 9000),
        event("cudaEventSynchronize", "cuda_runtime", 1500, 10),
        event("cudaEventRecord", "cuda_runtime", 1600, 10),
        event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 6000, 1),
        {"ph": "i", "name": "cudaStreamSynchronize", "ts": 2000},
    ]
    assert device_times(events) == {
        "step_ms": 10.0,
        "exchange_ms": 1.5,
        "exposed_ms": 1.0,
        "other_exposed_ms": 2.0,
        "idle_ms": 4.5,
        "synchronisations": 1,
        "copies_to_host": 1,
    }


def test_the_busiest_rank_is_the_mean_over_layers() -> None:
    loads = [torch.tensor([3.0, 3.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])]
    assert busiest_rank(loads, 2) == pytest.approx((1.5 + 1.0) / 2)
    assert busiest_rank(loads, 1) == 1.0


def test_scaling_is_over_one_gpu_and_exposed_is_a_share_of_its_step() -> None:
    profile = {"step_ms": 200.0, "exposed_ms": 5.0, "exchange_ms": 20.0, "synchronisations": 7}
    spread = {"run": "spread", "ranks": 2, "step_ms": [130.0, 125.0, 120.0]}
    records = [
        {"run": "one", "ranks": 1, "step_ms": [100.0], "busiest_rank": 1.0},
        spread | {"busiest_rank": 1.25, "profile": [profile, profile | {"exposed_ms": 10.0}]},
    ]
    found = summarised(records, 1000)
    assert [record["scaling"] for record in found] == [1.0, 0.8]
    assert found[0]["tokens_per_second_per_gpu"] == 10_000
    *_, line = table({"results": found}).splitlines()
    assert line == (
        "| spread | 2 | 125.0 (120.0 to 130.0) | 8,000 | 0.800 | 20.0, 20.0 | 2.5%, 5.0% "
        "| 7, 7 | 1.250 |"
    )


def test_where_nothing_travels_what_is_sent_is_what_arrives() -> None:
    given, output = torch.arange(3.0), torch.zeros(3)
    work = NothingTravels(torch.device("cpu")).all_to_all_single(
        output, given, [1, 2], [1, 2], group=None, async_op=True
    )
    work.wait()
    assert torch.equal(output, given)


def test_every_run_has_the_same_experts_and_sequences_for_each_gpu() -> None:
    options = parse(["--gpus", "2", "--out", "results.json"])
    for run, ranks, num_experts, ep_size in (
        ("one", 1, 16, 1),
        ("replicated", 2, 16, 1),
        ("spread", 2, 32, 2),
    ):
        config = config_of(options, run, ranks)
        moe, sizes = config.model.moe, config.deepspeed
        assert moe is not None
        assert (moe.num_experts, moe.ep_size, moe.dispatch) == (num_experts, ep_size, "dropless")
        assert sizes["train_batch_size"] == 1024 * ranks
        assert sizes["train_micro_batch_size_per_gpu"] == 128
        assert sizes["gradient_accumulation_steps"] == 8
        assert config.zero_stage == 1
    assert config_of(options, "spread", 2).model.num_layers == 12


def test_a_quick_benchmark_leaves_out_one_run() -> None:
    assert parse(["--out", "a.json"]).runs == ["one", "replicated", "spread"]
    assert parse(["--quick", "--out", "a.json"]).runs == ["one", "spread"]


def test_ranks_that_fail_end_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(expert_parallel, "launch", lambda *_, **__: None)
    options = parse(["--cpu", *TINY, "--out", str(tmp_path / "results.json")])
    with pytest.raises(UserError, match="the ranks of `one` failed: what they say is above"):
        expert_parallel.measure(options)


@pytest.mark.slow
def test_all_runs_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = tmp_path / "new" / "results.json"
    main(["--cpu", *TINY, "--out", str(out)])
    found = json.loads(out.read_text())
    runs = [(record["run"], record["ranks"]) for record in found["results"]]
    assert runs == [("one", 1), ("replicated", 2), ("spread", 2), (NOTHING_TRAVELS, 2)]
    assert all(record["median_ms"] > 0 for record in found["results"])
    assert found["results"][2]["busiest_rank"] > 1.0
    assert "| spread | 2 |" in capsys.readouterr().out
