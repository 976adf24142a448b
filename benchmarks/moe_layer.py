"""One MoE feed-forward layer, forward and backward: ours, the dense yardstick, every public peer.

    python -m benchmarks.moe_layer --out benchmarks/results/moe_layer.json
    python -m benchmarks.moe_layer --only dense,ours --experts 64
    python -m benchmarks.moe_layer --profile ours --experts 64
    python -m benchmarks.moe_layer --draw benchmarks/results/moe_layer.json

The yardstick is the dense network of width top_k * d_ff: equal useful FLOPs. All layers live in
one process and take turns: after a warm-up, every round runs each of them once, in rotated order,
one untimed pass and then several timed together. The backward pass makes the gradients of the
input and of every weight, from a random gradient of the output and the balance loss; gradients of
the last pass are freed, not added to. Weights and inputs are random normal numbers. The L2 cache is
not flushed. A peer that is not installed, or fails, is listed as such.

Routing "as it falls" is that of random weights; "balanced" chooses the router's weights and the
tokens so that every expert gets equally many, and leaves the layers' code as it is.
"""

import argparse
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.chart import draw_layer, layer_table
from benchmarks.layer_profile import profile_table
from benchmarks.layers import (
    PEERS,
    Contender,
    Layer,
    NotInstalled,
    Shape,
    build_dense,
    build_ours,
    leave_process_group,
)
from benchmarks.measurement import (
    argument_parser,
    chosen_names,
    counts,
    draw_beside,
    failure,
    fill_in,
    git_commit,
    hardware,
    positive,
    read_results,
    require_json,
    versions,
    write_json,
)
from magnetar.data.errors import UserError
from magnetar.launchers.terminal.user_errors import user_errors

CONTENDERS = {
    "dense": Contender("dense FFN", build_dense, is_dense=True),
    "dense_compiled": Contender(
        "dense FFN, torch.compile", partial(build_dense, compiled=True), is_dense=True
    ),
    "ours": Contender("Magnetar, X-MoE router", build_ours, is_ours=True),
    "ours_linear": Contender(
        "Magnetar, linear router", partial(build_ours, router="linear"), is_ours=True
    ),
    **{name: Contender(label, build) for name, (label, build) in PEERS.items()},
    "dense_norm": Contender(
        "dense FFN, inner LayerNorm",
        partial(build_dense, inner_norm=True),
        "dense_norm",
        is_dense=True,
    ),
    "dense_norm_compiled": Contender(
        "dense FFN, inner LayerNorm, torch.compile",
        partial(build_dense, inner_norm=True, compiled=True),
        "dense_norm",
        is_dense=True,
    ),
    "ours_norm": Contender(
        "Magnetar, X-MoE router, inner LayerNorm",
        partial(build_ours, inner_norm=True),
        "dense_norm",
        is_ours=True,
    ),
    "ours_linear_norm": Contender(
        "Magnetar, linear router, inner LayerNorm",
        partial(build_ours, router="linear", inner_norm=True),
        "dense_norm",
        is_ours=True,
    ),
}
SIZES = ("tokens", "d_model", "d_ff", "top_k", "experts")
ABOUT = ("label", "yardstick", "is_dense", "is_ours")  # of a contender, in the results
ROUTINGS = ("as it falls", "balanced")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What a GPU is asked to do, and a CPU where it would take an hour.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "tokens": 16384,
        "d_model": 1024,
        "d_ff": 4096,
        "experts": [16, 64, 256],
        "dtype": "bfloat16",
    },
    "cpu": {"tokens": 512, "d_model": 128, "d_ff": 512, "experts": [4, 16], "dtype": "float32"},
}


