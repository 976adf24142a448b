"""Shards: bounded parts of the text, tokenised by workers and joined in order.

The text alone decides where shards are cut. So the result is the same, byte for byte, for any
number of workers and of interruptions.
"""

import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from magnetar.data.atomic import atomic_file, write_atomically
from magnetar.data.errors import UserError
from magnetar.data.prepared_folder import Reporter, read_json
from magnetar.data.text.corpus import Piece
from magnetar.data.text.token_files import SPLITS, SplitRecord, token_dtype
from magnetar.data.text.tokenizer import Tokenizer, load_tokenizer

SHARD_CHARS = 4 << 20
COPY_BYTES = 1 << 24
SHOWN_LETTERS = 5
# File and fingerprint of the vocabulary, the stem of a shard's files, and its text.
Todo = tuple[tuple[Path, str], Path, list[Piece]]
COUNTS = ("num_tokens", "num_documents", "num_bytes")
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def _shards(
    pieces: Iterator[tuple[str, Piece]], splits: Sequence[str]
) -> Iterator[tuple[str, list[Piece]]]:
    """Consecutive pieces of a split, in parts of about SHARD_CHARS, each with its file stem."""
    open_shards: dict[str, list[Piece]] = {split: [] for split in splits}
    sizes = dict.fromkeys(splits, 0)
    counts = dict.fromkeys(splits, 0)
    for split, piece in pieces:
        open_shards[split].append(piece)
        sizes[split] += len(piece.text) + 1  # a million empty ones must not become one shard
        if sizes[split] >= SHARD_CHARS:
            yield f"{split}-{counts[split]:06}", open_shards[split]
            open_shards[split], sizes[split] = [], 0
            counts[split] += 1
    for split in splits:
        if open_shards[split]:
            yield f"{split}-{counts[split]:06}", open_shards[split]


def tokenise_shard(vocabulary: tuple[Path, str], stem: Path, pieces: list[Piece]) -> None:
    """Write STEM.bin (ids), STEM.ends (ends of documents, uint64) and then STEM.json (sizes).

    The record is written last: if it exists, the other two files are complete.
    """
    tokenizer = _cached_tokenizer(*vocabulary)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    blocks, ends = [], []
    num_tokens = 0
    unspelt: Counter[str] = Counter()
    for piece in pieces:
        ids = tokenizer.encode(piece.text)
        unspelt.update(tokenizer.unspelt(piece.text, ids))
        if piece.ends_document:
            ids.append(tokenizer.eos_id)
        num_tokens += len(ids)
        blocks.append(np.array(ids, dtype=dtype).tobytes())
        if piece.ends_document:
            ends.append(num_tokens)
    contents = {".bin": b"".join(blocks), ".ends": np.array(ends, dtype="<u8").tobytes()}
    for suffix, content in contents.items():
        write_atomically(stem.with_suffix(suffix), content)
    record = {
        "num_tokens": num_tokens,
        "num_documents": len(ends),
        "num_bytes": sum(len(piece.text.encode()) for piece in pieces),
        "num_chars": sum(len(piece.text) for piece in pieces),
        "unspelt": unspelt,
        "sha256": hashlib.sha256(b"".join(contents.values())).hexdigest(),
    }
    write_atomically(stem.with_suffix(".json"), json.dumps(record) + "\n")


def _is_finished(stem: Path) -> bool:
    """Whether a shard's files are there as its record says."""
    record = read_json(stem.with_suffix(".json"))
    try:
        files = [stem.with_suffix(suffix).read_bytes() for suffix in (".bin", ".ends")]
    except FileNotFoundError:
        return False
    return record.get("sha256") == hashlib.sha256(b"".join(files)).hexdigest()


