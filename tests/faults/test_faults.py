import sys

import pytest

from tests.faults.faults import CASES, main, merged
from tests.faults.kills import table


def test_new_lines_take_the_place_of_old_ones_and_the_order_stays() -> None:
    names = [case.fault for case in CASES]
    assert len(set(names)) == len(names) >= 20
    page = f"| goes wrong | x |\n| {names[3]} | old | a |\n| {names[1]} | old | b |\n"
    found = merged(page, [f"| {names[1]} | new | c |", f"| {names[0]} | new | d |"])
    assert found == [
        f"| {names[0]} | new | d |",
        f"| {names[1]} | new | c |",
        f"| {names[3]} | old | a |",
    ]


def test_words_of_no_fault_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", "--only", CASES[0].fault, "--only", "meteor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--only meteor: no fault has these words" in capsys.readouterr().err


def test_kills_are_counted_by_what_the_run_was_doing() -> None:
    kills = [{"phase": "save", "rank": 1}, {"phase": "start", "rank": 0}] * 2
    assert table(kills).splitlines()[2:] == [
        "| start | 2 | 0 |",
        "| training | 0 | 0 |",
        "| save | 0 | 2 |",
    ]
