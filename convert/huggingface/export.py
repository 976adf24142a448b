"""A trained model as a folder that transformers opens with trust_remote_code.

config.json              model, which magnetar.load reads, too, and what transformers needs
model.safetensors        or shards of it; the names are our own
modeling_magnetar.py     the model in plain PyTorch, which needs nothing of Magnetar
tokenizer.model|json     the vocabulary; tokenization_magnetar.py reads one of SentencePiece
README.md                the model card
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from magnetar.convert.export import DTYPES
from magnetar.convert.folders import aligned, checked_numbers, open_whole, warning_rows, watched
from magnetar.data.errors import UserError
from magnetar.data.text.tokenizer import PROBE, SentencePieceTokenizer, Tokenizer
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import as_type
from magnetar.models.weights.load_save import write_weights

MODELING, TOKENIZATION = "modeling_magnetar", "tokenization_magnetar"
CLASSES = {
    "decoder": ("AutoModelForCausalLM", "MagnetarForCausalLM"),
    "encoder": ("AutoModelForMaskedLM", "MagnetarForMaskedLM"),
    "encoder_decoder": ("AutoModelForSeq2SeqLM", "MagnetarForSeq2SeqLM"),
}
# Keys that modeling_magnetar.py reads, or that change nothing outside training.
_CARRIED = """
architecture vocab_size num_layers num_decoder_layers d_model d_ff num_heads max_seq_len
max_target_len norm norm_eps activation positions attention_positions relative_buckets
relative_max_distance xpos_scale_base dropout attention_dropout activation_dropout drop_path
qk_norm scale_embedding embedding_norm stable_embedding tie_embeddings share_embeddings moe
cross_attention_inner_norm relative_bidirectional moe.num_experts moe.every moe.top_k
moe.ep_size moe.placement moe.router moe.gate moe.d_router moe.frozen moe.jitter moe.dispatch
moe.capacity_factor moe.capacity_order moe.capacity_scope moe.aux_loss_weight
moe.balance_scope moe.router_z_loss_weight moe.second_expert moe.normalize_weights
moe.normalize_tokens moe.learned_temperature moe.route_padding moe.time_major
"""
CARRIED = frozenset(_CARRIED.split())
_CARD = """---
library_name: transformers
tags: [magnetar]
---

A {architecture} of Magnetar: {num_layers} layers, d_model {d_model}, norm {norm}{experts}.

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = {auto_class}.from_pretrained(FOLDER, trust_remote_code=True)
```

The weights are {dtype}. The losses of MoE layers are not computed here: train with Magnetar.
"""


def to_hf(
    path: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    tokenizer: Path | None = None,
    dtype: str = "float32",
    shard_bytes: int | None = None,
) -> list[str]:
    """A report in lines, after writing a model as a folder for transformers.

    Args:
        path: folder of a run, of a checkpoint, or of weights.
        out: new folder.
        checkpoint: name of the checkpoint; None: the newest complete one.
        tokenizer: path of the vocabulary, if it is no longer where the run found it.
        dtype: type of the written weights, a key of DTYPES.
        shard_bytes: largest size of a file, see `write_files`.

    Raises:
        UserError: if the model has a key that modeling_magnetar.py does not compute.
    """
    source = open_whole(path, out, checkpoint)
    require_exportable(source.config)
    auto_class, model_class = CLASSES[source.config.architecture]
    found = source.find_tokenizer(tokenizer, "--tokenizer")
    if found is None and (tokenizer is not None or source.checkpoint is not None):
        source.require_tokenizer(tokenizer, "--tokenizer")  # which says where it was looked for
    about: dict[str, Any] = {
        "model_type": "magnetar",
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": f"{MODELING}.MagnetarConfig",
            auto_class: f"{MODELING}.{model_class}",
        },
        "dtype": dtype,
    }
    files = {f"{MODELING}.py": _code(MODELING)}
    files["README.md"] = _card(source.config, auto_class, dtype).encode()
    rows = [("exported", str(source.path))]
    if found is not None:
        about |= {"eos_token_id": found.eos_id, "pad_token_id": found.eos_id}
        if source.config.architecture == "encoder_decoder":
            about["decoder_start_token_id"] = found.eos_id
        files |= tokenizer_files(found, source.config)
        if not _encodes_alike(found):
            what = "transformers reads it with its own normalizer, prefixes or special tokens"
            rows.append(("warning", f"{found.file_name}: {what}, which training left out"))
    tensors, warnings = checked_numbers(as_type(source.tensors, DTYPES[dtype]))
    options: dict[str, Any] = {"shard_bytes": shard_bytes, "about": about, "other_files": files}
    write_weights(out, source.config, tensors, watch=watched, **options)
    size = sum(spec.num_bytes for spec in tensors.specs.values())
    rows += [("tensors", f"{len(tensors.specs)}, {size:,} bytes of {dtype}"), ("wrote", str(out))]
    return [
        *aligned([*rows, *warning_rows(warnings)]),
        "",
        f"from transformers import {auto_class}",
        f"model = {auto_class}.from_pretrained({str(out)!r}, trust_remote_code=True)",
    ]


def require_exportable(config: ModelConfig) -> None:
    """Refuse a model with a key that modeling_magnetar.py does not compute.

    Raises:
        UserError: naming the first such key.
    """
    sections = {"": config} if config.moe is None else {"": config, "moe.": config.moe}
    for prefix, section in sections.items():
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if prefix + name not in CARRIED and value != field.default:
                raise UserError(
                    f"model.{prefix}{name}={json.dumps(value)} has no counterpart in "
                    f"{MODELING}.py, so transformers would compute another function: use magnetar "
                    f"convert export, or a model with {json.dumps(field.default)}"
                )


def tokenizer_files(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, bytes]:
    """Name -> content of the files that AutoTokenizer reads."""
    files: dict[str, bytes] = {tokenizer.file_name: tokenizer.file_content}
    settings: dict[str, Any] = {
        "model_max_length": config.max_seq_len,
        "padding_side": "left" if config.architecture == "decoder" else "right",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        files[f"{TOKENIZATION}.py"] = _code(TOKENIZATION)
        name = f"{TOKENIZATION}.MagnetarTokenizer"
        settings |= {
            "tokenizer_class": "MagnetarTokenizer",
            "auto_map": {"AutoTokenizer": [name, None]},
        }
    settings |= dict.fromkeys(("eos_token", "pad_token"), tokenizer.eos_token)
    files["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
    return files


def _encodes_alike(tokenizer: Tokenizer) -> bool:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return True
    plain = tokenizers.Tokenizer.from_str(tokenizer.file_content.decode("utf-8-sig"))
    return plain.encode(PROBE).ids == tokenizer.encode(PROBE)


def _code(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}.py").read_bytes()


def _card(config: ModelConfig, auto_class: str, dtype: str) -> str:
    moe = config.moe
    experts = "" if moe is None else f", {moe.num_experts} experts ({moe.router}, top-{moe.top_k})"
    keys = config.model_dump() | {"architecture": config.architecture.replace("_", "-")}
    return _CARD.format(**keys, experts=experts, auto_class=auto_class, dtype=dtype)
