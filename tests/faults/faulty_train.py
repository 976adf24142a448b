"""Training with a fault put in from outside: magnetar train and magnetar supervise, patched.

    MAGNETAR_FAULT=nan:12:3 python -m tests.faults.faulty_train --num_gpus 2 --deepspeed_config X

It takes what magnetar supervise takes. The fault is KIND:STEP[:STEPS], and happens in the first
start alone, or in every one with KIND in capitals.
"""

import os
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from magnetar.engine.supervise.supervisor import Place, Supervisor
from magnetar.launchers.supervise import parse_arguments

VARIABLE = "MAGNETAR_FAULT"


class FaultySupervisor(Supervisor):
    """Starts this module in place of launchers.train."""

    def _command(self, place: Place, settings: Any) -> list[str]:
        words = super()._command(place, settings)
        return [
            "tests.faults.faulty_train" if word == "magnetar.launchers.train" else word
            for word in words
        ]


def put_in(kind: str, first: int, count: int) -> None:
    """Have steps first, first + 1, ... of the run go wrong."""
    import torch

    from magnetar.engine import trainer
    from magnetar.engine.cluster import logbook

    train_step = trainer.train_step
    done: list[int] = []

    def faulty(engine: Any, *arguments: Any) -> Any:
        step, rank = engine.global_steps + 1, torch.distributed.get_rank()
        # Rolled back, a run meets other batches: the fault is not in the step's number.
        is_due = first <= step < first + count and done.count(step) == 0
        done.append(step)
        if not is_due:
            return train_step(engine, *arguments)
        if kind == "nan" and rank == 1:
            weight = engine.module.get_parameter("embedding.weight")
            hook = weight.register_hook(lambda gradient: gradient * float("nan"))
        elif kind in ("infinite", "spike") and rank == 1:
            factor = float("inf") if kind == "infinite" else 10.0
            hook = engine.module.register_forward_hook(
                lambda _module, _inputs, output: (scaled(output[0], factor), output[1])
            )
        elif kind == "flip" and rank == 1:
            weight = engine.module.get_parameter("blocks.0.attention.out_proj.weight")
            weight.data.view(torch.int32).view(-1)[7] ^= 1 << 20
            return train_step(engine, *arguments)
        elif kind == "clock":
            back = time.time
            time.time = lambda: back() - 3600.0

            class Earlier(datetime):
                @classmethod
                def now(cls, tz: Any = None) -> datetime:
                    return datetime.now(tz) - timedelta(hours=1)

            logbook.datetime = Earlier  # type: ignore[misc]
            return train_step(engine, *arguments)
        else:
            return train_step(engine, *arguments)
        try:
            return train_step(engine, *arguments)
        finally:
            hook.remove()

    trainer.train_step = faulty


def scaled(sums: Any, factor: float) -> Any:
    """The sums of a rank's losses, larger."""
    return sums._replace(total=sums.total * factor, cross_entropy=sums.cross_entropy * factor)


def main() -> int:
    """A rank, where a launcher has started this; the supervisor, where a person has."""
    if "RANK" not in os.environ:
        return FaultySupervisor(parse_arguments(sys.argv[1:])).run()
    kind, first, *count = os.environ[VARIABLE].split(":")
    run_dir = next(w.partition("run_dir=")[2] for w in sys.argv if ".run_dir=" in w)
    is_first_start = not any(Path(run_dir).glob("checkpoints/step_*"))
    if is_first_start or kind.isupper():
        put_in(kind.lower(), int(first), int(count[0]) if count else 1)
    from magnetar.launchers.train import main as train

    train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
