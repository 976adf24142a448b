"""A model of TorchScale 0.3.0, dense or sparse, as a Magnetar folder of weights.

The model of that folder has the same function in evaluation: the same logits for the same tokens at
every position that is not padding. The tensors decide what the files leave open. If the options tie
embeddings and the tensors differ, the embeddings are not tied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from magnetar.convert.folders import how_to_load, require_new
from magnetar.convert.torchscale.names import FIRST_POSITION, NOT_WEIGHTS, Recipe, Stack, recipe
from magnetar.convert.torchscale.options import (
    CLASSES,
    Architecture,
    architecture_named,
    check_belonging,
    check_names,
    model_keys,
    resolve,
)
from magnetar.convert.torchscale.reader import Checkpoint, are_equal, read_checkpoint, read_options
from magnetar.data.errors import UserError
from magnetar.models.config import ModelConfig
from magnetar.models.weights.load_save import check_tensors, load_model, save_weights, tensor_shapes

# Parts of tensors' names that belong to modules that Magnetar does not have.
_FOREIGN = (
    ("flat_param", "FSDP's shards: consolidate the checkpoint with the program that wrote it"),
    ("retention", "a RetNet's retention: only the Transformers of TorchScale are imported"),
    ("vision_embed.", "BEiT-3's image patches: Magnetar's models read tokens"),
    ("text_embed.", "BEiT-3's embedding: Magnetar's models read tokens"),
    ("embed_positions.A.", "positions of two modalities: Magnetar's have one table"),
    (
        "output_projection.dense.",
        "fairseq's masked-LM head, with a layer of its own: Magnetar's output is one matrix; take "
        "the tensors under output_projection out of the file to import the features",
    ),
    ("output_projection.bias", "a bias of the output: Magnetar's output is one matrix without"),
)
# fairseq builds positions for this many tokens by default.
_FAIRSEQ_POSITIONS = 1024


@dataclass(frozen=True)
class Imported:
    """A model in Magnetar's terms.

    Attributes:
        source: description of the TorchScale model.
        config: the model's config in Magnetar.
        tensors: tensors under Magnetar's names.
        notes: remarks for the user, one sentence each.
    """

    source: str
    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: list[str]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def import_torchscale(
    paths: Sequence[Path], out: Path, options_path: Path | None = None, trust: bool = False
) -> Imported:
    """Read a TorchScale model, write it to a new folder, and load it from there once.

    Args:
        paths: files of the model, see `read_checkpoint`.
        out: new folder, see `require_new`.
        options_path: a JSON of TorchScale's options; they replace those of the file one by one.
        trust: whether the files may run code.
    """
    require_new(out)
    given = None if options_path is None else read_options(options_path)
    num_experts = (given or {}).get("moe_expert_count")
    checkpoint = read_checkpoint(
        paths, num_experts if isinstance(num_experts, int) else None, trust
    )
    if given is not None:
        check_names(given, str(options_path))
    imported = translate(checkpoint, given, options_path)
    try:
        save_weights(out, imported.config, imported.tensors)
        load_model(out)
    except ValueError as error:
        raise UserError(f"{out}: {error}") from None
    return imported


def translate(
    checkpoint: Checkpoint, given: Mapping[str, Any] | None = None, given_path: Path | None = None
) -> Imported:
    """A TorchScale model in Magnetar's terms.

    Args:
        checkpoint: its tensors, and its options if the file holds them.
        given: options from another file.
        given_path: path of that file, for messages.
    """
    path = checkpoint.path
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not NOT_WEIGHTS.fullmatch(name)
    }
    _refuse_the_foreign(tensors, path)
    options = _all_options(checkpoint, given)
    source = str(given_path or path)
    architecture = _architecture(tensors, options, path)
    is_fairseqs = checkpoint.kind == "fairseq"
    if is_fairseqs and architecture != "encoder":
        # Its language models take the length of their samples for the number of positions.
        length = options.get("max_target_positions") or options.get("tokens_per_sample")
        options["max_target_positions"] = length or _FAIRSEQ_POSITIONS
    for some, place in ((given, source), (checkpoint.options, str(path))):
        # Among a program's other arguments an option of another class means nothing.
        if some is not None and (some is given or checkpoint.kind == "options"):
            check_belonging(some, architecture, place)
    stacks = _stacks(tensors, architecture)
    resolved = resolve(architecture, options, source, final=is_fairseqs)
    keys, notes = model_keys(architecture, resolved, source)
    _check_tables(stacks, tensors, resolved["vocab_size"], path)
    embeddings = _embedding_keys(stacks, tensors, resolved, path)
    positions = _position_keys(stacks, checkpoint, options, resolved)
    config = _model_config({**keys, **embeddings.keys, **positions.keys}, source)
    made = _make_tensors(config, stacks, tensors, embeddings.copies, path)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"})
    if dtypes:
        notes.append(f"{', '.join(dtypes)} in the file, float32 in the folder")
    return Imported(
        source=f"TorchScale {CLASSES[architecture].removesuffix('Config')}"
        + (" in a checkpoint of fairseq" if is_fairseqs else ""),
        config=config,
        tensors=made,
        notes=embeddings.notes + positions.notes + notes,
    )


def _all_options(checkpoint: Checkpoint, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of the file, replaced by those of the other file."""
    if checkpoint.options is None and given is None:
        raise UserError(
            f"{checkpoint.path}: holds tensors alone, and they do not say how many heads there "
            f"are: give the arguments of TorchScale's {_classes()} with --config FILE.json, such "
            'as {"decoder_layers": 6, "decoder_attention_heads": 8}'
        )
    if checkpoint.kind == "options":
        check_names(checkpoint.options or (), str(checkpoint.path))
    return dict(checkpoint.options or {}) | dict(given or {})


