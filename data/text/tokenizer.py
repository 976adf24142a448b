"""Text to token ids and back: SentencePiece models and Hugging Face `tokenizers` vocabularies."""

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError
from magnetar.data.text.lines import lines_of

TokenizerFile = Literal["tokenizer.model", "tokenizer.json"]
EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
GPT2_FILES = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
SENTENCEPIECE_SPACE = "\u2581"
# A vocabulary that gives it back can spell everything, in bytes.
PROBE = "  A\u0301b \ufb01\tc\u00e9\r\n\n\u6f22\U0001f642 \x00 .\n"

# The trainer sums its expected counts per thread, so the number of threads is part of the result.
TRAINER_THREADS = 4
MAX_LINE_CHARS = 1000


class Tokenizer(ABC):
    """One vocabulary. Decoding what was encoded gives the text back, but for `unspelt` letters.

    Attributes:
        file_name: name of the vocabulary in a prepared folder.
        path: the file or folder that it was read from.
        file_content: the vocabulary as it is stored.
        fingerprint: sha256 of file_content, in hexadecimal.
        vocab_size: number of ids, which run from 0 to vocab_size - 1.
        eos_id: id that ends a document; encode never returns it.
        eos_token: its piece.
    """

    file_name: TokenizerFile
    vocab_size: int
    eos_id: int
    eos_token: str

    def __init__(self, content: bytes, path: Path):
        self.path = path
        self.file_content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end of document.

        Raises:
            UserError: if the vocabulary cannot encode the text.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; the end of a document reads as nothing."""

    @abstractmethod
    def unspelt(self, text: str, ids: Sequence[int]) -> str:
        """The letters of a text that `encode`, which gave `ids`, left out or made unknown."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    file_name: TokenizerFile = "tokenizer.model"

    def __init__(self, content: bytes, path: Path):
        super().__init__(content, path)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError("it has no end-of-sentence piece")
        self.eos_token = self._processor.id_to_piece(self.eos_id)
        self._unknown = self._processor.unk_id()
        self._is_unknown = cache(lambda letter: self._unknown in self._processor.encode(letter))
        # SentencePiece writes a space as U+2581 and so reads a true U+2581 as a space. With byte
        # pieces that character can be spelt in bytes instead, unless the model prefixes each
        # part with a space: one try tells.
        self._mark_ids: list[int] = []
        mark_bytes = [f"<0x{byte:02X}>" for byte in SENTENCEPIECE_SPACE.encode()]
        mark_ids = [self._processor.piece_to_id(piece) for piece in mark_bytes]
        if all(self._processor.is_byte(i) for i in mark_ids):
            probe = self._processor.encode("a")
            if self._processor.decode([*probe, *mark_ids, *probe]) == f"a{SENTENCEPIECE_SPACE}a":
                self._mark_ids = mark_ids

    def encode(self, text: str) -> list[int]:
        """U+2581 is spelt in bytes, if possible."""
        if not self._mark_ids or SENTENCEPIECE_SPACE not in text:
            return self._processor.encode(text)
        first, *others = text.split(SENTENCEPIECE_SPACE)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """SentencePiece reads control pieces as nothing."""
        return self._processor.decode([int(i) for i in ids])

    def unspelt(self, text: str, ids: Sequence[int]) -> str:
        """The letters that are unknown by themselves, if anything was."""
        return "".join(filter(self._is_unknown, text)) if self._unknown in ids else ""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`; GPT-2's pair of files becomes one."""

    file_name: TokenizerFile = "tokenizer.json"

    def __init__(self, content: bytes, path: Path):
        super().__init__(content, path)
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        eos_tokens = [token for token in EOS_TOKENS if token in vocabulary]
        if not eos_tokens:
            raise ValueError(f"it has no end-of-document token; one of {', '.join(EOS_TOKENS)}")
        self.eos_token = eos_tokens[0]
        self.eos_id = vocabulary[self.eos_token]
        exact = _exact_settings(json.loads(self._tokenizer.to_str()), self.eos_token)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(exact))
        # Text that merely spells "<|endoftext|>" must not end a document.
        self._tokenizer.encode_special_tokens = True
        model = exact["model"]
        unknown = model.get("unk_token")
        self._unknown = model.get("unk_id") if unknown is None else vocabulary.get(unknown)
        self._is_left_out = cache(lambda letter: not self._encoded(letter).ids)
        self._is_exact = self._eats_blank = False
        with suppress(UserError):
            self._eats_blank = self.decode(self._encoded(" a").ids) == "a"
            self._is_exact = self.decode(self.encode(PROBE)) == PROBE

    def encode(self, text: str) -> list[int]:
        """A piece of the model that spells the end of document is cut in two."""
        if self._eats_blank and text.startswith(" "):
            text = " " + text
        ids = [i for _, found in self._parts(text) for i in found.ids]
        if self.eos_id in ids:
            raise UserError(
                f"{self.path} makes the end of a document of text that only spells it: give "
                "another --tokenizer, or train one with --vocab-size"
            )
        return ids

    def _parts(self, text: str) -> list[tuple[str, tokenizers.Encoding]]:
        """A text and its tokens, cut within every piece that is the end of document."""
        found = self._encoded(text)
        if self.eos_id not in found.ids:
            return [(text, found)]
        cuts = [start + 1 for i, (start, _) in _spans(found) if i == self.eos_id]
        parts = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
        return [(part, self._encoded(part)) for part in parts]

    def _encoded(self, text: str) -> tokenizers.Encoding:
        with _refused(f"{self.path} cannot encode the text"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Other special tokens are read: text may have spelt them."""
        kept = [int(i) for i in ids if i != self.eos_id]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def unspelt(self, text: str, ids: Sequence[int]) -> str:
        """The letters in no token or in an unknown one, if the text does not come back."""
        if self._is_exact or self.decode(ids) == text:
            return ""
        if self._unknown is None:  # letters are left out, and the places of tokens are wrong then
            return "".join(filter(self._is_left_out, text))
        lost = ""
        for part, found in self._parts(text):
            spelt = set[int]()
            for i, place in _spans(found):
                if i != self._unknown:
                    spelt.update(range(*place))
            lost += "".join(letter for at, letter in enumerate(part) if at not in spelt)
        return lost


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Make a message of whatever the libraries raise: bare exceptions, and panics, which are none.

    Raises:
        UserError: if something is raised.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(
            f"{what}: {error}. Give another --tokenizer, or train one with --vocab-size"
        ) from error


def _spans(encoding: tokenizers.Encoding) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each id and its first and last place in the text."""
    return zip(encoding.ids, encoding.offsets, strict=True)


def _exact_settings(settings: dict[str, Any], eos: str) -> dict[str, Any]:
    """The settings of a tokenizer.json without what is random or loses text.

    The end of document is a special token, which text cannot spell; a unigram model chooses its
    piece last.
    """
    model, decoder, normalizer = (settings[key] or {} for key in ("model", "decoder", "normalizer"))
    for key in ("dropout", "alpha", "nbest_size"):  # of sampling
        model.pop(key, None)
    if model["type"] == "Unigram":
        model["vocab"] = [[piece, -1e6 if piece == eos else p] for piece, p in model["vocab"]]
    for token in settings["added_tokens"]:
        token |= {"lstrip": False, "rstrip": False}
        token["special"] |= token["content"] == eos
    if "cleanup" in decoder:
        decoder["cleanup"] = False
    pre_tokenizer = settings["pre_tokenizer"] or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("add_prefix_space"):
            step["add_prefix_space"] = False
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kept = [step for step in steps if _is_exact_step(step)]
    settings["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return settings | {"truncation": None, "padding": None}


def _is_exact_step(step: dict[str, Any]) -> bool:
    """Whether a normalizer only writes blanks in another way, as decoders undo it."""
    if step["type"] == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == SENTENCEPIECE_SPACE
    return step["type"] in ("Prepend", "ByteLevel")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file or a folder.

    Args:
        path: a SentencePiece `.model`, a `tokenizer.json`, or a folder that holds
            `tokenizer.model`, `tokenizer.json`, or GPT-2's pair (`vocab.json` and `merges.txt`, or
            `encoder.json` and `vocab.bpe`). The first file of a pair stands for both.

    Raises:
        UserError: if the file is missing or damaged, or has no end-of-document token.
    """
    file = _vocabulary_file(path)
    with _refused(f"{file} is not a vocabulary that can be used here"):
        if file.suffix == ".model":
            return SentencePieceTokenizer(file.read_bytes(), file)
        if merges := dict(GPT2_FILES).get(file.name):
            return HuggingFaceTokenizer(_gpt2_json(file, file.with_name(merges)), file)
        return HuggingFaceTokenizer(file.read_bytes(), file)


def trained_before(file: Path) -> Tokenizer | None:
    """The tokenizer that an interrupted run has trained; None if it is missing or damaged."""
    try:
        return load_tokenizer(file)
    except UserError:
        return None


def _vocabulary_file(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"tokenizer {path} does not exist: give a SentencePiece .model, a tokenizer.json, or a "
            "folder with GPT-2's vocab.json and merges.txt"
        )
    names = ["tokenizer.model", "tokenizer.json", *(vocabulary for vocabulary, _ in GPT2_FILES)]
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"tokenizer folder {path} holds none of {', '.join(names)}: add one")
        path = found[0]
    elif path.suffix not in (".model", ".json"):
        raise UserError(
            f"tokenizer {path} has the suffix {path.suffix!r}: give a .model or .json file, or the "
            "folder of a GPT-2 pair"
        )
    return path


def _gpt2_json(vocabulary: Path, merges: Path) -> bytes:
    """GPT-2's two files as the content of one tokenizer.json."""
    if not merges.exists():
        raise FileNotFoundError(f"{merges.name} must lie beside it")
    ids = json.loads(vocabulary.read_text(encoding="utf-8-sig"))
    model = tokenizers.models.BPE(ids, [*_merged_pairs(merges, ids)])
    tokenizer = tokenizers.Tokenizer(model)
    eos = EOS_TOKENS[0]
    if tokenizer.token_to_id(eos) is None:
        raise ValueError(f"it has no {eos}")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([eos])
    return tokenizer.to_str().encode()


def _merged_pairs(merges: Path, ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of a merges file; its first line may say a version, and blank lines are nothing."""
    with merges.open("rb") as lines:
        for number, line in enumerate(lines_of(str(merges), lines), start=1):
            if not line.strip() or (number == 1 and line.startswith("#version")):
                continue
            pair = line.split(" ")
            absent = [piece for piece in (*pair, "".join(pair)) if piece and piece not in ids]
            if len(pair) != 2 or "" in pair or absent:
                problem = f"the vocabulary beside it lacks {absent[0]!r}" if absent else ""
                raise UserError(
                    f"{merges}, line {number}, {line!r} must be two pieces with a blank between "
                    f"them{problem and f', but {problem}'}: copy both files again, from one place"
                )
            yield pair[0], pair[1]


def sample_chars(vocab_size: int) -> int:
    """The largest number of characters that a vocabulary of this size learns from."""
    return min(max(2048 * vocab_size, 8 << 20), 64 << 20)


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out_model: Path,
    max_chars: int | None = None,
    symbols: Sequence[str] = (),
) -> None:
    """Train a SentencePiece vocabulary (unigram, byte fallback) and write it to `out_model`.

    The same texts give the same file: nothing is drawn at random. Memory is bounded by the sample.

    Args:
        texts: any amount of text; lines are sampled evenly from all of it.
        vocab_size: number of entries, among them 256 bytes, the newline, the unknown and the end of
            document.
        out_model: the file to write; it appears only when complete.
        max_chars: largest number of characters to learn from. None: that of `sample_chars`.
        symbols: strings that are always a piece of their own.

    Raises:
        UserError: if the text is empty, or too little or too varied for this vocabulary.
    """
    limit = max_chars or sample_chars(vocab_size)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(evenly_sampled(_lines(texts), limit)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",  # as good as BPE here, and it encodes five times as fast
            # Decoding gives the text back thanks to these five:
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n", *symbols],
            allow_whitespace_only_pieces=True,  # indentation in one token
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_trainer_message(str(error), vocab_size)) from error
    write_atomically(out_model, model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARS):
                yield line[start : start + MAX_LINE_CHARS]


def evenly_sampled(lines: Iterable[str], max_chars: int) -> list[str]:
    """Every line, or every 2nd, 4th, 8th ...: the densest choice of at most `max_chars`."""
    kept: list[str] = []
    num_chars, stride = 0, 1
    for index, line in enumerate(lines):
        if index % stride:
            continue
        kept.append(line)
        num_chars += len(line)
        while num_chars > max_chars and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            num_chars = sum(map(len, kept))
    return kept


def _trainer_message(error: str, vocab_size: int) -> str:
    if match := re.search(r"value <= (\d+)", error):
        way_out = f"too large for this text: use at most {match[1]}, or more text"
    elif match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        way_out = f"too small for the characters of this text: use more than {match[1]}"
    elif "sentences_.empty()" in error:
        way_out = "impossible without text: the training documents hold only empty lines"
    else:
        way_out = f"refused by SentencePiece: {error}"
    return f"vocab_size={vocab_size} is {way_out}"
