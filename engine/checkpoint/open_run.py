"""One opener for every trained model on disk, whatever its task.

`open_run` takes a run's folder, a checkpoint's folder or a folder of weights, and reads only what
is asked for: first the config, then names and shapes of tensors, then the tensors or the data.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from magnetar.data.errors import UserError, all_problems
from magnetar.data.pairs.codec import Codec, tagged_languages
from magnetar.data.pairs.folder import PreparedPairs, open_pairs
from magnetar.data.text.token_files import Prepared, open_prepared
from magnetar.data.text.tokenizer import Tokenizer, TokenizerFile, load_tokenizer
from magnetar.engine.checkpoint.exported_run import RUN_KEY, read_entry
from magnetar.engine.checkpoint.format import (
    CHECKPOINTS,
    MANIFEST,
    WEIGHT,
    Checkpoint,
    checkpoint_folders,
    complete_checkpoints,
    looked_at,
    newest_checkpoint,
    read_checkpoint,
    require_whole,
    sha256,
)
from magnetar.engine.checkpoint.run_folder import differing_models
from magnetar.engine.checkpoint.save_load import require_same_tensors
from magnetar.engine.checkpoint.vocabulary import require_vocabulary, vocabulary_in
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.engine.optim.ema import EMA
from magnetar.models.config import ModelConfig
from magnetar.models.layers.attention import expect_many_shapes
from magnetar.models.transformer import EncoderDecoder, Transformer
from magnetar.models.weights.files import WEIGHTS_FILE, LazyTensors, Spec, has_weights
from magnetar.models.weights.load_save import (
    CONFIG_FILE,
    model_of_tensors,
    on_one_rank,
    open_weights,
    read_config,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN_SIBLINGS = 5


@dataclass(frozen=True)
class SavedModel:
    """A trained model on disk, and what is known about its training.

    Attributes:
        named: Path that the user has given.
        path: Folder of the checkpoint or of the weights.
        config: Config of the model, with all experts on one rank.
        about: Entries of the checkpoint's manifest, or those that an export has kept. Empty for
            weights that come from no run.
        checkpoint: The checkpoint. None for a folder of weights.
        data: Folder or file that the user has named for the data or the vocabulary. None for the
            run's own.
        ema: True to take the checkpoint's average of the weights in place of the weights.
    """

    named: Path
    path: Path
    config: ModelConfig
    about: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    data: Path | None = None
    ema: bool = False

    @property
    def name(self) -> str:
        """Name of the checkpoint, or of the folder of weights."""
        return self.path.name

    @property
    def step(self) -> int | None:
        """Number of optimizer steps done. None if the folder does not say."""
        return self.about.get("step")

    @property
    def fingerprint(self) -> str | None:
        """sha256 of the vocabulary, in hexadecimal. None if the folder does not say."""
        return self.about.get("tokenizer_fingerprint")

    @property
    def has_learnt_pairs(self) -> bool:
        """Whether a run has trained the model on sentence pairs."""
        config = self.about.get("config", {})
        return bool(config.get("magnetar", {}).get("data", {}).get("pairs"))

    @cached_property
    def run_config(self) -> RunConfig | None:
        """Config of the training. None if the folder does not say.

        Raises:
            UserError: if this version cannot read it, or an export contradicts itself.
        """
        if not self.about:
            return None
        config, problems = check_config(self.about["config"])
        if config is None:
            where = f"{self.path}: its config"
            if self.checkpoint is None:
                where = f"{self.path / CONFIG_FILE}: its run.config"
            raise _of_another_version(where, [problem.text for problem in problems])
        if self.checkpoint is None:
            _require_consistent_export(self.path, self.config, config.model, self.fingerprint)
        return config

    @property
    def text_config(self) -> RunConfig:
        """Config of the training of a model that has learnt running text.

        Raises:
            UserError: if the model has learnt pairs, or the weights come from no run.
        """
        if self.has_learnt_pairs:
            named = shlex.quote(str(self.named))
            raise UserError(
                f"{self.named} has learnt sentence pairs: use `magnetar translate {named} "
                f"--from A --to B`, or `magnetar evaluate {named}`"
            )
        if self.run_config is None:
            raise UserError(
                f"{self.named} holds weights that no run has trained as they are: name a run, or "
                "what `magnetar convert export` has made of one"
            )
        return self.run_config

    @cached_property
    def tensors(self) -> LazyTensors:
        """Every tensor in the model's order and in the type that was saved, tied ones once.

        Raises:
            UserError: if a name or a shape is not the model's, or a file is missing. On reading a
                tensor of a folder of weights: it was altered.
        """
        if self.checkpoint is not None:
            require_same_tensors(self.checkpoint, self.config)
            shapes = self.checkpoint.shapes
            specs = {name: Spec(torch.float32, shape) for name, shape in shapes.items()}
            return LazyTensors(specs, self._tensor)
        return open_weights(self.path)[1]

    def _tensor(self, name: str) -> torch.Tensor:
        """A whole tensor of the checkpoint; one that did not train is its own average."""
        assert self.checkpoint is not None
        is_averaged = self.ema and EMA in self.checkpoint.states(name)
        return self.checkpoint.tensor(name, EMA if is_averaged else WEIGHT)

    def require_whole(self) -> None:
        """Refuse damaged files of a checkpoint, which reads them all, or a contradictory export.

        The tensors of a folder of weights are compared with their hashes when they are read.
        """
        _ = self.tensors  # names and shapes first: comparing hashes takes longer
        if self.checkpoint is not None:
            require_whole(self.checkpoint)
        else:
            _ = self.run_config

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name, read and checked; tied ones once."""
        if self.checkpoint is not None:
            require_whole(self.checkpoint)
        return {name: self.tensors.read(name) for name in self.tensors.specs}

    @property
    def device(self) -> torch.device:
        """The GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def model(self) -> Transformer | EncoderDecoder:
        """The model on `device`, in evaluation mode.

        The type is the one it was trained in, or the saved one if no run is known. A model that
        translates is in float32: there the rounding of a batch hardly ever changes a choice of the
        beam search, and in bfloat16 it does.
        """
        dtype = DTYPES[self.run_config.dtype] if self.run_config is not None else None
        if self.has_learnt_pairs or self.config.architecture == "encoder_decoder":
            dtype = torch.float32
        return self.load().to(self.device, dtype)

    @property
    def translator(self) -> EncoderDecoder:
        """The model of a run that translates."""
        assert isinstance(self.model, EncoderDecoder)
        return self.model

    def load(self) -> Transformer | EncoderDecoder:
        """The model on the CPU in the type that was saved, in evaluation mode."""
        model = model_of_tensors(self.config, self.state_dict())
        if self.checkpoint is not None:
            expect_many_shapes()
        return model

    @cached_property
    def prepared(self) -> Prepared:
        """Prepared text: the one named by `data`, or the one the run was trained on.

        Raises:
            UserError: if it is missing or damaged, or made with another vocabulary.
        """
        own = Path(self.text_config.data.path)
        prepared = open_prepared(self.data or self._require_own_data(own))
        assert self.fingerprint is not None
        require_vocabulary(
            f"{prepared.path} was made with",
            prepared.manifest.tokenizer_fingerprint,
            f"{self.named} was trained with",
            self.fingerprint,
            f"prepare it again with --tokenizer and {vocabulary_in(own, self.fingerprint)}",
        )
        return prepared

    def pairs(self, data: Path | None) -> PreparedPairs:
        """Prepared pairs: those of a folder, or with None those the run was trained on.

        Raises:
            UserError: if it is missing or damaged, or made with another vocabulary.
        """
        if data is None:
            if self.run_config is None:
                raise UserError(
                    f"{self.named} does not say what it was trained on: name the pairs with --data"
                )
            data = self._require_own_data(Path(self.run_config.data.path))
        prepared = open_pairs(data)
        require_vocabulary(
            f"{data} was made with",
            prepared.manifest.tokenizer_fingerprint,
            f"{self.named} was trained with",
            self.fingerprint or self.tokenizer.fingerprint,
            "prepare it again with the vocabulary of the run",
        )
        return prepared

    def _require_own_data(self, folder: Path) -> Path:
        if not folder.is_dir():
            raise UserError(
                f"prepared folder {folder}, which {self.named} was trained on, is not there: start "
                "the command where training was started, copy the folder back, or name another "
                "with --data"
            )
        return folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary: the one named by `data`, or the run's own.

        Raises:
            UserError: if it is missing, or not the one that the model was trained with.
        """
        return self.require_tokenizer(self.data, "--data")

    def require_tokenizer(self, place: Path | None, option: str) -> Tokenizer:
        """`find_tokenizer`, which must find one."""
        tokenizer = self.find_tokenizer(place, option)
        if tokenizer is None:
            looked = " and ".join(map(str, self._vocabulary_files(place)))
            has_data = place is None and self.about
            where = "start the command where training was started, or " if has_data else ""
            raise UserError(
                f"the vocabulary of {self.named} is not there ({looked}): {where}name the prepared "
                f"folder, or the file that the model was trained with, with {option}"
            )
        return tokenizer

    def find_tokenizer(self, place: Path | None, option: str) -> Tokenizer | None:
        """The vocabulary of the model. None if it is not there.

        Args:
            place: File or folder of the vocabulary. None for those of the run.
            option: Option of the command that names another place.

        Raises:
            UserError: if it cannot be read, or is not the one that the model was trained with.
        """
        file = next((file for file in self._vocabulary_files(place) if file.exists()), None)
        if file is None:
            return None
        tokenizer, room = load_tokenizer(file), self.config.vocab_size or 0
        way_out = f"give the one that it was trained with, with {option}"
        if self.fingerprint is not None:
            trained = f"{self.named} was trained with"
            found = tokenizer.fingerprint
            require_vocabulary(f"{file} is", found, trained, self.fingerprint, way_out)
        elif tokenizer.vocab_size > room:
            raise UserError(
                f"the vocabulary of {file} has {tokenizer.vocab_size} entries, and the model of "
                f"{self.named} {room}: {way_out}"
            )
        return tokenizer

    def _vocabulary_files(self, place: Path | None) -> list[Path]:
        """Where the vocabulary may be, the likeliest first."""
        if place is not None:
            return [place]
        # A run of pairs and an export have a copy; text has it in the prepared folder.
        folders = [self.path if self.checkpoint is None else self.path.parent.parent]
        if self.about:
            folders.append(Path(self.about["config"]["magnetar"]["data"]["path"]))
        return [folder / name for folder in folders for name in get_args(TokenizerFile)]

    @cached_property
    def codec(self) -> Codec:
        """The vocabulary of a model that translates, with its languages.

        Raises:
            UserError: if the model does not translate. See also `tokenizer`.
        """
        is_encoder_decoder = self.config.architecture == "encoder_decoder"
        if not (self.has_learnt_pairs if self.about else is_encoder_decoder):
            use = "generate" if self.config.architecture == "decoder" else "evaluate"
            command = shlex.join(["magnetar", use, str(self.named)])
            raise UserError(
                f"{self.named} is no translation run: a model that translates has learnt sentence "
                f"pairs (data.pairs): use `{command}`, or name another run"
            )
        languages = tagged_languages(self.tokenizer)
        if not languages:
            raise UserError(
                f"the vocabulary of {self.named} has no language tags such as <2de>: prepare pairs "
                "with `magnetar prepare-pairs`, and train a model on them"
            )
        return Codec(self.tokenizer, languages)