def _classes() -> str:
    *others, last = CLASSES.values()
    return f"{', '.join(others)} or {last}"


def _refuse_the_foreign(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name in tensors:
        for part, meaning in _FOREIGN:
            if part in name:
                raise UserError(f"{path}: {name} belongs to {meaning}")
    if not any(".layers.0." in f".{name}" for name in tensors):
        raise UserError(
            f"{path}: none of its {len(tensors)} tensors belongs to a layer of TorchScale's, such "
            f"as layers.0.self_attn.q_proj.weight; the first is {next(iter(tensors), 'none')}: "
            "give the state dict of an Encoder, a Decoder or an EncoderDecoder"
        )


def _architecture(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any], path: Path
) -> Architecture:
    """The architecture by the names of the tensors or, if these leave it open, of the options."""
    sides = [
        side
        for side in ("encoder", "decoder")
        if any(name.startswith(f"{side}.layers.") for name in tensors)
    ]
    if len(sides) == 2:
        return "encoder_decoder"
    found = sides[0] if sides else None
    named = architecture_named(options)
    if found is None:
        found = named if named != "encoder_decoder" else None
    if any(".encoder_attn." in name for name in tensors):
        raise UserError(
            f"{path}: holds a decoder with cross-attention and no encoder: give the state dict of "
            "the whole EncoderDecoder"
        )
    if found is None:
        raise UserError(
            f"{path}: Encoder and Decoder have the same names of tensors, and the options fit "
            f"{'both' if named else 'neither'}: give those of one of them with --config, at least "
            "encoder_layers or decoder_layers"
        )
    return "encoder" if found == "encoder" else "decoder"


def _stacks(tensors: Mapping[str, Tensor], architecture: Architecture) -> list[Stack]:
    if architecture == "encoder_decoder":
        return [Stack(side, f"{side}.", f"{side}.") for side in ("encoder", "decoder")]
    prefix = f"{architecture}."
    has_prefix = any(name.startswith(prefix) for name in tensors)
    return [Stack(architecture, prefix if has_prefix else "", "")]


