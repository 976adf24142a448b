"""Makes a prepared folder: trains or copies the vocabulary, tokenises, joins.

One process reads the text and cuts it into shards; workers tokenise shards; the parent joins them
in order.

Everything is written to `OUT.partial`, which becomes `OUT` when it is complete. A run that was
stopped is started again with the same command: it keeps the vocabulary and every finished shard.

Memory, for input of any size: one piece of text (see data.corpus), two shards a worker (each of
data.shards.SHARD_CHARS characters), and the sample that the vocabulary learns from. Disk: twice
the token files until the end.
"""

import errno
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.corpus import Documents, Piece, matching_files, read_pieces, sotu_files
from data.errors import UserError
from data.shards import join, tokenise, write_atomically
from data.token_files import (
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    open_prepared,
    token_dtype,
)
from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

DEFAULT_VALID_FRACTION = 0.01
HASHED_WHOLE_BYTES = 256 << 20  # larger sources are recognised by size and time of change


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare. Give `corpus` or `train`, and `vocab_size` or `tokenizer`."""

    out: Path  # the folder to make
    corpus: str | None = None  # "sotu"
    train: tuple[str, ...] = ()  # globs
    valid: tuple[str, ...] = ()  # globs; excludes valid_fraction
    valid_fraction: float | None = None  # of the documents of `train`, in (0, 1)
    vocab_size: int | None = None  # train a SentencePiece vocabulary of so many entries
    tokenizer: Path | None = None  # see data.tokenizer.load_tokenizer
    documents: Documents = "file"  # see data.corpus.read_pieces
    text_key: str = "text"  # see data.corpus.read_pieces
    seed: int = 0  # of the choice of validation documents
    workers: int = 1  # processes that tokenise


class Reporter(NamedTuple):
    """How `prepare` speaks to whoever called it."""

    message: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done_bytes, all_bytes: None


SILENT = Reporter()


@dataclass(frozen=True)
class Sources:
    """The files of a run; `valid` is empty when a fraction of `train` is taken."""

    train: list[Path]
    valid: list[Path]

    def num_bytes(self) -> int:
        """Bytes as stored."""
        return sum(path.stat().st_size for path in self.train + self.valid)


def prepare(config: PrepareConfig, reporter: Reporter = SILENT) -> Manifest:
    """The manifest of the folder `config.out`, made now unless it is already up to date.

    Raises:
        UserError: contradictory settings, unusable text, a full disk, or a folder `config.out`
            that was made from something else.
    """
    _check(config)
    sources = _sources(config)
    settings = _settings(config, sources)
    if config.out.exists():
        _refuse_other(config.out, settings)
        _remove_scaffolding(config.out)
        reporter.message(f"{config.out} is up to date")
        return open_prepared(config.out).manifest
    partial = config.out.with_name(config.out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "lock").open("w") as lock:
            _lock(lock, partial)
            _keep_or_clear(partial, settings, reporter)
            tokenizer = _vocabulary(config, sources, partial, reporter)
            pieces = _split_pieces(config, sources, "tokenising", reporter)
            stems, num_kept = tokenise(
                pieces, partial / tokenizer.file_name, partial / "shards", config.workers
            )
            if num_kept:
                reporter.message(f"kept {num_kept} finished shards")
            manifest = Manifest(
                tokenizer_file=tokenizer.file_name,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                dtype=token_dtype(tokenizer.vocab_size),
                splits={split: join(stems[split], partial / f"{split}.bin") for split in SPLITS},
                settings=settings,
            )
            write_atomically(partial / "manifest.json", manifest.model_dump_json(indent=2))
            partial.rename(config.out)
        _remove_scaffolding(config.out)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker was killed, probably for lack of memory, with workers={config.workers}: run "
            f"the same command with fewer --workers; {partial} keeps what was done"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"cannot write {error.filename or partial}: {error.strerror or error}: "
            f"{'free some space' if full else 'mend that'} and run the same command again; "
            f"{partial} keeps what was done"
        ) from error
    return manifest


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
    if (config.vocab_size is None) == (config.tokenizer is None):
        raise UserError(
            "give either --vocab-size N, to train a vocabulary, or --tokenizer PATH, to use one"
        )
    if config.vocab_size is not None and config.vocab_size < 300:
        raise UserError(
            f"vocab_size={config.vocab_size} is too small: 256 byte pieces and the text's own "
            "characters must fit; use 300 at least, 2000 for a small corpus"
        )
    if config.workers < 1:
        raise UserError(f"workers={config.workers} must be at least 1")


def _sources(config: PrepareConfig) -> Sources:
    if config.corpus:
        return Sources(*sotu_files())
    sources = Sources(matching_files(config.train), matching_files(config.valid))
    both = {path.resolve() for path in sources.train} & {path.resolve() for path in sources.valid}
    if both:
        raise UserError(
            f"{min(both)} is matched by --train and by --valid: what is validated must not be "
            "trained on; narrow one of the globs"
        )
    return sources


def _settings(config: PrepareConfig, sources: Sources) -> dict[str, Any]:
    """All that determines the result, as JSON: what a later run is compared with."""
    fraction = config.valid_fraction
    if not config.valid and not config.corpus and fraction is None:
        fraction = DEFAULT_VALID_FRACTION
    tokenizer = load_tokenizer(config.tokenizer).fingerprint if config.tokenizer else None
    return {
        "version": FORMAT_VERSION,
        "corpus": config.corpus,
        "train": [*config.train],
        "valid": [*config.valid],
        "train_files": _digest(sources.train),
        "valid_files": _digest(sources.valid),
        "valid_fraction": fraction,
        "vocab_size": config.vocab_size,
        "tokenizer": tokenizer,
        "documents": config.documents,
        "text_key": config.text_key,
        "seed": config.seed,
    }


def _digest(files: list[Path]) -> dict[str, Any]:
    """Number of files, their bytes, and a checksum of names and contents."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        if stat.st_size <= HASHED_WHOLE_BYTES:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            content = str(stat.st_mtime_ns)
        digest.update(json.dumps([path.name, stat.st_size, content]).encode())
    num_bytes = sum(path.stat().st_size for path in files)
    return {"num_files": len(files), "num_bytes": num_bytes, "sha256": digest.hexdigest()}


