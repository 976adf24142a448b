"""train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks."""

from typing import NamedTuple

from engine.config_problems import Problem

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
        return BatchSizes(micro * accumulation * world_size, micro, accumulation)
    if micro is None:
        accumulation = accumulation or 1
        return BatchSizes(train, train // world_size // accumulation, accumulation)
    if accumulation is None:
        accumulation = train // micro // world_size
    return BatchSizes(train, micro, accumulation)


def _multiples_near(value: int, unit: int) -> str:
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
    if world_size is None:
        fits = train % unit == 0
    else:
        full = filled(sizes, world_size)
        assert full.micro is not None
        assert full.accumulation is not None
        fits = full.micro > 0 and full.micro * full.accumulation * world_size == train
    if fits:
        return []
    given = [f"{TRAIN}={train}"]
    given += [f"{MICRO}={micro}"] if micro else []
    given += [f"{ACCUMULATION}={accumulation}"] if accumulation else []
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}" if world_size else "any ranks"
    all_three = micro is not None and accumulation is not None
    near = f"{unit}" if all_three and world_size else _multiples_near(train, unit)
    rule = "must equal the product of the others" if all_three else "must be divided evenly"
    way_out = f"use {TRAIN} {near}"
    if all_three:
        way_out += f", or leave out {ACCUMULATION}"
    elif micro and world_size and train % world_size == 0:
        share = train // world_size
        fitting = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        way_out += f", or {MICRO} {fitting}"
    text = f"{', '.join(given)} on {ranks}: {TRAIN} {rule} ({MICRO} * {ACCUMULATION} * ranks)"
    return [Problem(TRAIN, f"{text}: {way_out}")]
