"""The vocabulary of a trained model: the only one whose ids mean what the model has learnt."""

from pathlib import Path

from magnetar.data.errors import UserError
from magnetar.data.text.token_files import read_manifest


def require_vocabulary(what: str, found: str, whose: str, expected: str, way_out: str) -> None:
    """Refuse another vocabulary than a model was trained with: each id would be another piece.

    Args:
        what: Beginning of the message, such as "runs/a/tokenizer.model is".
        found: sha256 of its vocabulary, in hexadecimal.
        whose: Other side of the comparison, such as "runs/b was trained with".
        expected: sha256 of the vocabulary of that, in hexadecimal.
        way_out: End of the message: what to do.

    Raises:
        UserError: if the two differ.
    """
    if found != expected:
        raise UserError(
            f"{what} another vocabulary (sha256 {found[:12]}) than {whose} ({expected[:12]}): "
            f"{way_out}"
        )


def vocabulary_in(folder: Path, fingerprint: str) -> str:
    """The run's vocabulary in a message: its file, if that is still in a prepared folder."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = None
    if manifest is None or manifest.tokenizer_fingerprint != fingerprint:
        return "the vocabulary that the run was trained with"
    return str(folder / manifest.tokenizer_file)
