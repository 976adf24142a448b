import shlex

import pytest
from rich.console import Console

from magnetar.data.text.packed_lm import IGNORE_INDEX
from magnetar.engine.config.schema import TrainingConfig
from magnetar.engine.report import samples
from magnetar.engine.report.samples import RunTotals, evaluation_table, filled_in_text

PIECES = ["the", " sea", " is", " wide", " ", "r", ""]  # the last one ends a document


class Pieces:
    """A tokenizer whose tokens are PIECES; it drops a text's leading space, as SentencePiece."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(PIECES[token] for token in tokens).lstrip(" ")


def filled(answers: list[int], targets: list[int], given: list[int]) -> str:
    return filled_in_text(Pieces(), answers, targets, given).plain


NONE = IGNORE_INDEX


def test_what_was_not_masked_is_shown_as_it_was() -> None:
    assert filled([5, 5, 5], [NONE] * 3, [0, 1, 2]) == "the sea is"


def test_a_right_answer_stands_in_brackets_and_a_wrong_one_beside_the_truth() -> None:
    # 9 is the mask token, which no tokenizer knows; at the end a random token took the place.
    assert filled([5, 1, 5, 2], [NONE, 1, NONE, 3], [0, 9, 2, 0]) == "the [sea] is [is|wide]"


def test_spaces_and_ends_of_documents_are_visible() -> None:
    assert filled([5, 4, 6], [NONE, 6, 4], [0, 9, 9]) == "the[␣|¶][¶|␣]"


def test_an_answer_beside_a_space_does_not_swallow_it() -> None:
    assert filled([0, 5], [NONE, 3], [0, 9]) == "the [r|wide]"


def shown(rows: dict[str, dict]) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(evaluation_table("title", rows, 20.0))
    return captured.get()


def test_only_models_with_bits_per_byte_have_the_column() -> None:
    row = {"loss": 1.0, "perplexity": 20.0, "num_tokens": 5}
    without, with_bits = shown({"after": row}), shown({"after": row | {"bits_per_byte": 1.5}})
    assert "bits per byte" in with_bits
    assert "bits per byte" not in without
    assert without.splitlines()[-2].split() == ["after", "1.0000", "20.00", "1.000"]
    assert with_bits.splitlines()[-2].split() == ["after", "1.0000", "20.00", "1.000", "1.500"]


@pytest.mark.parametrize("directions", [[], [("en", "de")]])
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_commands_to_copy_are_one_word_a_value(
    architecture: str, directions: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, programs = "my run;echo $x", "a b/bin/"
    monkeypatch.setattr(samples, "programs_folder", lambda: programs)
    training = TrainingConfig.model_construct(run_dir=folder, save_every=2)
    lines = samples.closing_lines(training, architecture, directions, RunTotals(1, 1, 1, 0), True)
    assert shlex.split(lines["next"])[0] == f"{programs}magnetar"
    assert shlex.split(lines["next"])[2] == folder
    assert shlex.split(lines["curves"])[2] == f"{folder}/tensorboard"
