"""A trained translation run, opened in one process: its model and its vocabulary.

A run can be translated with without the data that it was trained on: its folder holds the
vocabulary, and the vocabulary's tags say which languages there are.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec, tagged_languages
from magnetar.data.pairs.folder import PreparedPairs, open_pairs
from magnetar.data.text.tokenizer import Tokenizer, load_tokenizer
from magnetar.engine.checkpoint.exported_run import RUN_KEY, exported_run
from magnetar.engine.checkpoint.open_run import choose_checkpoint, load_folder, read_folder_config
from magnetar.engine.checkpoint.save_load import load_model
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.models.transformer import EncoderDecoder
from magnetar.models.weights.files import has_weights

VOCABULARY = "tokenizer.model"


class TranslationRun(NamedTuple):
    """A model that translates.

    Attributes:
        name: the checkpoint's, or that of the folder of weights.
        step: optimizer steps done; None where the folder does not say.
        model: in float32, on the GPU if there is one: a batch's rounding then hardly ever changes
            a choice, which bfloat16's does.
        codec: its vocabulary.
        config: what it was trained with; None where the folder does not say.
        fingerprint: sha256 of the vocabulary, in hexadecimal.
    """

    name: str
    step: int | None
    model: EncoderDecoder
    codec: Codec
    config: RunConfig | None
    fingerprint: str


def open_translation_run(
    path: Path, checkpoint: str | None = None, data: Path | None = None
) -> TranslationRun:
    """The model of a run, or of a folder of weights, and its vocabulary.

    Args:
        path: a run's folder, or a folder of weights.
        checkpoint: name of the run's checkpoint; None: the newest complete one.
        data: a folder that holds the vocabulary, or its file; None: the run's own folder, or the
            prepared one that the run read.

    Raises:
        UserError: for a folder that is no run or no translation run, a checkpoint that is not
            there, or a vocabulary that is missing or another one.
    """
    if has_weights(path) and checkpoint is None:
        return _of_weights(path, data)
    chosen = choose_checkpoint(path, checkpoint)
    config, problems = check_config(chosen.manifest["config"])
    if config is None:
        listed = "\n  ".join(problem.text for problem in problems)
        raise UserError(
            f"{chosen.path}: its config is not one that this version can read:\n  {listed}"
        )
    _require_pairs(path, config)
    tokenizer = _vocabulary(path, config, chosen.manifest["tokenizer_fingerprint"], data)
    model = load_model(chosen)
    assert isinstance(model, EncoderDecoder)
    return TranslationRun(
        chosen.path.name,
        chosen.step,
        _placed(model),
        _codec(path, tokenizer),
        config,
        tokenizer.fingerprint,
    )


def is_translation_run(path: Path, checkpoint: str | None = None) -> bool:
    """Whether a run, or what was exported of it, has learnt sentence pairs.

    Raises:
        UserError: for a folder that is no run, or a checkpoint that is not there.
    """
    if has_weights(path) and checkpoint is None:
        config = read_folder_config(path)[1].get(RUN_KEY, {}).get("config", {})
    else:
        config = choose_checkpoint(path, checkpoint).manifest["config"]
    return bool(config.get("magnetar", {}).get("data", {}).get("pairs"))


def open_pairs_of(run: TranslationRun, path: Path, data: Path | None = None) -> PreparedPairs:
    """The prepared pairs that a run was trained on, or others of its vocabulary.

    Args:
        run: opened from `path`.
        path: the run's folder.
        data: a folder of prepared pairs; None: the run's.

    Raises:
        UserError: the folder is not there, is not one of pairs, or has another vocabulary.
    """
    if data is None and run.config is None:
        raise UserError(f"{path} does not say what it was trained on: name the pairs with --data")
    folder = data or Path(run.config.data.path)  # type: ignore[union-attr]
    if data is None and not folder.is_dir():
        raise UserError(
            f"prepared folder {folder}, which {path} was trained on, is not there: start the "
            "command where training was started, copy the folder back, or name another with --data"
        )
    prepared = open_pairs(folder)
    if prepared.manifest.tokenizer_fingerprint != run.fingerprint:
        raise UserError(
            f"{folder} was made with another vocabulary (sha256 "
            f"{prepared.manifest.tokenizer_fingerprint[:12]}) than {path} was trained with "
            f"({run.fingerprint[:12]}): prepare it again with the vocabulary of the run"
        )
    return prepared


def _of_weights(path: Path, data: Path | None) -> TranslationRun:
    model_config, about = read_folder_config(path)
    step, config, trained_with = None, None, None
    if RUN_KEY in about:
        run, config = exported_run(path, model_config, about)
        _require_pairs(path, config)
        step, trained_with = run.step, run.tokenizer_fingerprint
    elif model_config.architecture != "encoder_decoder":
        raise UserError(_no_translation(path, model_config.architecture))
    tokenizer = _vocabulary(path, config, trained_with, data)
    assert model_config.vocab_size is not None
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"the vocabulary has {tokenizer.vocab_size} entries, and the model of {path} "
            f"{model_config.vocab_size}: give the one that it was trained with, with --data"
        )
    codec = _codec(path, tokenizer)
    model = load_folder(path)
    assert isinstance(model, EncoderDecoder)
    return TranslationRun(path.name, step, _placed(model), codec, config, tokenizer.fingerprint)


def _placed(model: EncoderDecoder) -> EncoderDecoder:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, torch.float32).eval()


def _require_pairs(path: Path, config: RunConfig) -> None:
    if config.data.pairs is None:
        raise UserError(_no_translation(path, config.model.architecture))


def _no_translation(path: Path, architecture: str) -> str:
    use = "generate" if architecture == "decoder" else "evaluate"
    return (
        f"{path} is no translation run: a model that translates has learnt sentence pairs "
        f"(data.pairs): use `magnetar {use} {path}`, or name another run"
    )


def _vocabulary(
    path: Path, config: RunConfig | None, trained_with: str | None, data: Path | None
) -> Tokenizer:
    """The vocabulary of a run, given by its fingerprint, wherever it lies."""
    folders = [data] if data is not None else [path]
    if data is None and config is not None:
        folders.append(Path(config.data.path))
    files = [folder / VOCABULARY if folder.is_dir() else folder for folder in folders]
    found = [file for file in files if file.is_file()]
    if not found:
        looked = " and ".join(map(str, files))
        raise UserError(
            f"the vocabulary of {path} is not there ({looked}): name the prepared folder, or the "
            "tokenizer.model that it was trained with, with --data"
        )
    tokenizer = load_tokenizer(found[0])
    if trained_with is not None and tokenizer.fingerprint != trained_with:
        raise UserError(
            f"{found[0]} is another vocabulary (sha256 {tokenizer.fingerprint[:12]}) than {path} "
            f"was trained with ({trained_with[:12]}): give the one that it was trained with, with "
            "--data"
        )
    return tokenizer


def _codec(path: Path, tokenizer: Tokenizer) -> Codec:
    languages = tagged_languages(tokenizer)
    if not languages:
        raise UserError(
            f"the vocabulary of {path} has no language tags such as <2de>: prepare pairs with "
            "`magnetar prepare-pairs`, and train a model on them"
        )
    return Codec(tokenizer, languages)
