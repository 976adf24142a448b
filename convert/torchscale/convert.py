"""A model of TorchScale 0.3.0, dense or sparse, as a Magnetar folder of weights.

The model of that folder has the same function in evaluation: the same logits for the same tokens at
every position that is not padding. The tensors decide what the files leave open. If the options tie
embeddings and the tensors differ, the embeddings are not tied.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnetar.convert.experts import experts_of_layers
from magnetar.convert.folders import checked_model, require_new, write_folder
from magnetar.convert.torchscale.names import (
    FIRST_POSITION,
    NOT_WEIGHTS,
    XPOS,
    Recipe,
    Stack,
    recipe,
)
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
from magnetar.models.weights.files import in_memory
from magnetar.models.weights.load_save import check_tensors, tensor_shapes

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
_LAYER = re.compile(r"((?:.*?\.)??)(?:(?:encoder|decoder)\.)?layers\.\d+\.")
# Relative errors of xPos's table: in bfloat16, and in float32 on another machine.
_LARGEST_ROUNDING, _SMALLEST_ROUNDING = 2**-8, 2**-20
_TIES = (
    "share_all_embeddings",
    "share_decoder_input_output_embed",
    "share_encoder_input_output_embed",
)


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


@dataclass(frozen=True)
class _Model:
    """A TorchScale model: its tensors, what its options mean, and the notes about them."""

    path: Path
    tensors: dict[str, Tensor]
    stacks: list[Stack]
    options: Mapping[str, Any]
    notes: list[str]


def import_torchscale(
    paths: Sequence[Path], out: Path, config: Path | None = None, trust: bool = False
) -> list[str]:
    """A report in lines, after writing a TorchScale model to a new folder.

    Args:
        paths: files of the model, see `read_checkpoint`.
        out: new folder, see `require_new`.
        config: a JSON of TorchScale's options; they replace those of the file one by one.
        trust: whether the files may run code.
    """
    require_new(out)
    given = None if config is None else read_options(config)
    num_experts = (given or {}).get("moe_expert_count")
    checkpoint = read_checkpoint(
        paths, num_experts if isinstance(num_experts, int) else None, trust
    )
    if given is not None:
        check_names(given, str(config))
    imported = translate(checkpoint, given, config)
    ours = imported.config
    tensors = in_memory(imported.tensors)
    num_parameters = sum(prod(shape) for shape in tensors.shapes.values())
    rows = [
        ("was", imported.source),
        ("is", f"{ours.architecture}, norm {ours.norm}"),
        ("parameters", f"{num_parameters:,}"),
    ]
    if ours.moe is not None:
        num_layers = len(experts_of_layers(tensors.specs))
        rows.append(("experts", f"{ours.moe.num_experts} in each of {num_layers} MoE layers"))
    rows += [("note", note) for note in imported.notes]
    rows.append(("wrote", str(out)))
    return write_folder(out, ours, tensors, rows)


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
    outer = _outer_prefix(tensors, path)
    architecture = _architecture(tensors, outer, options, path)
    is_fairseqs = checkpoint.kind == "fairseq"
    if is_fairseqs and architecture != "encoder":
        # Its language models take the length of their samples for the number of positions.
        length = options.get("max_target_positions") or options.get("tokens_per_sample")
        options["max_target_positions"] = length or _FAIRSEQ_POSITIONS
    for some, place in ((given, source), (checkpoint.options, str(path))):
        # Among a program's other arguments an option of another class means nothing.
        if some is not None and (some is given or checkpoint.kind == "options"):
            check_belonging(some, architecture, place)
    resolved = resolve(architecture, options, source, final=is_fairseqs)
    keys, notes = model_keys(architecture, resolved, source)
    model = _Model(path, tensors, _stacks(tensors, outer, architecture), resolved, [])
    _check_tables(model)
    embeddings, copies = _embedding_keys(model)
    # fairseq adds sines where neither a table nor an option says otherwise.
    has_sines = is_fairseqs and not options.get("no_token_positional_embeddings")
    positions = _position_keys(model, checkpoint, options if has_sines else None)
    config = checked_model(
        {**keys, **embeddings, **positions}, f"{source}: its options make no model of Magnetar's"
    )
    _check_xpos(config, model, checkpoint)
    made = _make_tensors(config, model, copies)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"})
    if dtypes:
        notes.append(f"{', '.join(dtypes)} in the file, float32 in the folder")
    kind = f"TorchScale {CLASSES[architecture].removesuffix('Config')}"
    return Imported(
        source=kind + " in a checkpoint of fairseq" * is_fairseqs,
        config=config,
        tensors=made,
        notes=model.notes + notes,
    )


def _all_options(checkpoint: Checkpoint, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of the file, replaced by those of the other file."""
    if checkpoint.options is None and given is None:
        *classes, last = CLASSES.values()
        raise UserError(
            f"{checkpoint.path}: holds tensors alone, and they do not say how many heads there "
            f"are: give the arguments of TorchScale's {', '.join(classes)} or {last} with --config "
            'FILE.json, such as {"decoder_layers": 6, "decoder_attention_heads": 8}'
        )
    if checkpoint.kind == "options":
        check_names(checkpoint.options or (), str(checkpoint.path))
    return dict(checkpoint.options or {}) | dict(given or {})


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


