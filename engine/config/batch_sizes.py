"""train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks."""

from math import prod
from typing import NamedTuple

from magnetar.engine.config.errors import Problem

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


class BatchSizes(NamedTuple):
    """The three sizes; None where the JSON leaves one to follow from the others."""

    train: int | None
    micro: int | None
    accumulation: int | None


def filled(sizes: BatchSizes, world_size: int) -> BatchSizes:
    """DeepSpeed's rule for the sizes that are left out; the product may still be wrong."""
    train, micro, accumulation = sizes
    if train is None:
        assert micro is not None
        accumulation = accumulation or 1
        train = micro * accumulation * world_size
    elif micro is None:
        accumulation = accumulation or 1
        micro = train // world_size // accumulation
    elif accumulation is None:
        accumulation = train // micro // world_size
    return BatchSizes(train, micro, accumulation)


def multiples_near(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of the value."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def batch_problems(sizes: BatchSizes, world_size: int | None) -> list[Problem]:
    """Why the sizes cannot be met, with sizes that can; nothing where they can."""
    train, micro, accumulation = sizes
    if train is None and micro is None:
        return [Problem(TRAIN, f"{TRAIN} and {MICRO} are both missing: add one of them")]
    if train is None or (world_size is None and None in (micro, accumulation)):
        return []
    unit = (micro or 1) * (accumulation or 1) * (world_size or 1)
    full = sizes if world_size is None else filled(sizes, world_size)
    product = prod(size or 0 for size in (*full[1:], world_size or 1))
    # Without a number of ranks, any number may follow.
    if product and (train % product == 0 if world_size is None else product == train):
        return []
    named = zip((TRAIN, MICRO, ACCUMULATION), sizes, strict=True)
    given = [f"{name}={size}" for name, size in named if size]
    where = "" if world_size is None else f" on {world_size} rank{'s' * (world_size > 1)}"
    words = f"do not fit {TRAIN} = {MICRO} * {ACCUMULATION} * ranks"
    way_out = _way_out(train, sizes, unit, world_size)
    return [Problem(TRAIN, f"{', '.join(given)}{where} {words}: use {way_out}")]


def _ranks_near(train: int, sizes: BatchSizes, world_size: int) -> str:
    """The numbers of ranks on both sides that the batch divides among."""
    share, rest = divmod(train, (sizes.micro or 1) * (sizes.accumulation or 1))
    if rest:
        return ""
    fitting = [n for n in range(1, share + 1) if share % n == 0]
    near = [n for n in fitting if n < world_size][-1:] + [n for n in fitting if n > world_size][:1]
    return f", or {' or '.join(map(str, near))} rank{'s' * (near != [1])}"


def _way_out(train: int, sizes: BatchSizes, unit: int, world_size: int | None) -> str:
    """Sizes that do fit."""
    if None not in sizes and world_size is not None:
        assert sizes.micro is not None
        assert sizes.accumulation is not None
        if train % (sizes.accumulation * world_size) == 0:
            # The one that has no influence on the numbers: a run goes on with it on other ranks.
            share = train // (sizes.accumulation * world_size)
            return f"{MICRO} {share}, or leave it out"
        even = train % (sizes.micro * world_size) == 0
        return f"{TRAIN} {unit}, or leave out {ACCUMULATION if even else TRAIN}"
    ranks = "" if world_size is None else _ranks_near(train, sizes, world_size)
    way_out = f"{TRAIN} {multiples_near(train, unit)}"
    if sizes.micro and sizes.accumulation is None and world_size and train % world_size == 0:
        share = train // world_size
        fitting = max(n for n in range(1, min(sizes.micro, share) + 1) if share % n == 0)
        way_out += f", or {MICRO} {fitting}"
    return way_out + ranks
