"""Experts on all GPUs of a machine: what spreading them costs, and that it changes no number.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json              # all its GPUs
    python -m benchmarks.scaling --gpus 4 --only scaling,paper --out scaling.json
    python -m benchmarks.scaling --cpu --out scaling_cpu.json      # tiny, two processes, 3 minutes
    python -m benchmarks.scaling --draw scaling.json               # its table and picture again

Needs nothing but the GPUs: tokens are random, the text of the last two parts is this project's own
pages. In this order, each in processes that the deepspeed launcher starts:

    scaling      the model of ds_configs/lm_xmoe.json at EP = 1, the number of GPUs and the powers
                 of two between, on as many GPUs, with as many experts and sequences for each GPU:
                 tokens/s a GPU, MFU, peak memory, and from a profile the share of a step in which
                 a GPU runs an all-to-all kernel and none that computes. Goal: 0.92 of one GPU's.
                 Once more with experts in turn, so that no GPU has more rows than another.
    paper        the 256 experts of ds_configs/lm_xmoe_256.json on all GPUs, bf16 with float32
                 master weights, beside the dense model of equal useful FLOPs on the same GPUs, both
                 under torch.compile, with --batch and with 8 times as many sequences a GPU. Where
                 they do not fit, the largest power of two that does. Goal: 0.85 of the dense one's.
    numbers      20 steps of benchmarks/layouts.json in fp32 on all GPUs at every EP: the largest
                 relative difference of a loss and of a gradient norm from EP = 1. Bound: 5e-5.
    checkpoint   saved after 20 of 40 steps at EP = GPUs, continued at a quarter and a half, on as
                 many GPUs: the largest relative difference of a loss from the run that went on.

All are dropless, ZeRO 1. The results are written after every launch, and the picture at the end, a
.png beside them. A launch that fails is reported, and the others follow; the status is then 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.measurement import (
    ROOT,
    argument_parser,
    draw_beside,
    fill_in,
    git_commit,
    hardware,
    launch,
    nccl_settings,
    positive,
    read_results,
    require_json,
    versions,
)
from magnetar.data.errors import UserError
from magnetar.launchers.terminal.user_errors import user_errors

PARTS = ("scaling", "paper", "numbers", "checkpoint")
GRACE = 12  # seconds after --seconds in which what has begun may end
KEPT, SHOWN = 20_000, 3_000  # characters of what failing ranks have said
STATES_SHARE = 0.8  # of a GPU's memory; the rest is for activations and buffers
MORE_SEQUENCES = 8  # times --batch, in the second measurement of `paper`
SIZES: dict[bool, dict[str, Any]] = {  # on GPUs, on a CPU
    False: {"config": "lm_xmoe", "experts": 16, "batch": 256, "paper": "lm_xmoe_256"}
    | {"paper_experts": 256, "paper_set": ["magnetar.training.compile=true"]},
    True: {"config": "quickstart", "experts": 4, "batch": 4, "paper": "quickstart"}
    | {"paper_experts": 16, "paper_set": []},
}
KEYS = ("gpus", "cpu", "experts", "paper_experts", "batch", "rounds", "steps", "seconds", "set")


def expert_parallel_sizes(gpus: int) -> list[int]:
    """Powers of two up to the GPUs, those first that say most."""
    between = [size for size in (2**n for n in range(1, gpus.bit_length())) if size < gpus]
    return [1, gpus, *between]


def ds_config(name: str) -> Path:
    """A JSON that comes with the project."""
    return ROOT / "ds_configs" / f"{name}.json"


def weak_config(options: argparse.Namespace, ep_size: int) -> Any:
    """The run of `scaling` on so many GPUs.

    Raises:
        UserError: if the config is wrong; it lists all problems.
    """
    from benchmarks.expert_parallel import config_of

    sizes = {"config": ds_config(options.sizes["config"]), "experts": options.experts}
    sizes |= {"batch": options.batch, "micro_batch": options.batch, "set": options.set}
    sizes["capacity"] = None  # nothing is dropped
    return config_of(SimpleNamespace(**sizes), "spread", ep_size)  # type: ignore[arg-type]


def paper_configs(options: argparse.Namespace, memory: float) -> tuple[dict[str, Any], int]:
    """The runs of `paper` by name, dense before sparse, and bytes of a GPU's states.

    Args:
        options: options of the command line.
        memory: memory of each GPU in bytes.

    Raises:
        UserError: if not even two experts a GPU fit.
    """
    from benchmarks.expert_parallel import config_of
    from benchmarks.step_contenders import dense_config
    from magnetar.engine.memory_planner import GIB, memory_of_rank, parameters_of

    def sparse(num_experts: int, batch: int, micro_batch: int) -> Any:
        sizes = {"config": ds_config(options.sizes["paper"]), "batch": batch}
        sizes |= {"experts": num_experts // options.gpus, "micro_batch": micro_batch}
        sizes["capacity"] = None
        sizes |= {"set": [*options.sizes["paper_set"], *options.set]}
        return config_of(SimpleNamespace(**sizes), "spread", options.gpus)  # type: ignore[arg-type]

    fewest = 2 * options.gpus  # a token has two
    num_experts = max(options.paper_experts, fewest)
    while True:
        config = sparse(num_experts, MORE_SEQUENCES * options.batch, options.batch)
        needed = sum(memory_of_rank(parameters_of(config.model), config, options.gpus))
        if needed <= STATES_SHARE * memory:
            break
        if num_experts == fewest:
            raise UserError(
                f"{num_experts} experts on {options.gpus} GPUs keep {needed / GIB:.3g} GiB on each "
                f"of its {memory / GIB:.3g}: leave out `paper`, with --only"
            )
        num_experts //= 2
    # With large states half as many sequences at once: their activations take what is left.
    halves = needed > 0.5 * memory and options.batch > 1
    configs = {}
    for batch in (options.batch, MORE_SEQUENCES * options.batch):
        config = sparse(num_experts, batch, options.batch // (1 + halves))
        configs[f"dense, {batch} sequences"] = dense_config(config, options.gpus)
        configs[f"sparse, {batch} sequences"] = config
    return configs, needed


def corpus(folder: Path) -> Path:
    """A prepared folder of this project's own pages."""
    from magnetar.data.text.prepare import PrepareConfig, prepare

    out = folder / "prepared"
    pages = sorted((ROOT / "docs").glob("*.md"))
    for name, texts in (("train", pages), ("valid", [ROOT / "README.md"])):
        (folder / f"{name}.txt").write_text("\n".join(page.read_text() for page in texts))
    files = {name: (str(folder / f"{name}.txt"),) for name in ("train", "valid")}
    prepare(PrepareConfig(out=out, vocab_size=500, **files))
    return out