def _refuse_other(out: Path, settings: dict[str, Any]) -> None:
    """Raises unless `out` was made from these settings."""
    if not (out / "manifest.json").is_file():
        raise UserError(f"{out} exists and is not a prepared folder: choose another --out")
    made_from = open_prepared(out).manifest.settings
    key = _first_difference(made_from, settings)
    if key is not None:
        raise UserError(
            f"{out} was made with {key}={_short(made_from.get(key))}, not {_short(settings[key])}: "
            "choose another --out, or delete it first"
        )


def _first_difference(made_from: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The first setting that differs; the same files may be named by other globs."""
    keys = [key for key in settings if key not in ("train", "valid")]
    return next((key for key in keys if made_from.get(key) != settings[key]), None)


def _short(value: Any) -> str:
    """A setting for a message."""
    if isinstance(value, dict):
        files, size, digest = value["num_files"], value["num_bytes"], value["sha256"]
        return f"({files} files, {size} bytes, sha256 {digest[:12]})"
    return repr(value)


def _remove_scaffolding(out: Path) -> None:
    """Removes what only an unfinished folder needs; a kill in here costs nothing but disk."""
    shutil.rmtree(out / "shards", ignore_errors=True)
    for name in ("settings.json", "lock"):
        (out / name).unlink(missing_ok=True)


def _lock(lock: IO[str], partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is writing {partial}: wait for it, or choose another --out"
        ) from error


def _keep_or_clear(partial: Path, settings: dict[str, Any], reporter: Reporter) -> None:
    """Leaves `partial` with the finished work of the same settings, or with none."""
    file = partial / "settings.json"
    others = [path for path in partial.iterdir() if path.name not in ("lock", "settings.json.tmp")]
    if file.is_file() and _first_difference(json.loads(file.read_text()), settings) is None:
        reporter.message(f"resuming {partial}")
        (partial / "shards").mkdir(exist_ok=True)
        return
    if others and not file.is_file():
        raise UserError(f"{partial} is not ours to clear: move it away, or choose another --out")
    if others:
        reporter.message(f"{partial} was begun with other settings: starting over")
    # The settings go last, so that a kill in here leaves a folder that is known to be ours.
    for path in sorted(others, key=lambda path: path == file):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_atomically(file, json.dumps(settings, indent=2))
    (partial / "shards").mkdir()


def _vocabulary(
    config: PrepareConfig, sources: Sources, partial: Path, reporter: Reporter
) -> Tokenizer:
    """The tokenizer, whose file now lies in `partial`."""
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        (partial / tokenizer.file_name).write_bytes(tokenizer.file_content)
        return tokenizer
    assert config.vocab_size is not None
    file = partial / "tokenizer.model"
    if not file.exists():
        pieces = _split_pieces(config, sources, "reading for the vocabulary", reporter)
        texts = (piece.text for split, piece in pieces if split == "train")
        reporter.message(f"training a vocabulary of {config.vocab_size} entries")
        train_sentencepiece(texts, config.vocab_size, file)
    return load_tokenizer(file)


def _split_pieces(
    config: PrepareConfig, sources: Sources, stage: str, reporter: Reporter
) -> Iterator[tuple[str, Piece]]:
    """Every piece of text with the name of its split."""
    done_bytes, all_bytes = 0, sources.num_bytes()

    def on_bytes(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        reporter.progress(stage, done_bytes, all_bytes)

    read = functools.partial(
        read_pieces, documents=config.documents, text_key=config.text_key, on_bytes=on_bytes
    )
    if config.corpus or config.valid:
        for split, files in (("train", sources.train), ("valid", sources.valid)):
            for piece in read(files):
                yield split, piece
        return
    fraction = config.valid_fraction or DEFAULT_VALID_FRACTION
    key = str(config.seed).encode()[:64]
    split, seen = "train", set()
    for piece in read(sources.train):
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
