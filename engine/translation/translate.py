"""Translation of many sentences by a model, and the scores of the translations."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from magnetar.data.errors import missing_package
from magnetar.data.pairs.codec import Codec
from magnetar.data.pairs.folder import Texts
from magnetar.engine.translation.long_sentences import fit
from magnetar.models.decoding.beam_search import Sampling, Translation, default_max_len, translate
from magnetar.models.transformer import EncoderDecoder

# Languages that are written without spaces between words, by their two- and three-letter codes.
CHINESE = frozenset({"zh", "zho", "cmn"})
SPACELESS = CHINESE | {
    *("bo", "dz", "ja", "km", "lo", "my", "th"),
    *("bod", "dzo", "jpn", "khm", "lao", "mya", "tha"),
    *("gan", "hak", "hsn", "nan", "wuu", "yue"),
}


@dataclass(frozen=True)
class Decoding:
    """Settings of the search for translations.

    Attributes:
        beam: number of hypotheses; 1 is greedy.
        length_penalty: exponent of the length in the score, as in models.decoding.beam_search.
        max_len: largest number of tokens of a translation, with its end; None for a limit that
            depends on its source's length.
        sampling: settings of sampling in place of the search; None for the search.
        batch_size: sentences that are translated at once.
    """

    beam: int = 4
    length_penalty: float = 1.0
    max_len: int | None = None
    sampling: Sampling | None = None
    batch_size: int = 32


def translate_ids(
    model: EncoderDecoder,
    codec: Codec,
    sources: Sequence[Sequence[int]],
    decoding: Decoding,
    progress: Callable[[int, int], None] | None = None,
    sample_ids: Sequence[int] | None = None,
) -> list[Translation]:
    """Translations of sources in their order, batched by length, spread over all ranks.

    Args:
        model: every rank calls this together, since MoE layers exchange tokens.
        codec: the model's vocabulary.
        sources: token ids, the same on every rank, none longer than the encoder's positions.
        decoding: settings of the search.
        progress: function of the number of sentences just translated and of their total.
        sample_ids: keys of each source's draws; None for its place among the sources.
    """
    sample_ids = range(len(sources)) if sample_ids is None else sample_ids
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    order = sorted(range(len(sources)), key=lambda number: (-len(sources[number]), number))
    size = decoding.batch_size
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    own: dict[int, Translation] = {}
    for first in range(0, len(batches), world_size):
        # Every rank needs the same number of batches, so the last may be translated twice.
        numbers = batches[min(first + rank, len(batches) - 1)]
        found = _translate_batch(model, codec, sources, numbers, decoding, sample_ids)
        own |= zip(numbers, found, strict=True)
        if progress:
            progress(sum(map(len, batches[first : first + world_size])), len(sources))
    everyones: list[dict[int, Translation]] = [own]
    if world_size > 1:
        everyones = [{} for _ in range(world_size)]
        dist.all_gather_object(everyones, own)
    merged = {number: found for part in everyones for number, found in part.items()}
    return [merged[number] for number in range(len(sources))]


def _translate_batch(
    model: EncoderDecoder,
    codec: Codec,
    sources: Sequence[Sequence[int]],
    numbers: Sequence[int],
    decoding: Decoding,
    sample_ids: Sequence[int],
) -> list[Translation]:
    device = model.decoder.embedding.weight.device
    rows = [torch.tensor(sources[number]) for number in numbers]
    lengths = torch.tensor([len(row) for row in rows])
    source = pad_sequence(rows, batch_first=True, padding_value=codec.eos_id)  # (B, S)
    padding = torch.arange(source.size(1)) >= lengths.unsqueeze(1)
    limits = [decoding.max_len or default_max_len(len(row)) for row in rows]
    return translate(
        model,
        source.to(device),
        padding.to(device) if padding.any() else None,
        codec.eos_id,
        max_len=torch.tensor([min(limit, model.decoder.max_len) for limit in limits]),
        beam=decoding.beam,
        length_penalty=decoding.length_penalty,
        allowed=allowed_tokens(model, codec),
        sampling=decoding.sampling,
        sample_ids=torch.tensor([sample_ids[number] for number in numbers]),
        any_rank=_any_rank if dist.is_initialized() and dist.get_world_size() > 1 else None,
    )


def _any_rank(value: bool) -> bool:
    """Whether any rank passes True; every rank calls this."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def allowed_tokens(model: EncoderDecoder, codec: Codec) -> torch.Tensor:
    """(V,) bool, False for language tags and for the ids that pad a vocabulary for speed."""
    assert model.config.vocab_size is not None
    allowed = torch.arange(model.config.vocab_size) < codec.vocab_size
    allowed[[codec.tag_id(language) for language in codec.languages]] = False
    return allowed


def one_line(text: str) -> str:
    """A translation without line breaks, so that line n of a file belongs to source n."""
    return " ".join(text.splitlines())


def joined(parts: Iterable[str], language: str) -> str:
    """The translations of a sentence's parts, joined."""
    return ("" if is_spaceless(language) else " ").join(parts)


def is_spaceless(language: str) -> bool:
    """Whether a language is written without spaces; "zh_CN" and "zho_Hans" count as "zh"."""
    return _subtag(language) in SPACELESS