def open_run(
    path: Path | str,
    checkpoint: str | None = None,
    data: Path | None = None,
    ema: bool = False,
) -> SavedModel:
    """A trained model; only its config is read.

    Args:
        path: Folder of a run, of a checkpoint, or of weights.
        checkpoint: Name of the run's checkpoint. None for the newest one.
        data: Folder or file of the data or the vocabulary. None for the run's own.
        ema: True for the average of the weights, which the checkpoint must have.

    Raises:
        UserError: if the folder is none of these, a checkpoint is missing or has lost a file, or
            this version cannot read the model's config.
    """
    path = Path(path)
    try:
        are_weights = not is_run(path) and has_weights(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): make it readable, or name another folder"
        ) from None
    if not are_weights:
        saved = of_checkpoint(choose_checkpoint(path, checkpoint), path, data)
        assert saved.checkpoint is not None
        if ema and not any(
            EMA in saved.checkpoint.states(name) for name in saved.checkpoint.shapes
        ):
            raise UserError(
                f"--ema: {saved.path} holds no average of the weights: train with "
                "magnetar.training.ema_decay (0.999, say), or leave it out"
            )
        return replace(saved, ema=ema)
    if ema:
        raise UserError(
            f"--ema: {path} is a folder of weights, which holds one model: leave it out, or name a "
            "run"
        )
    if checkpoint is not None:
        raise UserError(
            f"--checkpoint {checkpoint}: {path} is a folder of weights, which holds one model: "
            "leave it out, or name a run"
        )
    config, entries = read_config(path)
    about = entries.get(RUN_KEY, {})
    if RUN_KEY in entries:
        read_entry(path, about)
    return SavedModel(path, path, on_one_rank(config), about, None, data)