def _check_tables(
    stacks: list[Stack], tensors: Mapping[str, Tensor], vocab_size: int, path: Path
) -> None:
    """Refuse tables without rows, and tables by token of another size than the options'."""
    for stack in stacks:
        for table in ("embed_tokens", "output_projection", "embed_positions"):
            name = f"{stack.theirs}{table}.weight"
            if name not in tensors:
                continue
            shape = tuple(tensors[name].shape)
            if len(shape) != 2:
                raise UserError(
                    f"{path}: {name} is of shape {shape}, and a table has two dimensions, its rows "
                    "and their width: give the state dict as the model has it"
                )
            if table != "embed_positions" and vocab_size > 0 and vocab_size != shape[0]:
                raise UserError(
                    f"{path}: {name} has {shape[0]} rows, and by the options vocab_size is "
                    f"{vocab_size}: give vocab_size={shape[0]} with --config, or this model's "
                    "own options"
                )


class _Embeddings(NamedTuple):
    """The keys about embeddings, notes, and the tensors that are copies of another one."""

    keys: dict[str, Any]
    notes: list[str]
    copies: set[str]


def _embedding_keys(
    stacks: list[Stack], tensors: Mapping[str, Tensor], options: Mapping[str, Any], path: Path
) -> _Embeddings:
    """The sharing of embeddings, decided by the tensors: equal tensors are one."""
    tables = {stack.side: f"{stack.theirs}embed_tokens.weight" for stack in stacks}
    for name in tables.values():
        if name not in tensors:
            raise UserError(
                f"{path}: {name} is missing, so the model was fed with embeddings from outside, "
                "and Magnetar's read tokens: add the embedding's weight under this name"
            )
    last = stacks[-1]
    table, output = tables[last.side], f"{last.theirs}output_projection.weight"
    notes, copies = [], set()
    claims_tie = any(
        options.get(name, False)
        for name in (
            "share_all_embeddings",
            "share_decoder_input_output_embed",
            "share_encoder_input_output_embed",
        )
    )
    has_output = output in tensors
    is_tied = has_output and are_equal(tensors[table], tensors[output])
    if is_tied:
        copies.add(output)
    if not has_output and options["vocab_size"] > 0 and not options["no_output_layer"]:
        has_output = True  # the tensor is missing, unless it is tied to the embedding
        is_tied = claims_tie
    if has_output and claims_tie != is_tied:
        notes.append(_contradiction(is_tied, table, output))
    if not has_output:
        notes.append("output_projection=false: the model has no output matrix and gives features")
    keys: dict[str, Any] = {
        "vocab_size": tensors[table].size(0),
        "output_projection": has_output,
        "tie_embeddings": is_tied,
    }
    if len(stacks) == 2:
        ours = tables["encoder"]
        sizes = tensors[ours].size(0), tensors[table].size(0)
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{path}: {ours} has {sizes[0]} rows and {table} {sizes[1]}: Magnetar's encoder "
                "and decoder have one vocabulary, so this model cannot be imported"
            )
        keys["share_embeddings"] = are_equal(tensors[ours], tensors[table])
        if keys["share_embeddings"]:
            copies.add(ours)
        if options["share_all_embeddings"] != keys["share_embeddings"]:
            notes.append(_contradiction(keys["share_embeddings"], ours, table))
    return _Embeddings(keys, notes, copies)


def _contradiction(are_equal: bool, first: str, second: str) -> str:
    if are_equal:
        return f"{first} and {second} are equal, so they are one, which the options do not say"
    return f"{first} and {second} differ, so they stay two, though the options share them"


class _Positions(NamedTuple):
    """The keys about positions, and notes."""

    keys: dict[str, Any]
    notes: list[str]