class Runner:
    """A layer with its input, which can run forward and backward."""

    def __init__(self, layer: Layer, shape: Shape) -> None:
        """Take a layer; `set_tokens` gives it something to do."""
        self.layer, self.shape = layer, shape
        self.parameters = [p for p in layer.module.parameters() if p.requires_grad]
        self.x = self.grad = torch.empty(0)
        self.load: list[int] | None = None

    def set_tokens(self, routing: str) -> None:
        """Draw the input (balanced: and the router's weights) and the output's gradient."""
        shape = self.shape
        generator = torch.Generator(shape.device).manual_seed(1)
        size = (shape.tokens, shape.d_model)

        def normal() -> Tensor:
            drawn = torch.randn(size, generator=generator, device=shape.device)
            return drawn.to(shape.dtype)

        scorer = self.layer.scorer
        x = scorer.balance(shape, generator) if scorer and routing == "balanced" else normal()
        if scorer:
            self.load = scorer.load(x, shape.top_k).tolist()
        layout = (shape.sequences, -1, shape.d_model)
        self.x = x.view(layout).requires_grad_()
        self.grad = normal().view(layout)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The output and the weighted balance loss."""
        return self.layer.apply(self.x)

    def backward(self, out: Tensor, aux_loss: Tensor | None) -> None:
        """Gradients of everything."""
        grad = self.grad.view_as(out)
        if aux_loss is None:
            out.backward(grad)
        else:
            torch.autograd.backward([out, aux_loss], [grad, torch.ones_like(aux_loss)])

    def step(self) -> None:
        """Forward and backward; the last gradients are freed first."""
        self.free_gradients()
        self.backward(*self.forward())

    def free_gradients(self) -> None:
        """No gradient is left."""
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def check(self) -> None:
        """Run once and check the results.

        Raises:
            RuntimeError: if the output has a wrong shape, or a gradient is missing.
        """
        self.free_gradients()
        out, aux_loss = self.forward()
        if out.shape != self.x.shape or out.dtype != self.x.dtype:
            raise RuntimeError(f"the output is {out.dtype} {tuple(out.shape)}")
        if not out.isfinite().all():
            raise RuntimeError("the output is not finite")
        self.backward(out, aux_loss)
        missing = [
            name
            for name, parameter in self.layer.module.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if missing or self.x.grad is None:
            raise RuntimeError(f"no gradient for {', '.join(missing) or 'the input'}")
        self.free_gradients()

    def memory(self) -> dict[str, int]:
        """Bytes of one pass, above those of the weights and the input; {} on a CPU."""
        if self.shape.device.type != "cuda":
            return {}
        self.free_gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, aux_loss = self.forward()
        self.backward(out, aux_loss)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        tensors = [p.grad for p in (*self.parameters, self.x) if p.grad is not None]
        gradients = sum(t.numel() * t.element_size() for t in tensors)
        self.free_gradients()
        return {
            "peak_bytes": peak,
            "gradient_bytes": gradients,
            "peak_activation_bytes": peak - gradients,
        }


def timed(action: Callable[[], None], num_steps: int, device: torch.device) -> float:
    """Milliseconds of one of so many steps, one after the other."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(num_steps):
            action()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / num_steps
    start = time.perf_counter()
    for _ in range(num_steps):
        action()
    return 1000 * (time.perf_counter() - start) / num_steps


class Failures(dict[str, str]):
    """The reasons why contenders are not measured, by their names."""

    def note(self, name: str, stage: str, error: Exception) -> None:
        """Keep the first reason, and free what it held."""
        self.setdefault(name, failure(stage, error))
        print(f"  {name}: {self[name]}", file=sys.stderr, flush=True)
        # The frames of the traceback hold tensors.
        error.__traceback__ = None
        free_memory()


def free_memory() -> None:
    """Free memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_shape(
    names: Sequence[str], shape: Shape, num_rounds: int, num_steps: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Build all contenders, and measure them in turn, with either routing."""
    failures, runners = Failures(), {}
    for name in names:
        try:
            runners[name] = Runner(CONTENDERS[name].build(shape), shape)
        except NotInstalled:
            failures[name] = "not installed"
        except Exception as error:  # whatever a peer does must not stop the others
            failures.note(name, "build", error)
    results = []
    for routing in ROUTINGS:
        say(f"{shape.num_experts} experts, routing {routing}: {', '.join(runners)}")
        times, extra = measure_routing(runners, failures, routing, num_rounds, num_steps)
        for name in names:
            record: dict[str, Any] = {
                "experts": shape.num_experts,
                "routing": routing,
                "name": name,
                "status": failures.get(name, "measured"),
            }
            if name not in failures:
                record |= summary(times[name], runners[name].layer) | extra[name]
            results.append(record)
        for name in set(failures) & set(runners):
            del runners[name]
    add_ratios(results)
    return results


