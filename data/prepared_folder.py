"""A prepared folder: it appears whole or not at all, and an interrupted preparation goes on.

Everything is written to `OUT.partial`, which is renamed to `OUT` when it is complete. The settings,
which determine the result, lie in it from the start: the same command resumes, and another one
starts over. After an error that a user has to mend the partial folder is removed. A lock lets only
one process at a time write there.
"""

import errno
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from magnetar.data.atomic import PARTIAL_SUFFIX, lock, rename_durably, write_atomically
from magnetar.data.errors import UserError, first_problem

HASHED_WHOLE_BYTES = 256 << 20  # larger sources are recognised by size and time of change
MIN_VOCAB_SIZE = 300


class Reporter(NamedTuple):
    """Callbacks for what a person is told during the work.

    Attributes:
        message: Called with one line of text.
        progress: Called with the stage's name, the bytes done and the bytes in all.
    """

    message: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done_bytes, all_bytes: None

    def count_bytes(self, stage: str, files: Sequence[Path]) -> Callable[[int], None]:
        """A function that takes the bytes read since its last call, of some files' sizes."""
        done_bytes, all_bytes = 0, sum(path.stat().st_size for path in files)

        def on_bytes(num_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += num_bytes
            self.progress(stage, done_bytes, all_bytes)

        return on_bytes


SILENT = Reporter()
AnyManifest = TypeVar("AnyManifest", bound=BaseModel)


@dataclass(frozen=True)
class Config:
    """What every preparation is asked for. Give `vocab_size` or `tokenizer`."""

    out: Path  # the folder to make
    _: KW_ONLY
    vocab_size: int | None = None  # train a SentencePiece vocabulary of so many entries
    tokenizer: Path | None = None  # a vocabulary to use
    workers: int = 1  # processes that tokenise


def check_config(config: Config, tokenizer: str, must_fit: str) -> None:
    """Refuse a vocabulary that is asked for twice or not at all, or is too small, and no workers.

    Args:
        config: The config.
        tokenizer: The option that names a vocabulary, and what it does.
        must_fit: What a vocabulary must hold beside bytes, and the sizes to use.
    """
    if (config.vocab_size is None) == (config.tokenizer is None):
        raise UserError(f"give either --vocab-size N, to train a vocabulary, or {tokenizer}")
    if config.vocab_size is not None and config.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={config.vocab_size} is too small: 256 byte pieces{must_fit}; use "
            f"{MIN_VOCAB_SIZE} at least, 2000 for a small corpus"
        )
    if config.workers < 1:
        raise UserError(f"workers={config.workers} must be at least 1")


def prepare_folder(
    config: Config,
    settings: dict[str, Any],
    reporter: Reporter,
    read: Callable[[Path], AnyManifest],
    fill: Callable[[Path], AnyManifest],
) -> AnyManifest:
    """The manifest of the folder `config.out`, made now unless it is already up to date.

    Args:
        config: The config.
        settings: All that determines the result, as JSON.
        reporter: Callbacks for what a person is told.
        read: Opens a folder, and returns its manifest.
        fill: Writes everything but the manifest into a folder, and returns the manifest.

    Raises:
        UserError: if `config.out` was made from something else, the disk is full, another run
            writes there, a worker was killed, or something else made the partial folder.
    """
    out = config.out
    if out.exists():
        if not (out / "manifest.json").is_file():
            raise UserError(f"{out} exists and is not a prepared folder: choose another --out")
        manifest = read(out)
        _refuse_other(out, manifest.settings, settings)  # type: ignore[attr-defined]
        remove_scaffolding(out)
        reporter.message(f"{out} is up to date")
        return manifest
    with _resumable_folder(config, settings, reporter) as partial:
        manifest = fill(partial)
        write_atomically(partial / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
        return read(partial)  # what cannot be opened gets neither its name nor a summary


@contextmanager
def _resumable_folder(
    config: Config, settings: dict[str, Any], reporter: Reporter
) -> Iterator[Path]:
    """The partial folder, which is renamed to `config.out` at the end of the `with` block."""
    out = config.out
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            locked = lock(partial / "lock")
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing {partial}: wait for it, or choose another --out"
            ) from error
        with locked:
            _keep_or_clear(partial, settings, reporter)
            try:
                yield partial
            except UserError:
                # The user will change the text or the settings, so no shard could be used again.
                shutil.rmtree(partial)
                raise
            rename_durably(partial, out)
        remove_scaffolding(out)
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