def of_checkpoint(
    checkpoint: Checkpoint, named: Path | None = None, data: Path | None = None
) -> SavedModel:
    """The model of a checkpoint; see `SavedModel` for `named` and `data`.

    Raises:
        UserError: if this version cannot read the model's config.
    """
    section = checkpoint.manifest["config"]["magnetar"]["model"]
    try:  # keys that were added since have their defaults
        config = ModelConfig.model_validate_json(json.dumps(section))
    except ValidationError as error:
        problems = all_problems(error, "magnetar.model")
        raise _of_another_version(f"{checkpoint.path}: its model", problems) from None
    path = checkpoint.path
    return SavedModel(
        named or path, path, on_one_rank(config), checkpoint.manifest, checkpoint, data
    )


def load_model(checkpoint: Checkpoint) -> Transformer | EncoderDecoder:
    """The model of a checkpoint; see `SavedModel.load`."""
    return of_checkpoint(checkpoint).load()


def is_run(path: Path) -> bool:
    """Whether a folder is a run that has saved checkpoints."""
    return os.path.lexists(path / CHECKPOINTS)


def choose_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """A checkpoint of a run, the newest one without a name, or the one of a folder step_...

    Raises:
        UserError: if the folder is neither, or the checkpoint is missing or has lost a file.
    """
    if not path.is_dir():
        raise UserError(f"run folder {path} does not exist: {_siblings(path)}")
    if name is not None:
        found = {checkpoint.path.name: checkpoint for checkpoint in complete_checkpoints(path)}
        if name not in found:
            folders = [folder for folder in checkpoint_folders(path) if folder.name == name]
            problems = [f"\n  {line}" for folder in folders for line in looked_at(folder)[1]]
            raise UserError(
                f"--checkpoint {name}: {path} has no such complete checkpoint: "
                + (f"use {' or '.join(found)}" if found else "it has none")
                + "".join(problems)
            )
        return found[name]
    if is_run(path):
        return newest_checkpoint(path)
    if (path / MANIFEST).is_file():
        return read_checkpoint(path)
    raise UserError(
        f"{path}: holds no complete checkpoint (looked for checkpoints/step_*), no {MANIFEST} (of "
        f"a checkpoint) and no {WEIGHTS_FILE}: name a run folder that training has saved to, a "
        "checkpoint step_..., or a folder that magnetar convert has written"
    )


