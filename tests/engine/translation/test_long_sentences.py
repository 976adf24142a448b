"""What becomes of sentences that are longer than a model's positions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec
from magnetar.engine.translation.long_sentences import TooLong, fit, split_text, told
from tests.engine.translations import make_codec

LONG = "The sea is calm. The ships are here, and two of them are far away; the sea is calm."


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return make_codec(tmp_path_factory.mktemp("vocabulary"))


def test_what_fits_is_left_as_it_is_and_what_is_empty_left_out(codec: Codec) -> None:
    texts = ["The sea", "", " \t", "  Meer "]
    found = fit(texts, codec, "de", 40, "refuse")
    assert found.ids == [codec.source_ids(text, "de") for text in ("The sea", "Meer")]
    assert (found.sentence, found.too_long) == ([0, 3], [])


def test_what_the_vocabulary_drops_is_empty(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = codec.tokenizer.encode
    monkeypatch.setattr(codec.tokenizer, "encode", lambda text: encode(text.strip("\u200b")))
    found = fit(["\u200b", "Meer", "\u200b\u200b"], codec, "de", 40, "refuse")
    assert found.sentence == [1]


def test_a_long_sentence_is_split_into_parts_that_fit(codec: Codec) -> None:
    found = fit(["Meer", LONG, "Meer"], codec, "de", 24, "split")
    assert found.too_long == [1]
    assert found.sentence[0] == 0
    assert set(found.sentence[1:-1]) == {1}
    assert found.sentence[-1] == 2
    assert all(len(ids) <= 24 and ids[0] == codec.tag_id("de") for ids in found.ids)
    whole = " ".join(codec.decode(ids) for ids in found.ids[1:-1])
    assert whole == LONG


def test_a_long_sentence_is_truncated(codec: Codec) -> None:
    (ids,) = fit([LONG], codec, "de", 10, "truncate").ids
    assert len(ids) == 10
    assert ids == [*codec.source_ids(LONG, "de")[:9], codec.eos_id]


def test_a_long_sentence_is_refused(codec: Codec) -> None:
    length = len(codec.source_ids(LONG, "de"))
    rule = f"sentence 2 has {length} tokens, and the model reads at most max_seq_len=24: shorten it"
    with pytest.raises(UserError, match=rule):
        fit(["Meer", LONG], codec, "de", 24, "refuse")


@pytest.mark.parametrize("too_long", ["split", "truncate"])
def test_a_character_of_more_tokens_than_there_are_positions_is_cut(
    codec: Codec, too_long: TooLong
) -> None:
    found = fit(["\U0001f6a2" * 3], codec, "de", 4, too_long)
    assert all(len(ids) == 4 for ids in found.ids)
    assert len(found.ids) == (3 if too_long == "split" else 1)


def test_a_text_is_split_at_its_sentences_and_they_at_the_best_border_near_the_middle() -> None:
    def parts(text: str, max_chars: int) -> list[str]:
        return split_text(text, lambda part: len(part) <= max_chars)

    assert parts("One, two. Three, four.", 15) == ["One, two.", "Three, four."]
    assert parts("One. Two. Three. Four.", 16) == ["One.", "Two.", "Three.", "Four."]
    assert parts("See p. 2. Or no. 3, e.g. there.", 22) == [
        "See p.",
        "2.",
        "Or no.",
        "3, e.g. there.",
    ]
    assert parts("One and two, three and four", 15) == ["One and two,", "three and four"]
    assert parts("one two three four", 10) == ["one two", "three four"]
    assert parts("海在这里。船在那里。", 5) == ["海在这里。", "船在那里。"]
    assert parts("abcdef", 3) == ["abc", "def"]
    assert parts("ab", 0) == ["a", "b"], "one character is never split"


@given(st.text(alphabet="ab .,。 "), st.integers(1, 6))
def test_splitting_loses_only_spaces_between_parts(text: str, max_chars: int) -> None:
    text = text.strip()
    parts = split_text(text, lambda part: len(part) <= max_chars)
    assert all(len(part) <= max_chars for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert not text or all(parts)


def test_what_has_happened_is_told() -> None:
    assert told([], 9, 24, "split") == ""
    assert told([0, 4], 9, 24, "split") == (
        "2 of 9 sentences were longer than the model's 24 positions and have been split: number 1, "
        "5"
    )
    assert told(range(8), 9, 24, "truncate").endswith("truncated: number 1, 2, 3, 4, 5, ...")
