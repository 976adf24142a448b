"""The layout of a run on another number of ranks than its JSON was written for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.run_folder import accumulation_counts
from magnetar.engine.config.batch_sizes import ACCUMULATION, MICRO, TRAIN
from magnetar.engine.config.schema import RunConfig, load_config
from magnetar.models.moe.config import ON_ONE_RANK

_MOE = "magnetar.model.moe"


class Layout(NamedTuple):
    """The distribution of a run's samples and experts.

    Attributes:
        num_ranks: number of ranks that take part; there may be more.
        ep_size: number of ranks that share a set of experts; 1 without experts.
        micro: number of samples of a rank in a forward pass.
        accumulation: number of forward passes of an optimizer step.
    """

    num_ranks: int
    ep_size: int
    micro: int
    accumulation: int

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"
        return f"{ranks}, ep_size {self.ep_size}, {self.micro} x {self.accumulation} samples each"


def wanted_layout(config: RunConfig) -> Layout:
    """The layout of a config that was checked with its number of ranks."""
    sizes = config.deepspeed
    micro, accumulation = sizes[MICRO], sizes[ACCUMULATION]
    moe = config.model.moe
    num_ranks = sizes[TRAIN] // (micro * accumulation)
    return Layout(num_ranks, moe.ep_size if moe else 1, micro, accumulation)


def fitting_layout(config: RunConfig, num_ranks: int) -> Layout:
    """The layout nearest to the wanted one on at most `num_ranks` ranks, perhaps on fewer.

    The global batch size does not change. It is re-split: normally with micro-batches at most as
    large as requested; if results depend on the number of accumulation steps, that number is kept
    instead.

    Raises:
        UserError: if the numbers of the run would change; it names the ways out.
    """
    wanted = wanted_layout(config)
    if num_ranks == wanted.num_ranks:
        return wanted
    moe = config.model.moe
    if moe is not None and moe.dispatch == "capacity" and moe.capacity_scope == "rank":
        raise UserError(
            f'magnetar.model.moe.capacity_scope="rank" ties the numbers to {wanted.num_ranks} '
            f"ranks, and {num_ranks} are there: bring the others back, or begin a run with "
            'capacity_scope "global" or dispatch "dropless"'
        )
    for ranks in range(num_ranks, 0, -1):
        cut = _cut(config, wanted, ranks)
        if cut is not None:
            # A divisor of the old ep_size also divides the number of experts.
            return Layout(ranks, math.gcd(wanted.ep_size, ranks), *cut)
    raise UserError(
        f"{TRAIN}={config.deepspeed[TRAIN]} in {wanted.accumulation} bins a rank cannot be "
        f"divided among {num_ranks} ranks in place of {wanted.num_ranks} without another "
        f"{ACCUMULATION}, on which the balance loss depends: bring the others back, or begin a run "
        'with magnetar.model.moe.balance_scope="batch"'
    )


def _cut(config: RunConfig, wanted: Layout, num_ranks: int) -> tuple[int, int] | None:
    """Micro-batch and accumulation on exactly `num_ranks` ranks; None if impossible."""
    share, rest = divmod(config.deepspeed[TRAIN], num_ranks)
    if rest:
        return None
    if accumulation_counts(config.model):
        micro, rest = divmod(share, wanted.accumulation)
        is_cut = rest == 0 and (config.data.pairs is None or micro == 1)  # a bin is a sample
        return (micro, wanted.accumulation) if is_cut else None
    micro = max(n for n in range(1, min(wanted.micro, share) + 1) if share % n == 0)
    return micro, share // micro


def _overrides(config: RunConfig, layout: Layout) -> dict[str, str]:
    """The `--set` arguments that turn a checked config into one of the layout, by key."""
    settings = {TRAIN: config.deepspeed[TRAIN], MICRO: layout.micro}
    settings[ACCUMULATION] = layout.accumulation
    moe = config.model.moe
    if moe is not None:
        ways = ON_ONE_RANK if layout.ep_size == 1 else {}
        changed = {name: usual for name, usual in ways.items() if getattr(moe, name) != usual}
        changed["ep_size"] = layout.ep_size
        settings |= {f"{_MOE}.{name}": value for name, value in changed.items()}
    return {key: f"{key}={json.dumps(value)}" for key, value in settings.items()}


def fitted_settings(
    path: Path, settings: Sequence[str], wanted_ranks: int, num_ranks: int
) -> tuple[Layout, list[str]]:
    """The layout on at most `num_ranks` ranks, and the `--set` arguments that make it.

    JSON and settings were written for `wanted_ranks`.

    Raises:
        UserError: if the JSON is wrong, or allows no other number of ranks.
    """
    config = load_config(path, settings, wanted_ranks)
    layout = fitting_layout(config, num_ranks)
    if layout == wanted_layout(config):
        return layout, list(settings)
    own = _overrides(config, layout)
    kept = [text for text in settings if text.partition("=")[0].strip() not in own]
    fitted = [*kept, *own.values()]
    load_config(path, fitted, layout.num_ranks)
    return layout, fitted
