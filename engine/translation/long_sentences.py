"""Sentences that are longer than a model's positions are split, truncated or refused."""

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec

TooLong = Literal["split", "truncate", "refuse"]
SHOWN_LINES = 5

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*")
# Places to split a sentence, the best first: after a clause, after a comma, after a word.
_BORDERS = (
    re.compile(r"(?<=[.!?…;:])\s+|(?<=[；：])\s*"),
    re.compile(r"(?<=,)\s+|(?<=[，、])\s*"),
    re.compile(r"\s+"),
)


class Fitted(NamedTuple):
    """Sources that fit into the positions, and the sentences that they come from.

    Attributes:
        ids: token ids of each source.
        sentence: number of the sentence that each source is a part of, ascending.
        too_long: numbers of the sentences that did not fit, from 0.
    """

    ids: list[list[int]]
    sentence: list[int]
    too_long: list[int]


def fit(
    texts: Sequence[str],
    codec: Codec,
    target: str,
    max_len: int,
    too_long: TooLong,
    first: int = 0,
) -> Fitted:
    """Token ids of texts that are to be translated, none of more than max_len tokens.

    Args:
        texts: one sentence each; one that is empty, or has no token of its own, has no ids.
        codec: the model's vocabulary.
        target: target language.
        max_len: positions of the encoder, with those of the tag and the end.
        too_long: treatment of a longer sentence.
        first: number of the first text in messages.

    Raises:
        UserError: a sentence is longer and is to be refused, or the language is unknown.
    """
    found, nothing = Fitted([], [], []), codec.source_ids("", target)
    for number, text in enumerate(texts):
        text = text.strip()
        if not text:
            continue
        ids = codec.source_ids(text, target)
        if ids == nothing:  # the vocabulary drops all of its characters
            continue
        parts = [ids]
        if len(ids) > max_len:
            found.too_long.append(number)
            if too_long == "refuse":
                raise UserError(
                    f"sentence {first + number + 1} has {len(ids)} tokens, and the model reads at "
                    f"most max_seq_len={max_len}: shorten it, or let it be split or truncated with "
                    "--too-long, or by data.pairs.too_long_inference of the run"
                )
            if too_long == "split":
                pieces = split_text(
                    text, lambda part: len(codec.source_ids(part, target)) <= max_len
                )
                parts = [codec.source_ids(piece, target) for piece in pieces]
            # A single character, too, can have more tokens than there are positions.
            parts = [
                part if len(part) <= max_len else [*part[: max_len - 1], codec.eos_id]
                for part in parts
            ]
        found.ids.extend(parts)
        found.sentence.extend([number] * len(parts))
    return found


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The sentences of a text that does not fit, since models have mostly learnt single ones.

    A sentence that does not fit is halved near its middle until its parts do. A single character
    is never split. A full stop before a small letter does not end a sentence.
    """
    if fits(text):
        return [text]
    ends = [
        end for end in _SENTENCE_END.finditer(text) if not text[end.end() : end.end() + 1].islower()
    ]
    starts = [0, *(end.end() for end in ends)]
    stops = [*(end.start() for end in ends), len(text)]
    sentences = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return [part for sentence in sentences if sentence for part in _halved(sentence, fits)]


def _halved(text: str, fits: Callable[[str], bool]) -> list[str]:
    if fits(text) or len(text) < 2:
        return [text]
    middle = len(text) / 2
    for border in _BORDERS:
        cuts = [cut for cut in border.finditer(text) if cut.start() > 0 and cut.end() < len(text)]
        if cuts:
            cut = min(cuts, key=lambda cut: abs((cut.start() + cut.end()) / 2 - middle))
            first, second = text[: cut.start()], text[cut.end() :]
            break
    else:
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
    return [*_halved(first, fits), *_halved(second, fits)]


def told(too_long: Sequence[int], num_sentences: int, max_len: int, done: TooLong) -> str:
    """A line about the sentences that were too long and what was done with them; "" for none."""
    if not too_long:
        return ""
    shown = ", ".join(str(number + 1) for number in too_long[:SHOWN_LINES])
    more = ", ..." if len(too_long) > SHOWN_LINES else ""
    what = {"split": "split", "truncate": "truncated", "refuse": "refused"}[done]
    return (
        f"{len(too_long):,} of {num_sentences:,} sentences were longer than the model's "
        f"{max_len} positions and have been {what}: number {shown}{more}"
    )
