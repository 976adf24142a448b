import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec, parse_direction, tag, tagged_languages
from magnetar.data.text.tokenizer import load_tokenizer, train_sentencepiece
from tests.data.text.test_tokenizer import AWKWARD, TEXTS

LANGUAGES = ("en", "de", "pt-br")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    file = tmp_path_factory.mktemp("codec") / "tokenizer.model"
    train_sentencepiece(TEXTS, 340, file, symbols=[tag(language) for language in LANGUAGES])
    return Codec(load_tokenizer(file), LANGUAGES)


def test_a_source_begins_with_the_tag_of_its_target_and_both_sides_end(codec):
    target = codec.target_ids("the ship")
    assert target[-1] == codec.eos_id
    assert codec.source_ids("the ship", "de") == [codec.tag_id("de"), *target]
    assert len({codec.tag_id(language) for language in LANGUAGES}) == 3
    assert codec.eos_id not in target[:-1]


@pytest.mark.parametrize("text", [*AWKWARD, "<2de> <2pt-br><2en", "<<2de>>", "a<2en>b"])
def test_decoding_gives_an_awkward_text_back(codec, text):
    assert codec.decode(codec.target_ids(text)) == text
    assert codec.decode(codec.source_ids(text, "en")) == text


@given(
    text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("<2>den-pt br")))
)
@settings(deadline=None, max_examples=200)
def test_no_text_becomes_a_tag_and_any_comes_back(codec, text):
    ids = codec.target_ids(text)
    assert not {codec.tag_id(language) for language in LANGUAGES} & {*ids}
    assert codec.decode(ids) == text


def test_decoding_stops_at_the_end_and_drops_tags(codec):
    ids = [codec.eos_id if i < 0 else i for i in (codec.tag_id("de"), -1)]
    assert codec.decode([*codec.target_ids("sea")[:-1], *ids, *codec.target_ids("sky")]) == "sea"


def test_a_word_has_the_same_pieces_at_the_start_of_a_sentence(codec):
    word, end = codec.target_ids("ship")[:-1], codec.eos_id
    assert codec.target_ids("the ship")[-len(word) - 1 :] == [*word, end]


def test_an_unknown_language_is_a_message(codec):
    with pytest.raises(UserError, match="language 'fr' is unknown here: use one of en, de, pt-br"):
        codec.source_ids("the ship", "fr")


def test_a_vocabulary_without_a_tag_is_a_message(codec):
    with pytest.raises(UserError, match="no tag <2fr> for language 'fr'"):
        Codec(codec.tokenizer, ["en", "fr"])


def test_a_direction_is_two_languages_even_with_hyphens():
    assert parse_direction("en-pt-br", LANGUAGES) == ("en", "pt-br")
    assert parse_direction("pt-br-de", LANGUAGES) == ("pt-br", "de")


@pytest.mark.parametrize("direction", ["en", "en-en", "en-fr", "", "-de", "en_de"])
def test_a_direction_that_is_none_is_a_message(direction):
    with pytest.raises(UserError, match="is not SOURCE-TARGET of two languages that are here"):
        parse_direction(direction, LANGUAGES)


def test_an_ambiguous_direction_is_a_message():
    with pytest.raises(UserError, match="can be read in several ways"):
        parse_direction("a-b-c", ["a", "a-b", "b-c", "c"])


def test_a_vocabulary_says_itself_which_languages_it_has(codec, tmp_path):
    assert tagged_languages(codec.tokenizer) == list(LANGUAGES)
    train_sentencepiece(TEXTS, 340, tmp_path / "tokenizer.model")
    assert tagged_languages(load_tokenizer(tmp_path / "tokenizer.model")) == []