def small_model(gpus: int, text: Path) -> dict[str, Any]:
    """Changes to benchmarks/layouts.json for so many GPUs."""
    return {
        "magnetar.data.path": str(text),
        "magnetar.model.moe.num_experts": max(8, gpus),
        "train_batch_size": max(16, gpus),
    }


class Session:
    """What has been found so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace, found: dict[str, Any]) -> None:
        """Start the clock."""
        self.options, self.found, self.begun = options, found, time.monotonic()
        found |= {"skipped": [], "failed": {}}

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.begun:4.0f} s  {text}", flush=True)

    def save(self) -> None:
        """Write the results."""
        from magnetar.data.atomic import write_atomically

        self.found["elapsed_seconds"] = time.monotonic() - self.begun
        write_atomically(self.options.out, json.dumps(self.found, indent=1) + "\n")

    def attempt(self, label: str, action: Callable[[float], None]) -> None:
        """Do it in the seconds that it is given, if any are left; keep why it failed."""
        left = self.options.seconds - (time.monotonic() - self.begun)
        if left <= 0:
            self.found["skipped"].append(label)
            self.say(f"{label}: skipped, --seconds {self.options.seconds} are over")
        else:
            self.say(label)
            try:
                action(min(left + GRACE, self.options.seconds / 2))
            except subprocess.TimeoutExpired as error:
                said = f"killed, for it was not done after {error.timeout:.0f} s"
            except (Exception, SystemExit) as error:
                said = f"{type(error).__name__}: {error}"[-KEPT:]
            else:
                said = ""
            if said:
                self.found["failed"][label] = said
                self.say(f"{label} FAILED: {said[-SHOWN:]}")
        self.save()

    def launch(self, ranks: int, job: dict[str, Any], into: dict[str, Any], limit: float) -> None:
        """Have ranks do a job; what they have found goes into a dict, even if they fail.

        Raises:
            RuntimeError: if they do, with what they said.
        """
        job |= {"rounds": self.options.rounds, "steps": self.options.steps}
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder, "job.json"), Path(folder, "found.json")
            file.write_text(json.dumps(job | {"out": str(out)}))
            try:
                done = launch("benchmarks.scaling_worker", ranks, [file], True, limit)
            finally:
                if out.is_file():
                    into |= json.loads(out.read_text())
        if done.returncode != 0:
            raise RuntimeError(f"the ranks ended with {done.returncode}:\n{done.stdout}")


def measure_scaling(session: Session, configs: dict[int, Any]) -> None:
    """Part `scaling`: a launch for each EP."""
    records = session.found["scaling"] = {}
    for ep_size, config in configs.items():
        job = {"part": "scaling", "runs": {str(ep_size): config.to_dict()}}
        session.attempt(
            f"scaling, EP {ep_size}",
            lambda limit, job=job, n=ep_size: session.launch(n, job, records, limit),
        )


def measure_paper(session: Session, configs: dict[str, Any], states_bytes: int) -> None:
    """Part `paper`: one launch for all of its runs."""
    records: dict[str, Any] = {}
    num_experts = next(c.model.moe.num_experts for c in configs.values() if c.model.moe)
    asked = session.options.paper_experts
    about = {"asked_experts": asked, "num_experts": num_experts, "states_bytes": states_bytes}
    session.found["paper"] = about | {"runs": records}
    if num_experts < asked:
        session.say(f"{asked} experts do not fit: {num_experts} are taken")
    job = {"part": "paper", "runs": {name: config.to_dict() for name, config in configs.items()}}
    gpus = session.options.gpus
    session.attempt(
        f"paper, {num_experts} experts", lambda limit: session.launch(gpus, job, records, limit)
    )


def measure_numbers(session: Session, text: Path) -> None:
    """Part `numbers`: one launch, in which every EP takes its turn on all GPUs."""
    gpus = session.options.gpus
    curves = session.found["numbers"] = {}
    layouts = {
        str(ep_size): small_model(gpus, text)
        | {"magnetar.model.moe.ep_size": ep_size, "zero_optimization.stage": 1}
        for ep_size in sorted(expert_parallel_sizes(gpus))
    }
    job = {"part": "numbers", "runs": layouts}
    session.attempt("numbers", lambda limit: session.launch(gpus, job, curves, limit))


def measure_checkpoint(session: Session, text: Path, folder: Path) -> None:
    """Part `checkpoint`: launches of launchers.train."""
    from magnetar.engine.checkpoint.format import complete_checkpoints
    from tests.faults.resume import LAST, SAVED_AFTER, Layout, train

    gpus = session.options.gpus
    losses = session.found["checkpoint"] = {}
    changes = small_model(gpus, text) | {"magnetar.training.save_every": SAVED_AFTER}
    settings = [f"{key}={value}" for key, value in changes.items()]

    def go_on(ep_size: int, run_dir: Path, limit: float) -> None:
        found = train(Layout(ep_size, ep_size, 1), run_dir, LAST, settings, limit)
        losses[str(ep_size)] = found[SAVED_AFTER:]

    whole = folder / "whole"
    session.attempt(
        f"checkpoint, EP {gpus}, uninterrupted", lambda limit: go_on(gpus, whole, limit)
    )
    for ep_size in (size for size in (gpus // 4, gpus // 2) if size and losses):
        run_dir = folder / str(ep_size)
        shutil.copytree(whole, run_dir)
        shutil.rmtree(complete_checkpoints(run_dir)[-1].path)  # of the last step
        session.attempt(
            f"checkpoint, continued at EP {ep_size}",
            lambda limit, n=ep_size, run_dir=run_dir: go_on(n, run_dir, limit),
        )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts that are asked for, as far as the time goes.

    Raises:
        UserError: before anything is started, if a run is impossible.
    """
    import torch

    from benchmarks.scaling_chart import summary

    device = torch.device("cpu" if options.cpu else "cuda")
    about = hardware(device)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / options.gpus
    weak = {n: weak_config(options, n) for n in expert_parallel_sizes(options.gpus)}
    memory = about.get("gpu_memory_bytes", host)
    paper = paper_configs(options, memory) if "paper" in options.only else ({}, 0)
    found = {"benchmark": "scaling", "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    found |= {"commit": git_commit(), "hardware": about, "versions": versions()}
    found["environment"] = nccl_settings()
    found |= {key: getattr(options, key) for key in KEYS} | {"parts": options.only}
    session = Session(options, found)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = corpus(folder)
        parts: dict[str, Callable[[], None]] = {
            "scaling": lambda: measure_scaling(session, weak),
            "paper": lambda: measure_paper(session, *paper),
            "numbers": lambda: measure_numbers(session, text),
            "checkpoint": lambda: measure_checkpoint(session, text, folder),
        }
        for part in options.only:
            parts[part]()
    found["summary"] = summary(found)
    session.save()
    session.say("done")
    return found


def parts(text: str) -> list[str]:
    """Names with commas between them, for argparse."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return [part for part in PARTS if part in names]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the defaults of a GPU or of a CPU."""
    parser = argument_parser("benchmarks.scaling", __doc__)
    parser.add_argument(
        "--gpus", type=positive, help="a power of two: as many as there are; with --cpu 2"
    )
    parser.add_argument("--cpu", action="store_true", help="tiny, on processes of the CPU")
    parser.add_argument("--out", type=Path, help="results, a .json file; the picture beside it")
    parser.add_argument(
        "--only",
        type=parts,
        default=list(PARTS),
        metavar="PARTS",
        help="with commas: scaling,paper",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=520,
        help="after which nothing more begins, and what runs is ended; no launch gets more than "
        "half of them: 520",
    )
    parser.add_argument("--experts", type=positive, help="of `scaling`, for each GPU: 16; --cpu 4")
    parser.add_argument("--paper-experts", type=positive, help="of `paper`: 256; --cpu 16")
    parser.add_argument("--batch", type=positive, help="sequences of a step, a GPU: 256; --cpu 4")
    parser.add_argument("--rounds", type=positive, default=5, help="timed, of each run: 5")
    parser.add_argument("--steps", type=positive, default=2, help="of a round: 2")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the configs of `scaling` and `paper`; may be repeated",
    )
    parser.add_argument("--draw", type=Path, help="show and draw the results of a file, and stop")
    options = parser.parse_args(arguments)
    options.sizes = SIZES[options.cpu]
    fill_in(options, {key: options.sizes[key] for key in ("experts", "paper_experts", "batch")})
    return options


