"""The benchmark of the cache of keys and values."""

import json
from pathlib import Path

from benchmarks import decoding


def test_both_ways_translate_alike_and_the_cache_spares_the_decoder(
    tmp_path: Path,
) -> None:
    out = tmp_path / "decoding.json"
    sizes = ["--source-len", "6", "--length", "5", "--repeats", "1", "--sentences", "2", "1"]
    decoding.main([*sizes, "--experts", "0", "4", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["experts"], row["sentences"], row["beam"]) for row in rows] == [
        (experts, sentences, beam) for experts in (0, 4) for sentences in (2, 1) for beam in (1, 4)
    ]
    for row in rows:
        assert row["same"] == row["sentences"]
        # The first step is of one hypothesis a sentence, and the last token is not read again.
        steps = 1 + row["beam"] * 4
        assert row["decoder_tokens_with_cache"] == row["sentences"] * steps
        assert row["decoder_tokens_without"] == row["sentences"] * (
            1 + row["beam"] * sum(range(2, 6))
        )
