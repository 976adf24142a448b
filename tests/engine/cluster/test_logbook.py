from pathlib import Path

from magnetar.engine.cluster.logbook import write


def test_entries_follow_one_another_below_one_title(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    write(run_dir, "start", "300 steps")
    write(run_dir, "change", "two keys:\nmagnetar.training.num_steps: 300 -> 400\nlr: 1 -> 2")
    lines = (run_dir / "logbook.md").read_text().splitlines()
    assert lines[0] == "# Logbook of run"
    assert lines[2].endswith("**start** 300 steps")
    assert lines[3].endswith("**change** two keys:")
    assert lines[4:] == ["  - magnetar.training.num_steps: 300 -> 400", "  - lr: 1 -> 2"]