@functools.cache
def _cached_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of a file, loaded once in each process."""
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{path} has changed since it was first read: run the same command again")
    return tokenizer


def tokenise(
    pieces: Iterator[tuple[str, Piece]],
    tokenizer: Tokenizer,
    folder: Path,
    workers: int,
    reporter: Reporter,
    splits: Sequence[str] = SPLITS,
) -> dict[str, list[Path]]:
    """Tokenise the shards that `folder` does not hold yet.

    Args:
        pieces: all pieces of text, each with the name of its split.
        tokenizer: the vocabulary; each process loads its file.
        folder: the folder of the shards, which are found again after an interruption.
        workers: number of processes; 1 works in this process.
        reporter: callbacks for what a person is told.
        splits: names of all splits that may occur.

    Returns:
        The stems of the shards in order, by split.
    """
    stems: dict[str, list[Path]] = {split: [] for split in splits}
    num_kept = 0

    def todo() -> Iterator[Todo]:
        nonlocal num_kept
        for name, shard in _shards(pieces, splits):
            stem = folder / name
            stems[name.rpartition("-")[0]].append(stem)
            # The text is read and cut again even if the shard exists: its cuts define the rest.
            if _is_finished(stem):
                num_kept += 1
            else:
                yield (tokenizer.path, tokenizer.fingerprint), stem, shard

    if workers == 1:
        for arguments in todo():
            tokenise_shard(*arguments)
    else:
        _in_processes(todo(), workers)
    if num_kept:
        reporter.message(f"kept {num_kept} finished shards")
    for split, found in stems.items():
        _report_unspelt(split, found, reporter)
    return stems


def _report_unspelt(split: str, stems: list[Path], reporter: Reporter) -> None:
    """Say which letters of a split its vocabulary cannot spell, if any."""
    num_chars, unspelt = 0, Counter[str]()
    for stem in stems:
        record = read_json(stem.with_suffix(".json"))
        num_chars += record["num_chars"]
        unspelt.update(record["unspelt"])
    if count := unspelt.total():
        most = ", ".join(f"{letter!r} {n:,}" for letter, n in unspelt.most_common(SHOWN_LETTERS))
        reporter.message(
            f"warning: the vocabulary cannot spell {count:,} of {num_chars:,} characters "
            f"({count / num_chars:.2%}) of {split}, most often {most}: they are lost; use another "
            "--tokenizer, or train one with --vocab-size"
        )


def _in_processes(todo: Iterator[Todo], workers: int) -> None:
    """Tokenise shards in worker processes."""
    # Spawned, not forked: the parent holds threads of the tokenizer libraries.
    context = multiprocessing.get_context("spawn")
    start = functools.partial(_start_worker, os.getpid())
    with ProcessPoolExecutor(workers, context, initializer=start) as pool:
        running: deque[Future[None]] = deque()
        try:
            for arguments in todo:
                running.append(pool.submit(tokenise_shard, *arguments))
                if len(running) >= 2 * workers:  # bounds the text in memory
                    running.popleft().result()
            while running:
                running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches the whole group of processes; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed cannot end its workers, so the kernel does.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before the kernel was asked
        os._exit(1)


def join(stems: list[Path], bin_file: Path) -> SplitRecord:
    """Write one split's token file and its index from the shards."""
    records = [read_json(stem.with_suffix(".json")) for stem in stems]
    totals = {key: sum(record[key] for record in records) for key in COUNTS}
    digest = hashlib.sha256()
    with atomic_file(bin_file.with_suffix(".idx")) as index, atomic_file(bin_file) as tokens:
        shape = (totals["num_documents"] + 1,)
        header = {"descr": "<u8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(index, header)
        index.write(np.zeros(1, dtype="<u8").tobytes())
        first_token = 0
        for stem, record in zip(stems, records, strict=True):
            ends = np.fromfile(stem.with_suffix(".ends"), dtype="<u8")
            index.write((ends + np.uint64(first_token)).tobytes())
            first_token += record["num_tokens"]
            with stem.with_suffix(".bin").open("rb") as source:
                while block := source.read(COPY_BYTES):
                    digest.update(block)
                    tokens.write(block)
    return SplitRecord(**totals, sha256=digest.hexdigest())
