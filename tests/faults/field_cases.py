"""What a user's machine does to a run: its environment, tokenizer, run folder, compressed text."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import strategies as st

from tests.faults.fuzz_cases import TRAIN, Case, preparation, raw_files, sound_config
from tests.faults.mutations import broken_jsons, damaged, drawn

ARGUMENTS = ["--deepspeed_config", "run.json"]
TOKENS = "../inputs/tokens/tokenizer.model"

# The environment

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
COUNTS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK"),
    *("CROSS_SIZE", "GROUP_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE", "SLURM_PROCID"),
    *("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_JOB_ID"),
    *("SLURM_NTASKS_PER_NODE", "MASTER_PORT", "OMP_NUM_THREADS", "MAGNETAR_NODE", "COLUMNS"),
)
WORDS = (
    *("MASTER_ADDR", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "GLOO_SOCKET_IFNAME", "LANG"),
    *("LC_ALL", "PYTHONIOENCODING", "TERM", "DS_ACCELERATOR", "DS_ENV_FILE", "HOME", "TMPDIR"),
    *("CUDA_VISIBLE_DEVICES", "NO_COLOR", "TRITON_INTERPRET", "XDG_CACHE_HOME", "NCCL_DEBUG"),
)
# Without 2 and 4, numbers of ranks of which a lonely one must wait for the others.
NUMBERS = (
    *(
        "",
        " ",
        "0",
        "1",
        "3",
        "7",
        "-1",
        "+0",
        "00",
        "1.0",
        "1e3",
        "0x1",
        "0,0",
        "1_000",
        "x",
        "None",
    ),
    *("9" * 30, "2147483648", "65536", "-0", " 0 ", "٣", "１", "0;1", "0\n1", "nan", "true"),
)
TEXTS = (
    *("", " ", "localhost", "127.0.0.1", "::1", "[::1]", "localhost:80", "no.such.host.invalid"),
    *("192.0.2.1", "256.1.1.1", "127.0.0.1,127.0.0.1", "node[1-3", "a b", "$(hostname)", "lo"),
    *("eth99", "tpu", "cpu", "C", "de_DE.ISO-8859-1", "xx_YY", "ascii", "dumb", "../sentinel.txt"),
    *("nowhere/file", "ü", "x" * 3000, "0,1,0", "-1", "a\nb"),
)


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str | None]:
    """Variables to set, or with None to remove, of a rank that the launcher or nobody started."""
    found: dict[str, str | None] = dict(draw(st.sampled_from([ALONE, ALONE, {}])))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        name = draw(st.sampled_from([*COUNTS, *COUNTS, *WORDS]))
        if draw(st.sampled_from(["change"] * 4 + ["remove"])) == "remove":
            found[draw(st.sampled_from([*ALONE, "HOME", "PATH", "LANG"]))] = None
        else:
            found[name] = draw(st.sampled_from(NUMBERS if name in COUNTS else TEXTS))
    return found


# Tokenizers

BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
LETTERS = "abcdefghijklmnopqrstuvwxyzS0123456789.ü"
END = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_jsons() -> dict[str, dict[str, Any]]:
    """A tokenizer.json of each kind of model, small and sound."""

    def of(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
        end = next(iter(model["vocab"]))
        end = end[0] if isinstance(end, list) else end
        whole: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
        whole["added_tokens"] = [{"id": 0, "content": end, **END}]
        parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder")) | parts
        return whole | parts | {"model": model}

    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    pieces = [
        "</s>",
        "[UNK]",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        "the",
        "ship",
        "##s",
    ]
    bpe: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    bpe |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}
    bpe["vocab"] = {token: i for i, token in enumerate(["<|endoftext|>", *BYTES, "th", "the"])}
    bpe["merges"] = [["t", "h"], ["th", "e"]]
    word_piece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    word_piece |= {"max_input_chars_per_word": 100, "vocab": {t: i for i, t in enumerate(pieces)}}
    unigram = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
    unigram["vocab"] = [["</s>", 0.0], ["▁", -2.0], *([letter, -3.0] for letter in LETTERS)]
    words = [
        "</s>",
        "[UNK]",
        *["the", "ship", "sails", "north", "over", "a", "blue", "sea", "with", "old", "wind", "."],
    ]
    word_level = {"type": "WordLevel", "unk_token": "[UNK]"}
    word_level["vocab"] = {word: i for i, word in enumerate(words)}
    return {
        "BPE": of(bpe, pre_tokenizer=level, decoder=level),
        "WordPiece": of(word_piece, pre_tokenizer={"type": "BertPreTokenizer"}),
        "Unigram": of(unigram, pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
        "WordLevel": of(word_level, pre_tokenizer={"type": "Whitespace"}),
    }


TOKENIZER_KEYS: dict[str, list[Any]] = {
    "normalizer": [{"type": kind} for kind in ("NFC", "NFKC", "Lowercase", "StripAccents", "Nmt")]
    + [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": "x"},
    ]
    + [{"type": "Replace", "pattern": {"String": "e"}, "content": "</s>"}],
    "pre_tokenizer": [{"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "Digits")]
    + [{"type": "Punctuation", "behavior": "Removed"}, None],
    "post_processor": [
        {"type": "BertProcessing", "sep": ["[UNK]", 0], "cls": ["[UNK]", 0]},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    ],
    "decoder": [{"type": kind} for kind in ("ByteFallback", "Fuse", "BPEDecoder")],
    "truncation": [
        {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    ],
    "padding": [
        {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
        | {"pad_id": 1, "pad_type_id": 0, "pad_token": "the"}
    ],
    "model.dropout": [0.0, 0.1, 1.0],
    "model.unk_token": ["[UNK]", "no such", None],
    "model.byte_fallback": [True, False],
    "model.unk_id": [None, 1, 999],
    "added_tokens": [
        [],
        [{"id": 5, "content": " ", **END}],
        [{"id": 10**6, "content": "far", **END}],
    ],
}


def sentencepiece_models() -> dict[str, bytes]:
    """Models of each type, with odd choices of special pieces."""
    import io

    import sentencepiece

    text = raw_files()["text.txt"].decode().split("\n")
    choices: dict[str, dict[str, Any]] = {
        "bpe": {"model_type": "bpe", "vocab_size": 120},
        "unigram": {"model_type": "unigram", "vocab_size": 120, "byte_fallback": False},
        "char": {"model_type": "char", "vocab_size": 40, "character_coverage": 0.98},
        "word": {"model_type": "word", "vocab_size": 30},
        "no end": {"model_type": "bpe", "vocab_size": 100, "eos_id": -1, "bos_id": -1},
        "bytes": {"model_type": "bpe", "vocab_size": 380, "byte_fallback": True, "pad_id": 3},
        "symbols": {"vocab_size": 120, "user_defined_symbols": ["</s>x", "the"], "unk_id": 5},
    }
    found = {}
    for name, choice in choices.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            minloglevel=9,
            num_threads=1,
            hard_vocab_limit=False,
            **choice,
        )
        found[name] = model.getvalue()
    return found


# Run folders

RUN_COMMANDS: dict[str, tuple[str, list[str]]] = {
    "resumed": (TRAIN, [*ARGUMENTS, "--set", "magnetar.training.num_steps=3"]),
    "plotted": ("magnetar.launchers.plot", ["run", "--out", "plot.png"]),
    "read": ("magnetar.launchers.generate", ["run", "--prompt", "1 the ship", "--tokens", "3"]),
    "evaluated": ("magnetar.launchers.evaluate", ["run", "--sequences", "2"]),
    "exported": ("magnetar.launchers.convert", ["export", "run", "--out", "out"]),
    "inspected": ("magnetar.launchers.convert", ["inspect", "run"]),
}
NO_RECORDS = (
    *(
        b"null",
        b"{}",
        b"[]",
        b"1",
        b'"step"',
        b"\xff\xfe",
        b"\0\0\0",
        b'{"step": "3"}',
        b"{" * 3000,
    ),
    *(
        b'{"step": 1e400, "loss": NaN}',
        b'{"step": -1}',
        b'{"step": 2, "loss": null}',
        b"[" * 90_000,
    ),
    *(b'{"step": %s, "loss": 1}' % (b"9" * 5000), b'{"step": true, "loss": []}', b'{"loss": 1}'),
    *(b'{"step": 1, "step": 2}', b'{"step": {"a": 1}, "valid_loss": "x"}', "ü".encode("utf-16")),
)
LINKS = ("nowhere", "../run/metrics.jsonl/x", "/dev/null", "..", "config.json", "metrics.jsonl")


@st.composite
def broken_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """Lines, one of which is no record, stands twice or elsewhere, or is cut."""
    lines = content.split(b"\n")
    place = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["insert"] * 5 + ["replace", "double", "cut", "swap"]))
    if how in ("insert", "replace"):
        lines[place : place + (how == "replace")] = [draw(st.sampled_from(NO_RECORDS))]
    elif how == "double":
        lines.insert(place, lines[place])
    elif how == "cut":
        lines[place] = lines[place][: len(lines[place]) // 2]
    else:
        lines[place], lines[0] = lines[0], lines[place]
    return draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n"])).join(lines)


def run_strategies(run: Path) -> dict[str, st.SearchStrategy[tuple[str, bytes | str, str]]]:
    """By file of a run: (its path, what stands there instead, a key of RUN_COMMANDS)."""
    found = {}
    commands = st.sampled_from([*RUN_COMMANDS, "resumed", "plotted"])
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(run)), path.read_bytes()
        if "tensorboard" in name or name == "lock":
            continue
        other: st.SearchStrategy[bytes | str] = damaged(content) | st.sampled_from(LINKS)
        if path.suffix == ".json":
            start = json.loads(content)
            if isinstance(start, dict):
                other |= broken_jsons(start, dict.fromkeys(start, ()), ["bf16", "step_00000002"])
        elif path.suffix == ".jsonl":
            other = broken_lines(content) | broken_lines(content) | other
        found[name] = st.tuples(st.just(name), other, commands)
    folders = ["checkpoints", *(str(p.relative_to(run)) for p in run.glob("checkpoints/*"))]
    found["a folder"] = st.tuples(st.sampled_from(folders), st.sampled_from(LINKS), commands)
    found["a partial checkpoint"] = st.tuples(
        st.sampled_from(["checkpoints/partial_step_00000003", "checkpoints/step_00000009"]),
        st.sampled_from(LINKS) | st.binary(max_size=9),
        commands,
    )
    return found


# Compressed text

# How to compress, a new decompressor of one stream, its errors, and whether zeros may follow.
CODECS: dict[str, tuple[Callable[[bytes], bytes], Callable[[], Any], type[Exception], bool]] = {
    "gz": (partial(gzip.compress, mtime=0), lambda: zlib.decompressobj(31), zlib.error, True),
    "xz": (lzma.compress, lzma.LZMADecompressor, lzma.LZMAError, True),
    "zst": (
        zstandard.ZstdCompressor(write_checksum=True).compress,
        lambda: zstandard.ZstdDecompressor().decompressobj(),
        zstandard.ZstdError,
        False,
    ),
}


def decompressed(suffix: str, content: bytes) -> bytes | None:
    """All streams one after the other, with zeros between and behind; None for anything else.

    It shares no code with data/text/corpus.py.
    """
    _, new, errors, has_padding = CODECS[suffix]
    found = b""
    while True:
        codec = new()
        try:
            found += codec.decompress(content)
        except errors:
            return None
        if not codec.eof:
            return None
        content = codec.unused_data.lstrip(b"\0") if has_padding else codec.unused_data
        if not content:
            return found


@st.composite
def compressed(draw: st.DrawFn, text: bytes, suffix: str) -> bytes:
    """Text in one or more streams, with something between or behind them, and maybe damaged."""
    compress = CODECS[suffix][0]
    lines = text.split(b"\n")
    place = draw(st.integers(1, len(lines) - 1))
    parts = [b"\n".join(lines[:place]) + b"\n", b"\n".join(lines[place:])]
    empty = [b""] if draw(st.booleans()) else []
    streams = [compress(part) for part in draw(st.sampled_from([[text], parts, parts + empty]))]
    between = draw(st.sampled_from([b"", b"", bytes(1), bytes(4), bytes(16)]))
    whole = between.join(streams)
    behind = [b"", b"", b"", between, b"x", streams[0][:9], bytes(3), streams[-1]]
    whole += draw(st.sampled_from(behind))
    return whole if draw(st.booleans()) else draw(damaged(whole, [text, b"PK\x03\x04" + text]))


def field_cases(number: int, seed: int, world: Path) -> list[Case]:
    """Cases of each of the four kinds in turn."""
    quarter, config = -(-number // 4), sound_config()
    environment = [
        Case("the environment", TRAIN, ARGUMENTS, {"run.json": config}, environment=variables)
        for _, variables in drawn({"environment": environments()}, quarter, seed)
    ]
    tokenizers = []
    for kind, value in drawn(_tokenizers(), quarter, seed):
        name = "tokenizer.json" if kind in tokenizer_jsons() else "foreign.model"
        tokenizers.append(_tokenized(kind, {f"tok/{name}": value}, f"tok/{name}"))
    base, runs = world / "base" / "run", []
    sound = {f"run/{p.relative_to(base)}": p.read_bytes() for p in base.rglob("*") if p.is_file()}
    for kind, (name, value, command) in drawn(run_strategies(base), quarter, seed):
        files = {k: v for k, v in sound.items() if not f"{k}/".startswith(f"run/{name}/")}
        files |= {"run.json": config, f"run/{name}": value}
        runs.append(Case(f"run: {kind}", *RUN_COMMANDS[command], files))
    texts = {f"text.txt.{suffix}": compressed(raw_files()["text.txt"], suffix) for suffix in CODECS}
    streams = []
    for name, value in drawn(texts, quarter, seed):
        whole = decompressed(name.rpartition(".")[2], value)
        documents = sum(map(bool, map(bytes.strip, whole.split(b"\n")))) if whole else 0
        case = _tokenized(name, {f"raw/{name}": value}, TOKENS, f"raw/{name}")
        streams.append(case._replace(documents=documents))
    return list(chain(*zip(environment, tokenizers, runs, streams, strict=True)))


def _tokenizers() -> dict[str, st.SearchStrategy[bytes]]:
    words = [
        "BPE",
        "WordPiece",
        "Unigram",
        "Replace",
        "Sequence",
        "Split",
        "Metaspace",
        "</s>",
        "the",
    ]
    found: dict[str, st.SearchStrategy[bytes]] = {}
    for name, start in tokenizer_jsons().items():
        found[name] = broken_jsons(start, TOKENIZER_KEYS, words)
    for name, model in sentencepiece_models().items():
        found[f"SentencePiece, {name}"] = st.just(model) | damaged(model) | damaged(model)
    return found


def _tokenized(
    kind: str, files: Mapping[str, bytes], tokenizer: str, text: str = "../inputs/raw/text.txt"
) -> Case:
    module, _ = preparation("text.txt")
    words: Sequence[str] = ["--train", text, "--documents", "line", "--valid-fraction", "0.2"]
    arguments = [*words, "--workers", "1", "--out", "out", "--tokenizer", tokenizer]
    return Case(kind, module, arguments, dict(files))
