"""Translation scores as a person reads them: tables, signatures, the sample in words."""

import statistics
from collections.abc import Callable, Mapping

from rich.table import Table

from magnetar.engine.report.progress import table
from magnetar.engine.translation.translate import DirectionScore, TranslationScores

# Up to so many directions have a line each; a matrix is easier to read beyond that.
LISTED_DIRECTIONS = 12


def sample_words(max_sentences: int | None) -> str:
    """The validation sentences that a score covers, in words."""
    many = "all sentences" if max_sentences is None else f"the first {max_sentences:,} sentences"
    return f"{many} of each direction"


def translation_tables(title: str, scores: TranslationScores) -> list[Table]:
    """One table with a line for each direction or, for many, matrices of BLEU and chrF."""
    directions = scores.directions
    if len(directions) <= LISTED_DIRECTIONS:
        rows = [
            [f"{source} -> {target}", f"{s.bleu:.1f}", f"{s.chrf:.1f}", f"{s.num_sentences:,}"]
            for (source, target), s in directions.items()
        ]
        if len(directions) > 1:
            total = sum(score.num_sentences for score in directions.values())
            rows.append(["mean", f"{scores.bleu:.1f}", f"{scores.chrf:.1f}", f"{total:,}"])
        return [table(title, ["", "BLEU", "chrF", "sentences"], rows)]
    return [
        _matrix(f"{title}: {name}, from (line) to (column)", directions, value)
        for name, value in (("BLEU", lambda s: s.bleu), ("chrF", lambda s: s.chrf))
    ]


def _matrix(
    title: str,
    directions: Mapping[tuple[str, str], DirectionScore],
    value: Callable[[DirectionScore], float],
) -> Table:
    order = dict.fromkeys([source for source, _ in directions] + [t for _, t in directions])
    sources, targets = (
        [language for language in order if language in {pair[side] for pair in directions}]
        for side in (0, 1)
    )

    def mean(source: str | None, target: str | None) -> str:
        chosen = [
            value(score)
            for (one, other), score in directions.items()
            if source in (None, one) and target in (None, other)
        ]
        return f"{statistics.fmean(chosen):.1f}" if chosen else ""

    rows = [
        [source or "mean", *(mean(source, target) for target in targets), mean(source, None)]
        for source in [*sources, None]
    ]
    return table(title, ["", *targets, "mean"], rows)


def signature_lines(scores: TranslationScores) -> list[str]:
    """Lines with sacrebleu's signatures, and one with the settings of the search."""
    decoding = scores.decoding
    lines = [f"BLEU  {signature}" for signature in scores.bleu_signatures.values()]
    lines.append(f"chrF  {scores.chrf_signature}")
    how = f"beam {decoding.beam}, length penalty {decoding.length_penalty:g}"
    if scores.num_truncated:
        how += f"; sources cut to the model's positions: {scores.num_truncated:,}"
    return [*lines, how]
