from pathlib import Path
from typing import Any

from benchmarks.eight_bit import LAST, draw, table


def run(name: str, losses: list[float], **own: Any) -> dict[str, Any]:
    return {
        "optimizer": name,
        "state_bytes_of_a_rank": 2**21,
        "peak_memory_bytes": None,
        "step_seconds": 0.25,
        "losses": losses,
        "last_loss": sum(losses[-LAST:]) / LAST,
        "valid_loss": 3.5,
        **own,
    }


def test_the_table_says_how_far_curves_are_apart_once_their_noise_is_averaged_out() -> None:
    falling = [5 - 0.01 * step for step in range(100)]
    noisy = [loss + (0.5 if step % 2 else -0.5) for step, loss in enumerate(falling)]
    higher = [loss + 0.1 * (step >= 50) for step, loss in enumerate(falling)]
    runs = [run("a", falling), run("b", noisy), run("c", higher, peak_memory_bytes=3 * 2**20)]
    _, _, a, b, c = table(runs).splitlines()
    assert a == "| a | 2.0 MiB | - | 0.2500 s | 4.1050 | 3.5000 | 0.0000 |"
    assert b.endswith("| 4.1050 | 3.5000 | 0.0000 |")
    assert c == "| c | 2.0 MiB | 3 MiB | 0.2500 s | 4.2050 | 3.5000 | 0.1000 |"


def test_a_run_shorter_than_the_mean_has_one_mean() -> None:
    (line,) = table([run("a", [2.0, 4.0])]).splitlines()[2:]
    assert line.endswith("| 0.0000 |")


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    runs = [run(name, [5.0 - 0.01 * step for step in range(60)]) for name in "abc"]
    draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
