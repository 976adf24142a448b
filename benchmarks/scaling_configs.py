"""What the scaling benchmark trains: the configs of its parts, and a text."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from magnetar.data.errors import UserError

STATES_SHARE = 0.8  # of a GPU's memory; the rest is for activations and buffers
MORE_SEQUENCES = 8  # times --batch, in the second measurement of `paper`
SIZES: dict[bool, dict[str, Any]] = {  # on GPUs, on a CPU
    False: {"config": "lm_xmoe", "experts": 16, "batch": 256, "paper": "lm_xmoe_256"}
    | {"paper_experts": 256, "paper_set": ["magnetar.training.compile=true"]},
    True: {"config": "quickstart", "experts": 4, "batch": 4, "paper": "quickstart"}
    | {"paper_experts": 16, "paper_set": []},
}


def expert_parallel_sizes(gpus: int) -> list[int]:
    """Powers of two up to the GPUs, those first that say most."""
    between = [size for size in (2**n for n in range(1, gpus.bit_length())) if size < gpus]
    return [1, gpus, *between]


def ds_config(name: str) -> Path:
    """A JSON that comes with the project."""
    return Path(__file__).parents[1] / "ds_configs" / f"{name}.json"


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

    root, out = Path(__file__).parents[1], folder / "prepared"
    pages = sorted((root / "docs").glob("*.md"))
    for name, texts in (("train", pages), ("valid", [root / "README.md"])):
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