def _outer_prefix(tensors: Iterable[str], path: Path) -> str:
    """What comes before all names of the model, such as "model.", or nothing."""
    layers = (match for name in tensors if (match := _LAYER.match(name)))
    first, *others = dict.fromkeys(match[1] for match in layers)
    if others:
        raise UserError(
            f"{path}: holds several models, with layers under {first or 'no prefix'} and under "
            f"{others[0] or 'no prefix'}: give the state dict of one of them"
        )
    for name in tensors:
        if not name.startswith(first):
            raise UserError(
                f"{path}: {name} is not under {first} as the model's layers are: call it "
                f"{first}{name} if it is the model's, and take it out of the file if it is not"
            )
    return first


def _architecture(
    tensors: Mapping[str, Tensor], outer: str, options: Mapping[str, Any], path: Path
) -> Architecture:
    """The architecture by the names of the tensors or, if these leave it open, of the options."""
    sides = [
        side
        for side in ("encoder", "decoder")
        if any(name.startswith(f"{outer}{side}.layers.") for name in tensors)
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


def _stacks(tensors: Iterable[str], outer: str, architecture: Architecture) -> list[Stack]:
    if architecture == "encoder_decoder":
        return [Stack(side, f"{outer}{side}.", f"{side}.") for side in ("encoder", "decoder")]
    prefix = f"{outer}{architecture}."
    has_prefix = any(name.startswith(prefix) for name in tensors)
    return [Stack(architecture, prefix if has_prefix else outer, "")]


def _check_tables(model: _Model) -> None:
    """Refuse tables without rows, and tables by token of another size than the options'."""
    vocab_size = model.options["vocab_size"]
    for stack in model.stacks:
        for table in ("embed_tokens", "output_projection", "embed_positions"):
            name = f"{stack.theirs}{table}.weight"
            if name not in model.tensors:
                continue
            shape = tuple(model.tensors[name].shape)
            if len(shape) != 2:
                raise UserError(
                    f"{model.path}: {name} is of shape {shape}, and a table has two dimensions, "
                    "its rows and their width: give the state dict as the model has it"
                )
            if table != "embed_positions" and vocab_size > 0 and vocab_size != shape[0]:
                raise UserError(
                    f"{model.path}: {name} has {shape[0]} rows, and by the options vocab_size is "
                    f"{vocab_size}: give vocab_size={shape[0]} with --config, or this model's "
                    "own options"
                )


def _check_xpos(config: ModelConfig, model: _Model, checkpoint: Checkpoint) -> None:
    """Compare the table of xPos, which TorchScale reads from the file and Magnetar computes."""
    rounded: dict[str, float] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(XPOS):
            continue
        if not model.options["xpos_rel_pos"]:
            raise UserError(
                f"{model.path}: {name} belongs to xPos, and by the options xpos_rel_pos is false: "
                "give xpos_rel_pos=true with --config, or this model's own options"
            )
        width = config.d_model // config.num_heads
        # zeta of arXiv 2212.10554, as TorchScale computes it.
        expected = (torch.arange(0, width, 2) + 0.4 * width) / (1.4 * width)
        if tensor.shape != expected.shape:
            raise UserError(
                f"{model.path}: {name} is of shape {tuple(tensor.shape)}, and of heads of width "
                f"{width}, as the options have them, it is {tuple(expected.shape)}: give the "
                f"{model.stacks[-1].side}_attention_heads that the model was built with"
            )
        error = ((tensor.float() - expected) / expected).abs().max().item()
        if not error < _LARGEST_ROUNDING:
            raise UserError(
                f"{model.path}: {name} is not the table that TorchScale computes for heads of "
                f"width {width}: give the options that the model was built with, or take it out "
                "for positions by TorchScale's formula"
            )
        if error > _SMALLEST_ROUNDING:
            rounded[name] = error
    if rounded:
        model.notes.append(
            f"{next(iter(rounded))} is rounded in the file, by up to {max(rounded.values()):.1e}, "
            "and Magnetar computes it in float32: logits differ from those of a TorchScale that "
            "uses the rounded ones, and equal those of one that computes them"
        )


def _embedding_keys(model: _Model) -> tuple[dict[str, Any], set[str]]:
    """The keys about embeddings, and the tensors that are copies of another one.

    The tensors decide what is shared: equal ones are one.
    """
    tensors, options = model.tensors, model.options
    tables = [f"{stack.theirs}embed_tokens.weight" for stack in model.stacks]
    for name in tables:
        if name not in tensors:
            raise UserError(
                f"{model.path}: {name} is missing, and Magnetar's models read tokens: add the "
                "embedding's weight under this name, also if the model was fed with embeddings "
                "from outside"
            )
    table, output = tables[-1], f"{model.stacks[-1].theirs}output_projection.weight"
    claims_tie = any(options.get(name, False) for name in _TIES)
    has_output = output in tensors
    is_tied = has_output and are_equal(tensors[table], tensors[output])
    copies = {output} if is_tied else set()
    if not has_output and options["vocab_size"] > 0 and not options["no_output_layer"]:
        has_output = True  # the tensor is missing, unless it is tied to the embedding
        is_tied = claims_tie
    if has_output and claims_tie != is_tied:
        model.notes.append(_contradiction(is_tied, table, output))
    if not has_output:
        model.notes.append(
            "output_projection=false: the model has no output matrix and gives features"
        )
    keys: dict[str, Any] = {
        "vocab_size": tensors[table].size(0),
        "output_projection": has_output,
        "tie_embeddings": is_tied,
    }
    if len(tables) == 2:
        sizes = [tensors[name].size(0) for name in tables]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{model.path}: {tables[0]} has {sizes[0]} rows and {table} {sizes[1]}: Magnetar's "
                "encoder and decoder have one vocabulary, so this model cannot be imported"
            )
        is_shared = are_equal(tensors[tables[0]], tensors[table])
        keys["share_embeddings"] = is_shared
        if is_shared:
            copies.add(tables[0])
        if options["share_all_embeddings"] != is_shared:
            model.notes.append(_contradiction(is_shared, tables[0], table))
    return keys, copies


