"""Sentences that are longer than a model's positions: split, cut short, or refused."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec

TooLong = Literal["split", "truncate", "refuse"]
SHOWN_LINES = 5

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*")
# Where a sentence is split, the best first: behind a part of one, a smaller part, a word.
_BORDERS = (
    re.compile(r"(?<=[.!?…;:])\s+|(?<=[；：])\s*"),
    re.compile(r"(?<=,)\s+|(?<=[，、])\s*"),
    re.compile(r"\s+"),
)


@dataclass(frozen=True)
class Fitted:
    """Sources that fit into the positions, and what they were.

    Attributes:
        ids: what the encoder reads.
        sentence: for each of them, whose part it is, ascending.
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
    """Ids of texts that are to become another language, none of more than max_len tokens.

    Args:
        texts: one sentence each; an empty one, or one of spaces alone, has no ids.
        codec: of the model.
        target: the language that is asked for.
        max_len: the encoder's positions, the tag's and the end's among them.
        too_long: what happens to a longer one.
        first: number of the first text, for what is said.

    Raises:
        UserError: a sentence is longer, and that is to be refused; or the language is unknown.
    """
    found = Fitted([], [], [])
    for number, text in enumerate(texts):
        text = text.strip()
        if not text:
            continue
        ids = codec.source_ids(text, target)
        parts = [ids]
        if len(ids) > max_len:
            found.too_long.append(number)
            if too_long == "refuse":
                raise UserError(
                    f"sentence {first + number + 1} has {len(ids)} tokens, and the model reads at "
                    f"most max_seq_len={max_len}: shorten it, or let it be split or truncated with "
                    "--too-long, or by data.pairs.too_long_inference of the run"
                )
            if too_long == "truncate":
                parts = [[*ids[: max_len - 1], codec.eos_id]]
            else:
                pieces = split_text(
                    text, lambda part: len(codec.source_ids(part, target)) <= max_len
                )
                # A single character of more tokens than there are positions is cut.
                parts = [codec.source_ids(piece, target) for piece in pieces]
                parts = [
                    part if len(part) <= max_len else [*part[: max_len - 1], codec.eos_id]
                    for part in parts
                ]
        found.ids.extend(parts)
        found.sentence.extend([number] * len(parts))
    return found


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text that does not fit, sentence by sentence: models have mostly learnt single ones.

    A sentence that does not fit either is halved near its middle, and so on; one character is
    never split. A full stop before a small letter ends no sentence.
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
    """One line for a person: how many sentences were too long, and what was done; "" for none."""
    if not too_long:
        return ""
    shown = ", ".join(str(number + 1) for number in too_long[:SHOWN_LINES])
    more = ", ..." if len(too_long) > SHOWN_LINES else ""
    what = {"split": "split", "truncate": "truncated", "refuse": "refused"}[done]
    return (
        f"{len(too_long):,} of {num_sentences:,} sentences were longer than the model's "
        f"{max_len} positions and have been {what}: number {shown}{more}"
    )
