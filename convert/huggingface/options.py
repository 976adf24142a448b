"""The keys of a transformers config.json as keys of `magnetar.model`.

A key that changes the function is read and has a counterpart, or one value that is ours. Every
other key is refused: none is ignored unless it is known to change no logit.
"""

from collections.abc import Callable, Mapping
from typing import Any

from magnetar.data.errors import UserError

# What says how a model is stored, started, generated from or trained, not what it computes.
_WITHOUT_EFFECT = {
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_REQUIRED = object()
# Their keys of each rope_type, with ours.
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "swish",
    "swish": "swish",
}


class Options:
    """The keys of a config.json; it keeps account of those that have been read.

    Attributes:
        file: path of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        """Nothing has been read."""
        self.file = file
        self._values = values
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the file has a key."""
        return name in self._values

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key.

        Raises:
            UserError: if the key is missing and has no default.
        """
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            raise UserError(f"{self.file}: {name} is missing: copy the file again")
        return default

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse a key with a value other than these; the first is that of a missing key."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            self.refuse(name, value, f"must be {' or '.join(map(repr, allowed))}")

    def refuse(self, name: str, value: Any, rule: str) -> None:
        """Raise a UserError about a key."""
        raise UserError(
            f"{self.file}: {name}={value!r} {rule}, since Magnetar has no layer for it: convert "
            "another model"
        )

    def require_all_read(self) -> None:
        """Refuse the first key that nobody has read, unless it has no effect."""
        for name, value in self._values.items():
            known = name in self._read | _WITHOUT_EFFECT or name.startswith(("_", "summary_"))
            if not known:
                self.refuse(name, value, "is a key that this conversion does not understand")


def model_keys(values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The keys of `magnetar.model`.

    Args:
        values: keys of a config.json.
        file: its path, for messages.

    Raises:
        UserError: if the config describes a model that Magnetar does not have.
    """
    options = Options(values, file)
    model_type = options.take("model_type")
    if model_type not in FAMILIES:
        options.refuse("model_type", model_type, f"must be one of {', '.join(FAMILIES)}")
    options.require("is_encoder_decoder", False)
    keys = FAMILIES[model_type](options)
    options.require_all_read()
    return keys


