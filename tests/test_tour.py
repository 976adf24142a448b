"""docs/tour.md promises a core that a person reads in an afternoon."""

import re

from tests.ranks import ROOT

PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^(\d+)\. \[(\S+)\]\(\.\./(\S+)\) (.*)$", PAGE, re.MULTILINE)


def test_the_tour_counts_its_files_from_1_and_says_a_line_about_each():
    assert [int(number) for number, *_ in STOPS] == list(range(1, len(STOPS) + 1))
    assert len(STOPS) == len(re.findall(r"^\d+\. ", PAGE, re.MULTILINE))
    assert all(name == target and about for _, name, target, about in STOPS)
    assert len({name for _, name, *_ in STOPS}) == len(STOPS)


def test_the_core_has_at_most_28_files_and_5000_lines():
    assert 20 <= len(STOPS) <= 28
    lines = sum(len((ROOT / name).read_text("utf-8").splitlines()) for _, name, *_ in STOPS)
    assert lines <= 5000
