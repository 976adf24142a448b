"""Lines through a translation model, window by window."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.open_run import SavedModel
from magnetar.engine.translation.long_sentences import TooLong, fit, told
from magnetar.engine.translation.translate import Decoding, joined, one_line, translate_ids

PARTS = 1 << 32  # more lines than there are: part p of line n draws as n + p * PARTS


class Translator:
    """Translates lines, one window after the other.

    Attributes:
        num_done: number of lines so far.
        too_long: numbers, from 0, of the lines that did not fit.
    """

    def __init__(
        self, run: SavedModel, decoding: Decoding, target: str, too_long: TooLong | None = None
    ) -> None:
        """Nothing is done yet.

        Args:
            run: the model and its codec.
            decoding: how translations are found.
            target: the language to translate into.
            too_long: what happens to long sentences; None: what the run's config says, or split.
        """
        self.run, self.target, self.decoding = run, target, decoding
        self.how: TooLong = too_long or "split"
        if too_long is None and run.run_config is not None and run.run_config.data.pairs:
            self.how = run.run_config.data.pairs.too_long_inference
        self.num_done, self.too_long = 0, list[int]()

    def lines(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """A line for each of the next texts, "" for one that is empty."""
        model, codec, first = self.run.translator, self.run.codec, self.num_done
        fitted = fit(texts, codec, self.target, model.encoder.max_len, self.how, first)
        parts: list[list[str]] = [[] for _ in texts]
        # A line's draws depend on its number in all of the input, and on no window.
        seen = Counter[int]()
        ids = []
        for number in fitted.sentence:
            ids.append(first + number + PARTS * seen[number])
            seen[number] += 1
        found = translate_ids(model, codec, fitted.ids, self.decoding, progress, ids)
        if not all(math.isfinite(translation.score) for translation in found):
            raise UserError("the model's logits are NaN or infinite: use an earlier checkpoint")
        for number, translation in zip(fitted.sentence, found, strict=True):
            parts[number].append(one_line(codec.decode(translation.tokens)))
        self.num_done += len(texts)
        self.too_long += [first + number for number in fitted.too_long]
        return [joined(of_text, self.target) for of_text in parts]

    def told(self) -> str:
        """The sentence about long lines that a user should read, or ""."""
        return told(self.too_long, self.num_done, self.run.translator.encoder.max_len, self.how)