def _contradiction(are_equal: bool, first: str, second: str) -> str:
    if are_equal:
        return f"{first} and {second} are equal, so they are one, which the options do not say"
    return f"{first} and {second} differ, so they stay two, though the options share them"


def _position_keys(
    model: _Model, checkpoint: Checkpoint, fairseqs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The keys about the positions that are added to the embedding: their kind and their number.

    Args:
        model: the model.
        checkpoint: its file, which may mark positions by what is no weight.
        fairseqs: fairseq's options, if it adds sines where there is no table.
    """
    kinds, lengths = [], []
    for side, theirs, _ in model.stacks:
        name = f"{theirs}embed_positions"
        table = model.tensors.get(f"{name}.weight")
        length = model.options[f"max_{'source' if side == 'encoder' else 'target'}_positions"]
        if table is not None:
            kind, length = "learned", table.size(0) - FIRST_POSITION
            model.notes.append(
                f"{name}.weight: positions start at its row {FIRST_POSITION}, so max {length} "
                "tokens"
            )
            if length <= 0:
                raise UserError(
                    f"{model.path}: {name}.weight has {table.size(0)} rows, and positions start at "
                    f"row {FIRST_POSITION}: a table needs 3 rows or more"
                )
        elif fairseqs is not None and fairseqs.get(f"{side}_learned_pos"):
            raise UserError(
                f"{model.path}: {name}.weight is missing, and {side}_learned_pos=true: give a file "
                "with all of the model's tensors"
            )
        elif fairseqs is not None or f"{name}._float_tensor" in checkpoint.tensors:
            kind = "sinusoidal_fairseq"
        else:
            kind = "none"
        kinds.append(kind)
        lengths.append(length)
    if kinds[0] != kinds[-1]:
        raise UserError(
            f"{model.path}: the encoder's positions are {kinds[0]} and the decoder's {kinds[1]}: "
            "Magnetar's are of one kind, so this model cannot be imported"
        )
    keys = {"positions": kinds[0], "max_seq_len": lengths[0]}
    return keys | ({"max_target_len": lengths[1]} if lengths[0] != lengths[-1] else {})


def _make_tensors(config: ModelConfig, model: _Model, copies: set[str]) -> dict[str, Tensor]:
    """All tensors of the model; each of TorchScale's is used once, and copies are left out."""
    recipes: dict[str, Recipe] = {}
    for name, shape in tensor_shapes(config).items():
        stack = next(stack for stack in model.stacks if name.startswith(stack.ours))
        recipes[name] = recipe(name, tuple(shape), stack)
    expected = {name: shape for made in recipes.values() for name, shape in made.sources.items()}
    found = {name: tuple(t.shape) for name, t in model.tensors.items() if name not in copies}
    _check_experts(config, found, model.path)
    try:
        check_tensors(expected, found)
    except ValueError as error:
        raise UserError(
            f"{model.path}: {error}; give the options that the model was built with"
        ) from None
    return {name: made.make(model.tensors) for name, made in recipes.items()}


def _check_experts(config: ModelConfig, found: Iterable[str], path: Path) -> None:
    """Refuse a file with another number of experts, as the file of a single rank has."""
    experts: dict[str, set[str]] = defaultdict(set)
    for name in found:
        layer, _, rest = name.partition(".experts.")
        if rest:
            experts[layer].add(rest.partition(".")[0])
    for layer, indices in experts.items():
        if config.moe is not None and len(indices) != config.moe.num_experts:
            raise UserError(
                f"{path}: {layer} has {len(indices)} experts, and moe_expert_count="
                f"{config.moe.num_experts}: of a model that was trained on several ranks, give the "
                "shared file and the file of every rank"
            )