def measure_routing(
    runners: dict[str, Runner],
    failures: Failures,
    routing: str,
    num_rounds: int,
    num_steps: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Milliseconds of every round, and load and memory, by name."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    extra: dict[str, dict[str, Any]] = {}

    def attempt(name: str, stage: str, action: Callable[[], None]) -> None:
        if name in failures:
            return
        try:
            action()
        except Exception as error:  # as above
            failures.note(name, stage, error)
            runners[name].free_gradients()

    def prepare(name: str, runner: Runner) -> None:
        runner.set_tokens(routing)
        runner.check()
        for _ in range(2):
            runner.step()
        extra[name] = runner.memory()
        if runner.load is not None:
            mean = sum(runner.load) / len(runner.load)
            extra[name]["busiest_expert"] = max(runner.load) / mean

    def run(name: str, runner: Runner) -> None:
        runner.step()
        times[name].append(timed(runner.step, num_steps, runner.shape.device))
        runner.free_gradients()

    for name, runner in runners.items():
        attempt(name, "first pass", partial(prepare, name, runner))
    order = list(runners)
    for number in range(num_rounds):
        shift = number % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            attempt(name, f"round {number + 1}", partial(run, name, runners[name]))
    return times, extra


def summary(milliseconds: list[float], layer: Layer) -> dict[str, Any]:
    """Medians and spread of the rounds."""
    median = statistics.median(milliseconds)
    # One round, listed twice, is its own quantiles.
    rounds = milliseconds if len(milliseconds) > 1 else 2 * milliseconds
    tenths = statistics.quantiles(rounds, n=10, method="inclusive")
    return {
        "milliseconds": milliseconds,
        "median_ms": median,
        "p10_ms": tenths[0],
        "p90_ms": tenths[-1],
        "useful_flops": layer.flops,
        "tflops_per_second": layer.flops / median / 1e9,
        "note": layer.note,
    }


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Time per useful FLOP over that of the yardstick beside it."""
    measured = {(r["routing"], r["name"]): r for r in results if r["status"] == "measured"}
    for (routing, name), record in measured.items():
        if dense := measured.get((routing, CONTENDERS[name].yardstick)):
            per_flop = record["median_ms"] / record["useful_flops"]
            record["ratio"] = per_flop / (dense["median_ms"] / dense["useful_flops"])


def measure(options: argparse.Namespace, names: list[str], shapes: list[Shape]) -> dict[str, Any]:
    """Everything that the results file holds."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results: list[dict[str, Any]] = []
    for shape in shapes:
        torch.manual_seed(1)
        results += measure_shape(names, shape, options.repeats, options.steps, say)
        if "torch._dynamo" in sys.modules:  # something was compiled, and is kept
            torch._dynamo.reset()
        free_memory()
    leave_process_group()
    return {
        "benchmark": "moe_layer",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "command": f"python -m benchmarks.moe_layer {' '.join(sys.argv[1:])}".strip(),
        "hardware": hardware(shapes[0].device),
        "versions": versions(),
        "device": shapes[0].device.type,
        "dtype": options.dtype,
        **{key: getattr(options, key) for key in SIZES},
        "rounds": options.repeats,
        "steps_a_round": options.steps,
        "contenders": {
            name: {key: getattr(CONTENDERS[name], key) for key in ABOUT} for name in names
        },
        "results": results,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the defaults of this machine."""
    parser = argument_parser("benchmarks.moe_layer", __doc__)
    parser.add_argument("--tokens", type=positive, help="16384; on a CPU 512")
    parser.add_argument("--d-model", type=positive, help="1024; on a CPU 128")
    parser.add_argument("--d-ff", type=positive, help="4096; on a CPU 512")
    parser.add_argument("--top-k", type=positive, default=2, help="2")
    parser.add_argument("--experts", type=counts, help="16,64,256; on a CPU 4,16")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16; on a CPU float32")
    parser.add_argument("--repeats", type=positive, default=10, help="rounds: 10")
    parser.add_argument("--steps", type=positive, default=5, help="timed passes a round: 5")
    parser.add_argument("--only", help=f"names with commas, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--out", type=Path, help="results, a .json file; the picture beside it")
    parser.add_argument("--draw", type=Path, help="draw the picture of such a file, and stop")
    parser.add_argument("--profile", metavar="NAME", help="show where one layer's time goes")
    options = parser.parse_args(arguments)
    fill_in(options, DEFAULTS["cuda" if torch.cuda.is_available() else "cpu"])
    return options


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    """The shapes to measure.

    Raises:
        UserError: if routing could not be balanced.
    """
    for count in options.experts:
        if count % options.top_k or options.tokens % (count // options.top_k):
            raise UserError(
                f"--experts {count} must be a multiple of --top-k {options.top_k}, and --tokens "
                f"{options.tokens} one of their quotient, or no routing gives every expert equally "
                "many tokens: choose powers of two"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (options.tokens, options.d_model, options.d_ff, options.top_k)
    return [Shape(*size, count, device, DTYPES[options.dtype]) for count in options.experts]


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; write the results and the picture where they are asked for."""
    options = parse(arguments)
    if options.draw is not None:
        draw_beside(options.draw, read_results(options.draw), draw_layer)
        return
    require_json(options.out)
    names, shapes = chosen_names(options, CONTENDERS, list(CONTENDERS)), chosen_shapes(options)
    if options.profile:
        for shape in shapes:
            runner = Runner(CONTENDERS[names[0]].build(shape), shape)
            runner.set_tokens(ROUTINGS[0])
            print(f"## {CONTENDERS[names[0]].label}, {shape.num_experts} experts\n")
            print(profile_table(runner.step, shape.device))
        return
    found = measure(options, names, shapes)
    print(layer_table(found))
    if options.out is not None:
        write_json(options.out, found)
        draw_beside(options.out, found, draw_layer)


if __name__ == "__main__":
    sys.exit(main())
