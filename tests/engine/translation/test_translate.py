"""Translations of many sentences, and their scores."""

import json
from pathlib import Path

import pytest
import sacrebleu
import torch

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec
from magnetar.engine.report.translations import signature_lines, translation_tables
from magnetar.engine.translation.translate import (
    Decoding,
    DirectionScore,
    TranslationScores,
    allowed_tokens,
    bleu_tokenizer,
    evaluate_translation,
    joined,
    one_line,
    require_sacrebleu,
    translate_ids,
)
from magnetar.models.decoding.beam_search import Sampling, Translation, default_max_len, translate
from magnetar.models.transformer import EncoderDecoder
from tests.engine.translations import LANGUAGES, MAX_LEN, TEXTS, make_codec, make_model
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return make_codec(folder)


@pytest.fixture(scope="module")
def model() -> EncoderDecoder:
    return make_model()


def sources(codec: Codec) -> list[list[int]]:
    texts = ["The sea is calm.", "Meer", "A ship is here.", "", "two ships", "海", "One ship"]
    return [codec.source_ids(text, "de") for text in texts]


def alone(model: EncoderDecoder, codec: Codec, ids: list[int], **keys) -> Translation:
    limit = torch.tensor([keys.pop("max_len", default_max_len(len(ids)))])
    allowed = allowed_tokens(model, codec)
    source = torch.tensor([ids])
    return translate(model, source, None, codec.eos_id, max_len=limit, allowed=allowed, **keys)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("beam", [1, 4])
def test_the_order_stays_whatever_the_batches(
    model: EncoderDecoder, codec: Codec, beam: int, batch_size: int
) -> None:
    rows, done = sources(codec), []
    decoding = Decoding(beam=beam, length_penalty=0.6, batch_size=batch_size)
    found = translate_ids(model, codec, rows, decoding, lambda *counts: done.append(counts))
    for ids, result in zip(rows, found, strict=True):
        expected = alone(model, codec, ids, beam=beam, length_penalty=0.6)
        assert result.tokens == expected.tokens
        assert result.score == pytest.approx(expected.score, rel=1e-5)
    assert sum(more for more, _ in done) == len(rows)
    assert {total for _, total in done} == {len(rows)}


def test_draws_do_not_depend_on_the_batches(model: EncoderDecoder, codec: Codec) -> None:
    texts = [
        [
            result.tokens
            for result in translate_ids(
                model, codec, sources(codec), Decoding(sampling=Sampling(), batch_size=size)
            )
        ]
        for size in (1, 3, 64)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_max_len_limits_every_translation(model: EncoderDecoder, codec: Codec) -> None:
    found = translate_ids(model, codec, sources(codec), Decoding(beam=2, max_len=3))
    assert max(len(result.tokens) for result in found) == 2


def test_nothing_to_translate_is_no_error(model: EncoderDecoder, codec: Codec) -> None:
    assert translate_ids(model, codec, [], Decoding()) == []


def test_tags_and_ids_of_no_piece_are_never_chosen(model: EncoderDecoder, codec: Codec) -> None:
    allowed = allowed_tokens(model, codec)
    banned = {i for i in range(304) if not allowed[i]}
    tags = {codec.tag_id(language) for language in LANGUAGES}
    assert banned == tags | set(range(codec.vocab_size, 304))


def test_scores_are_sacrebleus_of_the_translations(model: EncoderDecoder, codec: Codec) -> None:
    scores = evaluate_translation(model, codec, TEXTS, Decoding(beam=2, batch_size=3))
    for direction, (texts, references) in TEXTS.items():
        answers = []
        for text in texts:
            ids = codec.source_ids(text.strip(), direction[1])
            ids = ids if len(ids) <= MAX_LEN else [*ids[: MAX_LEN - 1], codec.eos_id]
            result = alone(model, codec, ids, beam=2)
            answers.append(one_line(codec.decode(result.tokens)) if text else "")
        tokenize = {"en": "13a", "zh": "zh"}[direction[1]]
        found = scores.directions[direction]
        bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenize)
        assert found.bleu == pytest.approx(bleu.score)
        assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
        assert found.num_sentences == len(texts)
        assert scores.examples[direction] == (texts[0], references[0], answers[0])
    assert scores.num_truncated == 1
    assert scores.bleu_signatures.keys() == {"13a", "zh"}
    assert "tok:13a" in scores.bleu_signatures["13a"]
    assert "tok:zh" in scores.bleu_signatures["zh"]
    assert "nc:6" in scores.chrf_signature
    assert scores.chrf == pytest.approx(sum(s.chrf for s in scores.directions.values()) / 3)


