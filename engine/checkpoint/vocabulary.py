"""The vocabulary of a trained model: the only one whose ids mean what the model has learnt."""

from pathlib import Path

from magnetar.data.errors import UserError
from magnetar.data.text.token_files import read_manifest
from magnetar.data.text.tokenizer import Tokenizer, load_tokenizer


def require_vocabulary(what: str, found: str, whose: str, expected: str, way_out: str) -> None:
    """Refuse another vocabulary than a model was trained with: each id would be another piece.

    Args:
        what: Beginning of the message, such as "runs/a/tokenizer.model is".
        found: sha256 of its vocabulary, in hexadecimal.
        whose: Other side of the comparison, such as "runs/b was trained with".
        expected: sha256 of the vocabulary of that, in hexadecimal.
        way_out: End of the message: what to do.

    Raises:
        UserError: The two differ.
    """
    if found != expected:
        raise UserError(
            f"{what} another vocabulary (sha256 {found[:12]}) than {whose} ({expected[:12]}): "
            f"{way_out}"
        )


def fitting_tokenizer(
    file: Path, model: Path, fingerprint: str | None, vocab_size: int, option: str
) -> Tokenizer:
    """The tokenizer of a file or a folder, which must be the model's.

    Args:
        file: File or folder of the vocabulary.
        model: Path of the model, for messages.
        fingerprint: sha256 of the model's vocabulary, in hexadecimal. None if it is not known.
        vocab_size: Number of entries that the model has room for.
        option: Option of the command that names another vocabulary, for messages.

    Raises:
        UserError: It cannot be read, or is not the one that the model was trained with.
    """
    tokenizer = load_tokenizer(file)
    way_out = f"give the one that it was trained with, with {option}"
    if fingerprint is not None:
        trained = f"{model} was trained with"
        require_vocabulary(f"{file} is", tokenizer.fingerprint, trained, fingerprint, way_out)
    elif tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the vocabulary of {file} has {tokenizer.vocab_size} entries, and the model of "
            f"{model} {vocab_size}: {way_out}"
        )
    return tokenizer


def vocabulary_in(folder: Path, fingerprint: str) -> str:
    """The run's vocabulary in a message: its file, if that is still in a prepared folder."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = None
    if manifest is None or manifest.tokenizer_fingerprint != fingerprint:
        return "the vocabulary that the run was trained with"
    return str(folder / manifest.tokenizer_file)