def bleu_tokenizer(language: str) -> str:
    """sacrebleu's name of the tokenizer that splits a language into BLEU's words.

    WMT uses "zh" for Chinese. sacrebleu's "ja-mecab" needs a further package, so Japanese and the
    other languages without spaces are compared character by character.
    """
    if _subtag(language) in CHINESE:
        return "zh"
    return "char" if is_spaceless(language) else "13a"


def _subtag(language: str) -> str:
    """The ISO 639-1 or 639-3 code of a language, without script and country."""
    return language.replace("_", "-").split("-")[0].lower()


class DirectionScore(NamedTuple):
    """BLEU and chrF, from 0 to 100, over a number of sentences."""

    bleu: float
    chrf: float
    num_sentences: int


def has_no_blanks(texts: Iterable[str]) -> bool:
    """Whether most of the texts that are not empty are written without blanks."""
    written = [text.strip() for text in texts if text.strip()]
    return sum(len(text.split()) == 1 for text in written) * 2 > len(written)


@dataclass(frozen=True)
class TranslationScores:
    """Scores of translations.

    Attributes:
        directions: scores by direction, which is source and target language.
        bleu_signatures: sacrebleu's signatures of BLEU, by tokenizer.
        chrf_signature: sacrebleu's signature of chrF.
        decoding: settings of the search.
        num_truncated: number of sources that were longer than the model's positions.
        examples: the first source, its reference and its translation, by direction.
        translations: all translations, by direction.
        warnings: sentences about directions whose BLEU says little.
    """

    directions: dict[tuple[str, str], DirectionScore]
    bleu_signatures: dict[str, str]
    chrf_signature: str
    decoding: Decoding
    num_truncated: int
    examples: dict[tuple[str, str], tuple[str, str, str]]
    translations: dict[tuple[str, str], list[str]]
    warnings: Sequence[str] = ()

    @property
    def bleu(self) -> float:
        """Mean BLEU over directions."""
        return statistics.fmean(score.bleu for score in self.directions.values())

    @property
    def chrf(self) -> float:
        """Mean chrF over directions."""
        return statistics.fmean(score.chrf for score in self.directions.values())

    def to_dict(self) -> dict[str, Any]:
        """The entries of summary.json and evaluation.json."""
        return {
            "bleu": self.bleu,
            "chrf": self.chrf,
            "beam": self.decoding.beam,
            "length_penalty": self.decoding.length_penalty,
            "truncated": self.num_truncated,
            "bleu_signatures": self.bleu_signatures,
            "chrf_signature": self.chrf_signature,
            "directions": {
                "-".join(direction): {"bleu": bleu, "chrf": chrf, "sentences": number}
                for direction, (bleu, chrf, number) in self.directions.items()
            },
        }


def require_sacrebleu() -> None:
    """Refuse to evaluate translations if nothing can score them.

    Raises:
        UserError: sacrebleu is not installed.
    """
    if find_spec("sacrebleu") is None:
        raise missing_package("BLEU and chrF", "sacrebleu", "translate")


def evaluate_translation(
    model: EncoderDecoder,
    codec: Codec,
    texts: Texts,
    decoding: Decoding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TranslationScores:
    """Translate sentences and compare them with their references, through sacrebleu.

    Args:
        model: every rank calls this together, since MoE layers exchange tokens.
        codec: the model's vocabulary.
        texts: sources and their references by direction, the same on every rank. There is at least
            one direction, and at least one sentence in each.
        decoding: settings of the search; None for beam 4.
        progress: function of the number of sentences just translated and of their total.

    Returns:
        The scores, the same on every rank.
    """
    require_sacrebleu()
    import sacrebleu  # in a user's installation it may be missing

    decoding = decoding or Decoding()
    max_len = model.encoder.max_len
    ids: list[list[int]] = []
    owners: list[tuple[tuple[str, str], int]] = []
    num_truncated = 0
    for direction, (sources, _) in texts.items():
        fitted = fit(sources, codec, direction[1], max_len, "truncate")
        ids += fitted.ids
        owners += [(direction, number) for number in fitted.sentence]
        num_truncated += len(fitted.too_long)
    answers = {direction: [""] * len(sources) for direction, (sources, _) in texts.items()}
    translations = translate_ids(model, codec, ids, decoding, progress)
    for (direction, number), translation in zip(owners, translations, strict=True):
        answers[direction][number] = one_line(codec.decode(translation.tokens))
    chrf, signatures = sacrebleu.CHRF(), dict[str, str]()
    scores, examples, warnings = {}, {}, []
    for direction, (sources, references) in texts.items():
        found, tokenizer = answers[direction], bleu_tokenizer(direction[1])
        if tokenizer == "13a" and has_no_blanks(references):
            warnings.append(
                f"BLEU of {'-'.join(direction)} says little: most references have no blanks, and "
                f"its tokenizer 13a takes each for one word. Name the language {direction[1]!r} by "
                "its code, such as zh, ja or th, when you prepare the pairs, or look at chrF"
            )
        bleu = sacrebleu.BLEU(tokenize=tokenizer)
        values = [one.corpus_score(found, [list(references)]).score for one in (bleu, chrf)]
        scores[direction] = DirectionScore(values[0], values[1], len(sources))
        signatures[tokenizer] = str(bleu.get_signature())
        examples[direction] = sources[0], references[0], found[0]
    return TranslationScores(
        scores,
        signatures,
        str(chrf.get_signature()),
        decoding,
        num_truncated,
        examples,
        answers,
        warnings,
    )