def test_references_themselves_score_100(
    model: EncoderDecoder, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = [text for _, side in TEXTS.values() for text in side]
    # The empty source has no translation.
    answers = [codec.target_ids(text)[:-1] for text in references if text != "Nothing."]
    monkeypatch.setattr(
        "magnetar.engine.translation.translate.translate_ids",
        lambda *_: [Translation(tokens, 0.0) for tokens in answers],
    )
    scores = evaluate_translation(model, codec, TEXTS)
    assert scores.directions["en", "zh"].bleu == pytest.approx(100)
    assert scores.directions["en", "zh"].chrf == pytest.approx(100)
    assert 50 < scores.directions["de", "en"].bleu < 100


def test_the_dictionary_is_json_and_names_everything(model: EncoderDecoder, codec: Codec) -> None:
    scores = evaluate_translation(model, codec, TEXTS, Decoding(beam=1, length_penalty=0.5))
    found = json.loads(json.dumps(scores.to_dict()))
    assert list(found["directions"]) == ["de-en", "en-zh", "de-zh"]
    assert found["directions"]["de-en"].keys() == {"bleu", "chrf", "sentences"}
    assert (found["beam"], found["length_penalty"], found["truncated"]) == (1, 0.5, 1)
    assert found["bleu"] == scores.bleu
    lines = signature_lines(scores)
    assert sum(line.startswith("BLEU  nrefs:1|case:mixed") for line in lines) == 2
    assert lines[-1] == "beam 1, length penalty 0.5; sources cut to the model's positions: 1"


def cells(found) -> list[list[str]]:
    return [list(column.cells) for column in found.columns]


def test_few_directions_are_a_list_and_many_a_matrix() -> None:
    def of(directions: dict[tuple[str, str], float]) -> TranslationScores:
        scores = {d: DirectionScore(value, 2 * value, 7) for d, value in directions.items()}
        return TranslationScores(scores, {}, "", Decoding(), 0, {}, {})

    (listed,) = translation_tables("title", of({("de", "en"): 10.0, ("en", "de"): 20.0}))
    assert cells(listed)[0] == ["de -> en", "en -> de", "mean"]
    assert cells(listed)[1] == ["10.0", "20.0", "15.0"]
    assert cells(listed)[3] == ["7", "7", "14"]
    names = "abcde"
    many = {(x, y): float(i + 5 * j) for i, x in enumerate(names) for j, y in enumerate(names)}
    many = {direction: value for direction, value in many.items() if len(set(direction)) == 2}
    bleu, chrf = translation_tables("title", of(many))
    assert cells(bleu)[0] == [*names, "mean"]
    assert cells(bleu)[1] == ["", "1.0", "2.0", "3.0", "4.0", "2.5"]
    assert cells(bleu)[-1] == ["12.5", "12.2", "12.0", "11.8", "11.5", "12.0"]
    assert cells(chrf)[1][1] == "2.0"


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        ("de", "13a"),
        ("zh", "zh"),
        ("zh_CN", "zh"),
        ("ja", "char"),
        ("ko", "13a"),
        ("th", "char"),
        ("zho_Hans", "zh"),
        ("jpn_Jpan", "char"),
    ],
)
def test_bleu_has_the_words_of_the_language(language: str, tokenizer: str) -> None:
    assert bleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize("language", ["Chinese", "chi", "mandarin", "jp"])
def test_a_language_without_blanks_that_no_code_names_is_warned_of(
    language: str, model: EncoderDecoder, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(codec._tag_ids, language, codec.tag_id("zh"))
    monkeypatch.setattr(codec, "languages", (*codec.languages, language))
    scores = evaluate_translation(model, codec, {("en", language): TEXTS["en", "zh"]})
    assert scores.bleu_signatures.keys() == {"13a"}
    (warning,) = scores.warnings
    assert f"BLEU of en-{language} says little: most references have no blanks" in warning
    assert bleu_tokenizer("zh") == "zh", "the way out"
    assert evaluate_translation(model, codec, TEXTS).warnings == []


def test_parts_are_joined_as_the_language_is_written() -> None:
    assert joined(["One.", "Two."], "en") == "One. Two."
    assert joined(["一。", "二。"], "zh-TW") == "一。二。"
    assert joined([], "en") == ""
    assert one_line("a\nb\r\nc\u2028d") == "a b c d"


@pytest.mark.slow
def test_two_ranks_with_half_of_the_experts_each_find_what_one_finds(
    model: EncoderDecoder, codec: Codec, folder: Path
) -> None:
    expected = evaluate_translation(model, codec, TEXTS, Decoding(beam=3, batch_size=2))
    for found, examples in run_on_ranks("tests.engine.translations:scores_on_a_rank", 2, folder):
        assert found == expected.to_dict()
        assert examples == expected.examples


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magnetar.engine.translation.translate.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"run pip install 'magnetar\[translate\]' or pip install s"
    ):
        require_sacrebleu()