def require_gpus(options: argparse.Namespace, there: int) -> None:
    """Fill in --gpus, and refuse what cannot be.

    Args:
        options: options of the command line.
        there: number of GPUs of this machine.

    Raises:
        UserError: if the number of GPUs is impossible; it names a way out.
    """
    if not options.cpu and there < 2:
        raise UserError(
            f"this machine has {there or 'no'} GPU, and experts are shared by two at least: use "
            "--cpu, which measures a tiny model"
        )
    if options.gpus is None:
        options.gpus = 2 if options.cpu else 2 ** (there.bit_length() - 1)
    if options.gpus < 2 or options.gpus & (options.gpus - 1):
        raise UserError(
            f"--gpus {options.gpus}: experts are halved and halved again, so use 2, 4, 8 or 16"
        )
    if options.paper_experts & (options.paper_experts - 1):
        raise UserError(
            f"--paper-experts {options.paper_experts}: as many as fit are found by halving, so use "
            "a power of two, such as 64"
        )
    if not options.cpu and options.gpus > there:
        raise UserError(f"--gpus {options.gpus}: this machine has {there}; use as many at most")


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write results and picture."""
    options = parse(arguments)
    from benchmarks.scaling_chart import draw, table

    if options.draw is not None:
        options.out, found = options.draw, read_results(options.draw, "scaling", ("gpus",))
    else:
        if options.out is None:
            raise UserError("--out is missing: name a file for the results, --out scaling.json say")
        require_json(options.out)
        if options.cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        import torch

        require_gpus(options, torch.cuda.device_count())
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found = measure(options)
    print(table(found))
    draw_beside(options.out, found, draw)
    if found["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