def _position_keys(
    stacks: list[Stack],
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> _Positions:
    """The positions that are added to the embedding: their kind and their number."""
    kinds, lengths, notes = {}, {}, []
    for stack in stacks:
        name = f"{stack.theirs}embed_positions"
        table = checkpoint.tensors.get(f"{name}.weight")
        source = "source" if stack.side == "encoder" else "target"
        lengths[stack.side] = resolved[f"max_{source}_positions"]
        has_fairseqs = checkpoint.kind == "fairseq" and not (
            options.get("no_token_positional_embeddings")
        )
        if table is not None:
            kinds[stack.side] = "learned"
            lengths[stack.side] = table.size(0) - FIRST_POSITION
            notes.append(
                f"{name}.weight: positions start at its row {FIRST_POSITION}, so max "
                f"{table.size(0) - FIRST_POSITION} tokens"
            )
            if table.size(0) <= FIRST_POSITION:
                raise UserError(
                    f"{checkpoint.path}: {name}.weight has {table.size(0)} rows, and positions "
                    f"start at row {FIRST_POSITION}: a table needs 3 rows or more"
                )
        elif has_fairseqs and options.get(f"{stack.side}_learned_pos"):
            raise UserError(
                f"{checkpoint.path}: {name}.weight is missing, and {stack.side}_learned_pos=true: "
                "give a file with all of the model's tensors"
            )
        elif has_fairseqs or f"{name}._float_tensor" in checkpoint.tensors:
            kinds[stack.side] = "sinusoidal_fairseq"
        else:
            kinds[stack.side] = "none"
    if len(set(kinds.values())) == 2:
        raise UserError(
            f"{checkpoint.path}: the encoder's positions are {kinds['encoder']} and the decoder's "
            f"{kinds['decoder']}: Magnetar's are of one kind, so this model cannot be imported"
        )
    keys = {"positions": kinds[stacks[0].side], "max_seq_len": lengths[stacks[0].side]}
    if len(stacks) == 2 and lengths["decoder"] != lengths["encoder"]:
        keys["max_target_len"] = lengths["decoder"]
    return _Positions(keys, notes)


def _model_config(keys: dict[str, Any], source: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(keys)
    except ValidationError as error:
        lines = [
            ".".join(str(part) for part in problem["loc"])
            + (": " if problem["loc"] else "")
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise UserError(
            f"{source}: its options make no model of Magnetar's: " + "; ".join(lines)
        ) from None


def _make_tensors(
    config: ModelConfig,
    stacks: list[Stack],
    tensors: Mapping[str, Tensor],
    copies: set[str],
    path: Path,
) -> dict[str, Tensor]:
    """All tensors of the model; each of TorchScale's is used once, and copies are left out."""
    recipes: dict[str, Recipe] = {}
    for name, shape in tensor_shapes(config).items():
        stack = next(stack for stack in stacks if name.startswith(stack.ours))
        recipes[name] = recipe(name, tuple(shape), stack)
    expected = {name: shape for made in recipes.values() for name, shape in made.sources.items()}
    found = {name: tuple(t.shape) for name, t in tensors.items() if name not in copies}
    _check_experts(config, found, path)
    try:
        check_tensors(expected, found)
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; give the options that the model was built with"
        ) from None
    return {name: made.make(tensors) for name, made in recipes.items()}


def _check_experts(config: ModelConfig, found: Mapping[str, Any], path: Path) -> None:
    """Refuse a file with another number of experts, as the file of a single rank has."""
    if config.moe is None:
        return
    name = next((name for name in found if ".experts." in name), None)
    if name is None:
        return
    layer = name.split(".experts.")[0]
    indices = {
        other.removeprefix(f"{layer}.experts.").split(".")[0]
        for other in found
        if other.startswith(f"{layer}.experts.")
    }
    if len(indices) != config.moe.num_experts:
        raise UserError(
            f"{path}: {layer} has {len(indices)} experts, and moe_expert_count="
            f"{config.moe.num_experts}: of a model that was trained on several ranks, give the "
            "shared file and the file of every rank"
        )


def report(imported: Imported, out: Path) -> list[str]:
    """A report in lines: the imported model, and how to load it."""
    config = imported.config
    rows = [("was", imported.source), ("is", f"{config.architecture}, norm {config.norm}")]
    rows.append(("parameters", f"{imported.num_parameters:,}"))
    if config.moe is not None:
        num_layers = sum(
            config.is_moe_layer(index)
            for depth in (config.encoder_depth, config.decoder_depth)
            for index in range(depth)
        )
        rows.append(("experts", f"{config.moe.num_experts} in each of {num_layers} MoE layers"))
    rows += [("note", note) for note in imported.notes]
    rows.append(("wrote", str(out)))
    width = max(len(name) for name, _ in rows)
    return [
        *(f"{name:<{width}}  {text}" for name, text in rows),
        "",
        *how_to_load(out, config.architecture),
    ]