def _with_rotary(options: Options, theta: float = 10000.0) -> dict[str, Any]:
    """The keys of every decoder with rotary positions and RMSNorm.

    Args:
        options: keys of the config.
        theta: rope_theta of a config without one.
    """
    options.require("hidden_act", "silu", "swish")
    if options.take("use_sliding_window", True):
        options.require("sliding_window", None)
    else:
        options.take("sliding_window", None)
    return {
        "vocab_size": options.take("vocab_size"),
        "num_layers": options.take("num_hidden_layers"),
        "d_model": options.take("hidden_size"),
        "d_ff": options.take("intermediate_size"),
        "num_heads": options.take("num_attention_heads"),
        "num_kv_heads": options.take("num_key_value_heads"),
        "head_dim": options.take("head_dim", None),
        "max_seq_len": options.take("max_position_embeddings"),
        "norm": "pre",
        "norm_type": "rmsnorm",
        "norm_eps": options.take("rms_norm_eps"),
        "bias": False,
        "activation": "swiglu",
        "attention_positions": "rotary",
        **_rope(options, theta),
        "attention_dropout": float(options.take("attention_dropout", 0.0)),
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def _rope(options: Options, theta: float) -> dict[str, Any]:
    """The keys of rotary positions, from the names of version 5 or of earlier ones."""
    theta = options.take("rope_theta", theta)
    old, new = (options.take(key, None) or {} for key in ("rope_scaling", "rope_parameters"))
    rope = {name: value for name, value in {**old, **new}.items() if name != "type"}
    theta = rope.pop("rope_theta", theta)
    kind = rope.pop("rope_type", old.get("type", "default"))
    if kind not in _ROPE_KEYS:
        options.refuse("rope_type", kind, f"must be one of {', '.join(_ROPE_KEYS)}")
    keys = _ROPE_KEYS[kind]
    for name, value in rope.items():
        if name not in keys:
            options.refuse(f"rope_parameters.{name}", value, f"does not belong to rope_type {kind}")
    missing = [name for name in keys if name not in rope]
    if missing:
        options.refuse("rope_type", kind, f"needs {missing[0]}")
    scaling = {keys[name]: value for name, value in rope.items()}
    lengths = {"original_max_seq_len": int}
    scaling = {name: lengths.get(name, float)(value) for name, value in scaling.items()}
    return {"rope_theta": float(theta), "rope_scaling": scaling or None}


def _llama(options: Options) -> dict[str, Any]:
    keys = _with_rotary(options)
    bias, other = options.take("attention_bias", False), options.take("mlp_bias", False)
    if bias != other:
        options.refuse("attention_bias", bias, f"must be that of mlp_bias, {other!r}")
    return keys | {"bias": bias}


def _qwen3(options: Options) -> dict[str, Any]:
    options.take("max_window_layers", None)  # of no effect without a window
    for kind in options.take("layer_types", []):
        if kind != "full_attention":
            options.refuse("layer_types", kind, 'must be "full_attention" in every layer')
    options.require("attention_bias", False)
    return _with_rotary(options) | {"qk_norm": True}


def _qwen3_moe(options: Options) -> dict[str, Any]:
    keys, dense = _qwen3(options), sorted(options.take("mlp_only_layers", []))
    if dense != list(range(len(dense))):
        options.refuse("mlp_only_layers", dense, "must be the first layers, 0, 1, 2 and so on")
    name = "num_local_experts" if "num_local_experts" in options else "num_experts"
    moe = _experts(options, name, options.take("norm_topk_prob")) | {
        "every": options.take("decoder_sparse_step"),
        "first_dense_layers": len(dense),
        "expert_d_ff": options.take("moe_intermediate_size"),
    }
    return keys | {"moe": moe}


def _olmoe(options: Options) -> dict[str, Any]:
    options.require("attention_bias", False)
    options.require("clip_qkv", None)
    moe = _experts(options, "num_experts", options.take("norm_topk_prob"))
    return _with_rotary(options) | {"qk_norm": True, "qk_norm_over": "all_heads", "moe": moe}


def _mixtral(options: Options) -> dict[str, Any]:
    moe = _experts(options, "num_local_experts", normalized=True)
    moe["jitter"] = float(options.take("router_jitter_noise", 0.0))
    return _with_rotary(options, theta=1e6) | {"moe": moe}


def _experts(options: Options, name: str, normalized: bool) -> dict[str, Any]:
    """The keys of `moe`.

    Args:
        options: keys of the config.
        name: key with the number of experts.
        normalized: whether the weights of a token's experts sum to 1.
    """
    top_k = options.take("num_experts_per_tok")
    if top_k == 1 and normalized:
        rule = "with weights that sum to 1 gives its router no gradient"
        options.refuse("num_experts_per_tok", top_k, rule)
    return {
        "num_experts": options.take(name),
        "every": 1,
        "top_k": top_k,
        "router": "linear",
        "normalize_weights": "before_dropping" if normalized else "never",
    }


def _gpt2(options: Options) -> dict[str, Any]:
    d_model, length = options.take("n_embd"), options.take("n_positions")
    options.require("n_ctx", length)
    options.require("scale_attn_weights", True)
    for name in (
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    ):
        options.require(name, False)
    dropout = options.take("resid_pdrop")
    if options.take("embd_pdrop") != dropout:
        options.refuse("resid_pdrop", dropout, "must be embd_pdrop")
    return {
        "vocab_size": options.take("vocab_size"),
        "num_layers": options.take("n_layer"),
        "d_model": d_model,
        "d_ff": options.take("n_inner", None) or 4 * d_model,
        "num_heads": options.take("n_head"),
        "max_seq_len": length,
        "norm": "pre",
        "norm_eps": options.take("layer_norm_epsilon"),
        "activation": _activation(options),
        "dropout": float(dropout),
        "attention_dropout": float(options.take("attn_pdrop")),
        "tie_embeddings": options.take("tie_word_embeddings", True),
    }


def _opt(options: Options) -> dict[str, Any]:
    """The keys of an OPT model, whose dropout leaves the embeddings out and ours does not."""
    d_model = options.take("hidden_size")
    options.require("word_embed_proj_dim", d_model)
    for name in ("enable_bias", "layer_norm_elementwise_affine"):
        options.require(name, True)
    options.require("_remove_final_layer_norm", False)
    options.require("layerdrop", 0.0)
    options.take("init_std")  # of no effect on trained weights
    return {
        "vocab_size": options.take("vocab_size"),
        "num_layers": options.take("num_hidden_layers"),
        "d_model": d_model,
        "d_ff": options.take("ffn_dim"),
        "num_heads": options.take("num_attention_heads"),
        "max_seq_len": options.take("max_position_embeddings"),
        "norm": "pre" if options.take("do_layer_norm_before", True) else "post",
        "activation": _activation(options),
        "dropout": float(options.take("dropout")),
        "attention_dropout": float(options.take("attention_dropout", 0.0)),
        "tie_embeddings": options.take("tie_word_embeddings", True),
    }


def _activation(options: Options) -> str:
    """The activation of a feed-forward network without a gate."""
    options.require("activation_function", *_ACTIVATIONS)
    return _ACTIVATIONS[options.take("activation_function")]


FAMILIES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "opt": _opt,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
