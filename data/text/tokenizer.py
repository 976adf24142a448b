"""Text to token ids and back: SentencePiece models and Hugging Face `tokenizers` vocabularies."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import sentencepiece
import tokenizers

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError

TokenizerFile = Literal["tokenizer.model", "tokenizer.json"]
EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
GPT2_FILES = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
SENTENCEPIECE_SPACE = "\u2581"

# The trainer sums its expected counts per thread, so the number of threads is part of the result.
TRAINER_THREADS = 4
MAX_LINE_CHARS = 1000


class Tokenizer(Protocol):
    """One vocabulary. Decoding what was encoded gives the text back."""

    vocab_size: int  # ids run from 0 to vocab_size - 1
    eos_id: int  # ends a document; encode never returns it
    file_name: TokenizerFile  # what the vocabulary is called in a prepared folder
    file_content: bytes  # the vocabulary as it is stored there
    fingerprint: str  # sha256 of file_content, in hexadecimal

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end of document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; the end of a document reads as nothing."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece `.model`."""

    file_name: TokenizerFile = "tokenizer.model"

    def __init__(self, content: bytes):
        self.file_content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError("it has no end-of-sentence piece")
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
        """Ids of a text, without the end of document."""
        if not self._mark_ids or SENTENCEPIECE_SPACE not in text:
            return self._processor.encode(text)
        first, *others = text.split(SENTENCEPIECE_SPACE)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; the end of a document reads as nothing."""
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face's `tokenizers`; GPT-2's pair of files becomes one."""

    file_name: TokenizerFile = "tokenizer.json"

    def __init__(self, content: bytes):
        self.file_content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that merely spells "<|endoftext|>" must not end a document.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        eos_tokens = [token for token in EOS_TOKENS if token in vocabulary]
        if not eos_tokens:
            raise ValueError(f"it has no end-of-document token; one of {', '.join(EOS_TOKENS)}")
        self.eos_id = vocabulary[eos_tokens[0]]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end of document."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; the end of a document reads as nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


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
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(file.read_bytes())
        for vocabulary, merges in GPT2_FILES:
            if file.name == vocabulary:
                return HuggingFaceTokenizer(_gpt2_json(file, file.with_name(merges)))
        return HuggingFaceTokenizer(file.read_bytes())
    except Exception as error:  # both libraries raise bare RuntimeError and Exception
        raise UserError(
            f"{file} is not a vocabulary that can be used here: {error}. Give another --tokenizer, "
            "or train one with --vocab-size"
        ) from error


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
    model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    tokenizer = tokenizers.Tokenizer(model)
    eos = EOS_TOKENS[0]
    if tokenizer.token_to_id(eos) is None:
        raise ValueError(f"it has no {eos}")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([eos])
    return tokenizer.to_str().encode()


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
