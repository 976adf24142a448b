"""The gain from the cache of keys and values: translation with and without it, in one run.

    python -m benchmarks.decoding --experts 0 16 --sentences 8 1 --out decoding.json

The encoder-decoders have random weights, so all translations end at the limit. Without the cache
every step runs the decoder over all tokens so far. Both do the same search, in turn. `same` counts
the sentences with the same translation, and `decoder_tokens` the tokens that the decoder read.
Without the cache the model also computes the logits of all positions, of which the search reads the
last. The vocabulary is small, so that this is the smaller part of the work.
"""

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import argument_parser, git_commit, hardware, versions, write_json
from magnetar.models.config import ModelConfig
from magnetar.models.decoding.beam_search import Translation, translate
from magnetar.models.transformer import EncoderDecoder, build_model

EOS = 1
MODEL: dict[str, Any] = {
    "architecture": "encoder_decoder",
    "vocab_size": 4000,
    "num_layers": 6,
    "d_model": 256,
    "d_ff": 1024,
    "num_heads": 4,
    "max_seq_len": 128,
}
BEAMS = (1, 4)


def measured(
    model: EncoderDecoder, source: torch.Tensor, beam: int, length: int, cached: bool
) -> tuple[dict[str, Any], list[Translation]]:
    """Seconds and decoder tokens of one search, and its translations."""
    counted = [0]
    hook = model.decoder.register_forward_hook(
        lambda _module, given, _output: counted.append(given[0].numel())
    )
    limits = torch.full((source.size(0),), length)
    if source.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    found = translate(model, source, None, EOS, max_len=limits, beam=beam, cached=cached)
    seconds = time.perf_counter() - begin  # the translations are on the CPU: nothing is under way
    hook.remove()
    return {"seconds": seconds, "decoder_tokens": sum(counted)}, found


def compare(
    model: EncoderDecoder, source: torch.Tensor, beam: int, length: int, repeats: int
) -> dict[str, Any]:
    """Both ways in turn, and the ratio of their fastest times, disturbed least by others."""
    times: dict[bool, list[float]] = {True: [], False: []}
    tokens: dict[bool, int] = {}
    measured(model, source, beam, 8, True)  # what is only done once: kernels are built
    for _ in range(repeats):
        answers = {}
        for cached in times:
            row, answers[cached] = measured(model, source, beam, length, cached)
            times[cached].append(row["seconds"])
            tokens[cached] = row["decoder_tokens"]
        assert {len(found.tokens) for found in answers[True]} == {length - 1}
        pairs = zip(answers[True], answers[False], strict=True)
        same = sum(one.tokens == other.tokens for one, other in pairs)
    seconds = {cached: min(values) for cached, values in times.items()}
    return {
        "beam": beam,
        "seconds_with_cache": times[True],
        "seconds_without": times[False],
        "decoder_tokens_with_cache": tokens[True],
        "decoder_tokens_without": tokens[False],
        "ratio": seconds[False] / seconds[True],
        "same": same,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argument_parser("benchmarks.decoding", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--sentences", type=int, nargs="+", default=[8], metavar="N")
    parser.add_argument("--experts", type=int, nargs="+", default=[0], metavar="N", help="0: dense")
    parser.add_argument("--source-len", type=int, default=50)
    parser.add_argument("--length", type=int, default=101, help="tokens, the end among them")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for num_experts in options.experts:
        moe = {"moe": {"num_experts": num_experts, "every": 2}} if num_experts else {}
        model = build_model(ModelConfig.model_validate(MODEL | moe), seed=0).to(device).eval()
        assert isinstance(model, EncoderDecoder)
        for sentences, beam in product(options.sentences, BEAMS):
            generator = torch.Generator().manual_seed(0)
            shape, vocab_size = (sentences, options.source_len), MODEL["vocab_size"]
            source = torch.randint(2, vocab_size, shape, generator=generator).to(device)
            row = compare(model, source, beam, options.length, options.repeats)
            rows.append({"experts": num_experts, "sentences": sentences} | row)
            print(
                f"{num_experts or 'no'} experts, batches of {sentences}, beam {beam}: "
                f"{row['ratio']:.1f} times as fast with the cache, {row['same']} the same",
                flush=True,
            )
    result = {
        "model": MODEL,
        "source_len": options.source_len,
        "length": options.length,
        "rows": rows,
        "hardware": hardware(device),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
