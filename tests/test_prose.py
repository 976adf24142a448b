"""tests/prose.py, by which `make lint` reads docstrings."""

from pathlib import Path

import pytest

from tests.prose import findings

FILE = '''
"""A module."""


def attend(keys, mask):
    """Scores of the keys.

    Args:
        keys: (B, T, D), ENTRY
        mask: bool, True at padding,
            for the other side too.

    Returns:
        (B, T) float32, the scores,
        of every key.

    Raises:
        UserError: if there are no keys.
    """
'''


def reasons(folder: Path, text: str) -> list[str]:
    file = folder / "attention.py"
    file.write_text(text, encoding="utf-8")
    return [finding.reason for finding in findings(file, folder)]


def test_noun_phrases_and_their_continued_lines_are_fine(tmp_path):
    assert reasons(tmp_path, FILE.replace("ENTRY", "the keys of every position")) == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("of every position", "begins with 'of'"),
        ("where they are", "begins with 'where'"),
        ("whose mask it is", "begins with 'whose'"),
        ("at most 8", "begins with 'at most'"),
        ("in how many parts", "begins with 'in how'"),
        ("from which they come", "begins with 'from which'"),
        ("", "says nothing"),
    ],
)
def test_a_fragment_is_found_behind_a_shape_too(tmp_path, entry, reason):
    assert reason in reasons(tmp_path, FILE.replace("(B, T, D), ENTRY", entry))
    if entry:
        assert reason in reasons(tmp_path, FILE.replace("ENTRY", entry))


def test_an_argument_that_is_none_is_found(tmp_path):
    text = FILE.replace("ENTRY", "the keys").replace("(keys, mask)", "(keys, hidden)")
    assert reasons(tmp_path, text) == ["'mask' is no parameter"]


def test_long_sentences_riddles_and_descriptions_are_found(tmp_path):
    text = '"""Whoever reads this, ' + "reads " * 40 + 'on."""\n'
    assert {reason.split()[0] for reason in reasons(tmp_path, text)} == {"'Whoever'", "a"}
    text = 'x: int = Field(description="Of the draw.")\n'
    assert reasons(tmp_path, text) == ["begins with 'Of'"]