def files_digest(files: Sequence[Path]) -> dict[str, Any]:
    """Number of files, their size in bytes, and a sha256 of their names and contents."""
    digest, num_bytes = hashlib.sha256(), 0
    for path in files:
        stat = path.stat()
        num_bytes += stat.st_size
        if stat.st_size <= HASHED_WHOLE_BYTES:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            content = str(stat.st_mtime_ns)
        digest.update(json.dumps([path.name, stat.st_size, content]).encode())
    return {"num_files": len(files), "num_bytes": num_bytes, "sha256": digest.hexdigest()}


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file; an empty one if the file is missing or holds none."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def manifest_of(path: Path, model: type[AnyManifest], command: str) -> AnyManifest:
    """The manifest of a prepared folder.

    Args:
        path: The folder.
        model: The manifest's form.
        command: The command that makes such a folder.

    Raises:
        UserError: if the folder is missing, is a file, or was not made by the command.
    """
    if path.is_file():
        raise UserError(
            f"{path} is a file, not a prepared folder: give the folder that `{command} --out ...` "
            "made"
        )
    if not path.is_dir():
        raise UserError(
            f"prepared folder {path} does not exist: run "
            f"`{command} --out {shlex.quote(str(path))} ...` first"
        )
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing, so {path} is not a prepared folder: give another one, or make it "
            f"with `{command} --out ...`"
        )
    try:
        return model.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{file} is not a valid manifest of version 1 of `{command}`: {first_problem(error)}. "
            f"Give another folder, or delete {path} and prepare it again"
        ) from error


def remedy(path: Path) -> str:
    """The way out of a damaged file of a folder."""
    return f"copy it back, or delete {path} and prepare it again"


def require_vocabulary(path: Path, manifest: Any) -> None:
    """Refuse a folder whose vocabulary is missing, or is not the one that made its tokens."""
    vocabulary = path / manifest.tokenizer_file
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary} is missing: {remedy(path)}")
    fingerprint = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    if fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{path} holds tokens made by another vocabulary: {vocabulary.name} has the sha256 "
            f"{fingerprint[:12]}, the tokens were made with {manifest.tokenizer_fingerprint[:12]}: "
            f"put the right {vocabulary.name} back, or delete {path} and prepare it again"
        )


def require_size(file: Path, size: int) -> None:
    """Refuse a file that is missing, or has another size in bytes than the manifest says."""
    if not file.is_file():
        raise UserError(f"{file} is missing: {remedy(file.parent)}")
    if (found := file.stat().st_size) != size:
        raise UserError(
            f"{file} has {found} bytes where the manifest says {size}: it was cut short or "
            f"replaced; {remedy(file.parent)}"
        )


def _refuse_other(out: Path, made_from: dict[str, Any], settings: dict[str, Any]) -> None:
    key = _first_difference(made_from, settings)
    if key is not None:
        raise UserError(
            f"{out} was made with {key}={_short(made_from.get(key))}, not {_short(settings[key])}: "
            "choose another --out, or delete it first"
        )


def _first_difference(made_from: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The first setting that differs.

    The globs are not compared: other globs may match the same files, whose digests are compared.
    """
    keys = [key for key in settings if key not in ("train", "valid")]
    return next((key for key in keys if made_from.get(key) != settings[key]), None)


def _short(value: Any) -> str:
    """A setting's value in a message."""
    if isinstance(value, dict):
        files, size, digest = (value.get(key) for key in ("num_files", "num_bytes", "sha256"))
        return f"({files} files, {size} bytes, sha256 {str(digest)[:12]})"
    return repr(value)


def remove_scaffolding(out: Path) -> None:
    """Remove what only an unfinished folder needs. A kill in here costs nothing but disk space."""
    shutil.rmtree(out / "shards", ignore_errors=True)
    for name in ("settings.json", "lock"):
        (out / name).unlink(missing_ok=True)


def _keep_or_clear(partial: Path, settings: dict[str, Any], reporter: Reporter) -> None:
    """Keep the finished shards of a run with the same settings; clear away those of another."""
    file = partial / "settings.json"
    own = ("lock", file.name + PARTIAL_SUFFIX)
    others = [path for path in partial.iterdir() if path.name not in own]
    if _first_difference(read_json(file), settings) is None:
        reporter.message(f"resuming {partial}")
        (partial / "shards").mkdir(exist_ok=True)
        return
    if others and not file.is_file():
        raise UserError(f"{partial} is not ours to clear: move it away, or choose another --out")
    if others:
        reporter.message(f"{partial} was begun with other settings: starting over")
    # The settings go last. After a kill in here they still say that the folder is ours.
    for path in sorted(others, key=lambda path: path == file):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_atomically(file, json.dumps(settings, indent=2) + "\n")
    (partial / "shards").mkdir()