def _siblings(path: Path) -> str:
    """Which runs there are beside a folder that does not exist."""
    siblings = sorted(folder.parent.name for folder in path.parent.glob("*/config.json"))
    if not siblings:
        return "train one first"
    shown = ", ".join(siblings[:SHOWN_SIBLINGS])
    more = f", ... ({len(siblings)} runs)" if len(siblings) > SHOWN_SIBLINGS else ""
    return f"{path.parent} holds {shown}{more}"


def _of_another_version(what: str, problems: Iterable[str]) -> UserError:
    listed = "\n  ".join([f"{what} is not one that this version can read:", *problems])
    return UserError(f"{listed}\nuse the version of Magnetar that wrote it")


def _require_consistent_export(
    folder: Path, model: ModelConfig, in_run: ModelConfig, fingerprint: str | None
) -> None:
    """Refuse an export whose files contradict each other.

    The keys `model` and `run.config` of its config.json have one model, and its vocabulary is the
    run's, whose sha256 is `fingerprint`.
    """
    for key, run_value, value in differing_models(in_run, model):
        raise UserError(
            f"{folder / CONFIG_FILE} contradicts itself: model.{key} is {value}, and {run_value} "
            "in run.config: export it again"
        )
    for file in (folder / name for name in get_args(TokenizerFile)):
        if file.is_file() and fingerprint is not None:
            require_vocabulary(
                f"{file} is",
                sha256(file),
                "the run was trained with",
                fingerprint,
                "copy the folder again, or export it again",
            )
