"""What the tests say about the machine."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import machine
from tests.conftest import pytest_terminal_summary
from tests.ranks import ROOT, run_on_ranks

BF16 = {"zero_optimization.stage": 1, "bf16.enabled": True}


def test_a_case_needs_what_its_config_uses() -> None:
    eight_bits = {"optimizer.type": "AdamW8bit"}
    assert machine.needs_of({"bf16.enabled": False, "optimizer.type": "AdamW"}) == []
    assert machine.needs_of(BF16 | eight_bits) == ["bf16", "bitsandbytes"]
    param = machine.as_param(1, cases=[BF16, {"fp16.enabled": True} | eight_bits])
    (mark,) = param.marks
    assert (mark.name, mark.args) == ("needs", ("bf16", "fp16", "bitsandbytes"))
    assert not machine.as_param(1, cases=[{}]).marks


@pytest.mark.parametrize("missing", [None, "bf16"])
def test_only_cases_that_need_what_is_missing_cannot_run(
    missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "lacks", lambda need: "why" if need == missing else None)
    assert machine.is_runnable({"fp16.enabled": True}, {})
    assert machine.is_runnable({}, BF16) == (missing is None)


def test_only_what_can_be_taken_away_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "WITHOUT", {"fp17"})
    with pytest.raises(ValueError, match="names fp17, and only bf16 bitsandbytes fp16 triton can"):
        machine.imitate()


@pytest.mark.slow
def test_ranks_refuse_what_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGNETAR_TEST_WITHOUT", "bf16")
    with pytest.raises(AssertionError, match="does not compute in bf16"):
        run_on_ranks("tests.engine.programs:losses_and_norms", 1, [BF16], 1, fresh=True)


def test_what_was_skipped_is_counted_by_its_reason() -> None:
    def report(nodeid: str, reason: str) -> Any:
        return SimpleNamespace(nodeid=nodeid, longrepr=("file", 1, f"Skipped: {reason}"))

    # A file that skips itself is reported by both processes of pytest-xdist.
    skipped = [report("a", "needs fp16"), report("b.py", "needs triton"), report("c", "needs fp16")]
    lines: list[str] = []
    reporter: Any = SimpleNamespace(
        stats={"skipped": [*skipped, skipped[1]]}, section=lines.append, line=lines.append
    )
    pytest_terminal_summary(reporter)
    assert lines == [
        "not shown on this machine",
        "   2 tests  needs fp16",
        "   1 test   needs triton",
    ]
    lines.clear()
    pytest_terminal_summary(SimpleNamespace(stats={}))  # type: ignore[arg-type]
    assert lines == []


def test_the_imitations_run_what_compares_bits_or_types() -> None:
    shown = "shown: ; @echo $(BITS) $(GUARDED) $(RESUMED)"
    listed = subprocess.run(
        ["make", "--no-print-directory", "--eval", shown, "shown"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = {path.partition("::")[0] for path in listed.stdout.split()}
    models = ("test_transformer", "moe/test_two_ranks", "moe/test_all_to_all", "layers/test_norms")
    assert paths > {f"tests/models/{name}.py" for name in models}
    assert paths > {f"tests/convert/test_{name}.py" for name in ("export", "shrink", "experts")}
    assert paths > {"tests/engine/optim/test_adam.py", "tests/engine/checkpoint/test_save_load.py"}
    assert [path for path in paths if not (ROOT / path).exists()] == []


def threads_after_a_program_set_them() -> int:
    torch.set_num_threads(1)
    return torch.get_num_threads()


@pytest.mark.slow
def test_ranks_keep_the_threads_of_the_imitation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGNETAR_TEST_THREADS", "2")
    program = "tests.test_machine:threads_after_a_program_set_them"
    assert run_on_ranks(program, 1) == [2]
