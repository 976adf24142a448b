"""TorchScale 0.3.0's options as Magnetar's keys.

An option that changes the function and has no key in Magnetar is refused by its name. The notes
that are returned name the remaining differences, which lie outside the function of the weights in
evaluation.
"""

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from magnetar.data.errors import UserError

Architecture = Literal["decoder", "encoder", "encoder_decoder"]

_COMMON: dict[str, Any] = {
    "activation_fn": "gelu",
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "moe_top1_expert": False,
    "moe_expert_count": 0,
    "moe_gating_use_fp32": True,
    "moe_eval_capacity_token_fraction": 0.25,
    "moe_second_expert_policy": "random",
    "moe_normalize_gate_prob_before_dropping": False,
    "use_xmoe": False,
    "rel_pos_buckets": 0,
    "max_rel_pos": 0,
    "deepnorm": False,
    "subln": True,
    "bert_init": False,
    "multiway": False,
    "no_output_layer": False,
    "layernorm_eps": 1e-5,
    "vocab_size": -1,
    "checkpoint_activations": False,
    "fsdp": False,
    "ddp_rank": 0,
    "xpos_rel_pos": False,
    "xpos_scale_base": 512,
}
_ENCODER: dict[str, Any] = {
    "encoder_embed_dim": 768,
    "encoder_attention_heads": 12,
    "encoder_ffn_embed_dim": 3072,
    "encoder_layers": 12,
    "encoder_normalize_before": True,
    "normalize_output": True,
    "max_source_positions": 1024,
}
_DECODER: dict[str, Any] = {
    "decoder_embed_dim": 768,
    "decoder_attention_heads": 12,
    "decoder_ffn_embed_dim": 3072,
    "decoder_layers": 12,
    "decoder_normalize_before": True,
    "share_decoder_input_output_embed": False,
    "max_target_positions": 1024,
}
_IMAGES: dict[str, Any] = {"img_size": 224, "patch_size": 16, "in_chans": 3}
# Defaults of the keyword arguments of EncoderConfig, DecoderConfig and EncoderDecoderConfig.
DEFAULTS: dict[Architecture, dict[str, Any]] = {
    "encoder": _COMMON | _ENCODER | _IMAGES | {"share_encoder_input_output_embed": False},
    "decoder": _COMMON | _DECODER,
    "encoder_decoder": _COMMON | _ENCODER | _DECODER | {"share_all_embeddings": False},
}
CLASSES: dict[Architecture, str] = {
    "encoder": "EncoderConfig",
    "decoder": "DecoderConfig",
    "encoder_decoder": "EncoderDecoderConfig",
}
_KINDS = {int: "a whole number", bool: "true or false", str: "a name", float: "a number"}
_SECOND_EXPERT = {"all": "all", "sampling": "sampled", "random": "random"}


class ModelKeys(NamedTuple):
    """Magnetar's model keys, as far as the options decide them, and notes for the user."""

    keys: dict[str, Any]
    notes: list[str]


def architecture_named(options: Iterable[str]) -> Architecture | None:
    """The architecture that the options belong to; None if they leave it open."""
    names = set(options)
    is_encoder = bool(names & (DEFAULTS["encoder"].keys() - DEFAULTS["decoder"].keys()))
    is_decoder = bool(names & (DEFAULTS["decoder"].keys() - DEFAULTS["encoder"].keys()))
    if "share_all_embeddings" in names or (is_encoder and is_decoder):
        return "encoder_decoder"
    if is_encoder or is_decoder:
        return "encoder" if is_encoder else "decoder"
    return None


def check_names(options: Iterable[str], source: str) -> None:
    """Refuse an unknown option, and name the nearest of TorchScale's."""
    known = set().union(*DEFAULTS.values())
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(
                f"{source}: {name} is no option of TorchScale 0.3.0's "
                f"{', '.join(CLASSES.values())}: leave it out; the nearest is {near}"
            )


def check_belonging(options: Iterable[str], architecture: Architecture, source: str) -> None:
    """Refuse options of another of TorchScale's classes."""
    for name in options:
        if name not in DEFAULTS[architecture]:
            raise UserError(
                f"{source}: {name} is no option of {CLASSES[architecture]}, and by its tensors the "
                f"model is of that class: leave it out"
            )


def resolve(
    architecture: Architecture, given: Mapping[str, Any], source: str, final: bool = False
) -> dict[str, Any]:
    """Every option of the architecture's config class with the value that the model was built from.

    If all of the class's options are given, they are `vars(config)`: final values, which may have
    been changed after the constructor. Fewer are arguments of the constructor, in which one option
    decides another: deepnorm and sub-LN the place of the norms, X-MoE the second expert.

    Args:
        architecture: name of the architecture, which chooses the config class.
        given: options, also of other classes; None stands for the default.
        source: path of the file that holds them.
        final: whether the values are final, even if there are few, as after `override`.
    """
    defaults = DEFAULTS[architecture]
    known = {name: value for name, value in given.items() if name in defaults and value is not None}
    for name, value in known.items():
        _check_type(name, value, defaults[name], source)
    options = defaults | known
    if final or known.keys() == defaults.keys():
        return options
    sides = [side for side in ("encoder", "decoder") if f"{side}_layers" in defaults]
    if options["deepnorm"]:
        options |= {f"{side}_normalize_before": False for side in sides} | {"subln": False}
    if options["subln"]:
        options |= {f"{side}_normalize_before": True for side in sides}
    if options["use_xmoe"]:
        if options["moe_freq"] < 1 or options["moe_expert_count"] < 1:
            raise UserError(
                f"{source}: use_xmoe=true, moe_freq={options['moe_freq']}, moe_expert_count="
                f"{options['moe_expert_count']}: TorchScale asks for 1 or more of both with "
                "X-MoE: give them, or leave use_xmoe out for a dense model"
            )
        options["moe_normalize_gate_prob_before_dropping"] = True
        options["moe_second_expert_policy"] = "random"
    return options


def _check_type(name: str, value: Any, default: Any, source: str) -> None:
    kind = float if name == "xpos_scale_base" else type(default)
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UserError(
            f"{source}: {name}={value!r} must be {_KINDS[kind]}, as in {name}={default!r}"
        )
    if kind is float and not abs(value) <= sys.float_info.max:
        shown = str(value)[:20]
        raise UserError(
            f"{source}: {name}={shown} must be a finite number, as in {name}={default!r}"
        )


def model_keys(architecture: Architecture, options: Mapping[str, Any], source: str) -> ModelKeys:
    """The model keys that the options decide; the tensors decide sizes and ties of embeddings.

    Args:
        architecture: architecture that the options were resolved for.
        options: result of `resolve`.
        source: start of messages.
    """
    sides = [side for side in ("encoder", "decoder") if f"{side}_layers" in options]
    _refuse_the_foreign(architecture, sides, options, source)
    last = sides[-1]
    keys: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": options[f"{sides[0]}_layers"],
        "d_model": options[f"{last}_embed_dim"],
        "d_ff": options[f"{last}_ffn_embed_dim"],
        "num_heads": options[f"{last}_attention_heads"],
        "norm": _norm(sides, options, source),
        "norm_eps": float(options["layernorm_eps"]),
        "activation": options["activation_fn"],
        "dropout": float(options["dropout"]),
        "attention_dropout": float(options["attention_dropout"]),
        "activation_dropout": float(options["activation_dropout"]),
        "drop_path": float(options["drop_path_rate"]),
        "scale_embedding": not options["no_scale_embedding"],
        "embedding_norm": options["layernorm_embedding"],
        "multiway": options["multiway"],
    }
    notes = []
    if architecture == "encoder_decoder":
        keys["num_decoder_layers"] = options["decoder_layers"]
        if keys["norm"] == "subln":
            keys["cross_attention_inner_norm"] = False
            notes.append("cross_attention_inner_norm=false: TorchScale's has no such norm")
    keys |= _attention_positions(sides, options)
    if "relative_bidirectional" in keys:
        notes.append("relative_bidirectional=true: half the decoder's buckets are for the future")
    moe = _moe_keys(max(options[f"{side}_layers"] for side in sides), options, source)
    if moe is not None:
        keys["moe"] = moe.keys
        notes += moe.notes
        if "encoder" in sides:
            moe.keys["time_major"] = True
            notes.append("moe.time_major=true: experts fill up position by position over the batch")
    return ModelKeys(keys, notes)


def _refuse_the_foreign(
    architecture: Architecture, sides: list[str], options: Mapping[str, Any], source: str
) -> None:
    """Raise for options that change the function and have no key in Magnetar."""
    if architecture == "encoder_decoder":
        for name in ("embed_dim", "ffn_embed_dim", "attention_heads"):
            encoders, decoders = options[f"encoder_{name}"], options[f"decoder_{name}"]
            if encoders != decoders:
                raise UserError(
                    f"{source}: encoder_{name}={encoders} and decoder_{name}={decoders} differ, "
                    "and Magnetar's encoder and decoder are alike: this model cannot be imported"
                )
    if options["multiway"] and "decoder" in sides:
        place, whose = "a decoder", "whose second pool"
        if architecture == "encoder_decoder":
            place, whose = "an encoder and its decoder", "whose second pools"
        raise UserError(
            f"{source}: multiway=true in {place}, {whose} TorchScale never reaches: Magnetar has "
            "Multiway only in an encoder without decoder; save the model with multiway off and "
            "pool A's tensors under the plain names"
        )
    ends_with_norm = "encoder" in sides and options["encoder_normalize_before"]
    if ends_with_norm and not options["normalize_output"]:
        raise UserError(
            f"{source}: normalize_output=false leaves out the norm after the last layer, which "
            "Magnetar's Pre-LN and Sub-LN encoders have: this model cannot be imported"
        )
    if options["activation_fn"] not in ("gelu", "relu", "swish"):
        raise UserError(
            f"{source}: activation_fn={options['activation_fn']!r} is none of TorchScale's: use "
            "'gelu', 'relu' or 'swish'"
        )


def _norm(sides: list[str], options: Mapping[str, Any], source: str) -> str:
    """Magnetar's `norm` for TorchScale's three options, which may contradict each other."""
    befores = {f"{side}_normalize_before": options[f"{side}_normalize_before"] for side in sides}
    shown = ", ".join(f"{name}={str(value).lower()}" for name, value in befores.items())
    problem = None
    if len(set(befores.values())) == 2:
        problem = shown
    elif options["deepnorm"] and options["subln"]:
        problem = "deepnorm=true, subln=true"
    elif options["deepnorm"] and all(befores.values()):
        problem = f"deepnorm=true, {shown}"
    elif options["subln"] and not any(befores.values()):
        problem = f"subln=true, {shown}"
    if problem is not None:
        raise UserError(
            f"{source}: {problem}: Magnetar has Pre-LN, Post-LN, Sub-LN (Pre-LN) and DeepNorm "
            "(Post-LN), and no mixture of them: this model cannot be imported"
        )
    if options["deepnorm"] or options["subln"]:
        return "deepnorm" if options["deepnorm"] else "subln"
    return "pre" if all(befores.values()) else "post"


def _attention_positions(sides: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    is_relative = options["rel_pos_buckets"] > 0 and options["max_rel_pos"] > 0
    is_rotary = options["xpos_rel_pos"]
    kinds = {(True, True): "xpos_relative", (True, False): "relative", (False, True): "xpos"}
    keys: dict[str, Any] = {"attention_positions": kinds.get((is_relative, is_rotary), "none")}
    if is_relative:
        keys["relative_buckets"] = options["rel_pos_buckets"]
        keys["relative_max_distance"] = options["max_rel_pos"]
        if "decoder" in sides:
            keys["relative_bidirectional"] = True
    if is_rotary:
        keys["xpos_scale_base"] = float(options["xpos_scale_base"])
    return keys


def _moe_keys(deepest: int, options: Mapping[str, Any], source: str) -> ModelKeys | None:
    """The keys under model.moe; None if no layer is a MoE layer."""
    every, num_experts = options["moe_freq"], options["moe_expert_count"]
    if every == 0 or every > deepest:
        return None
    if every < 0 or num_experts < 1:
        raise UserError(
            f"{source}: moe_freq={every}, moe_expert_count={num_experts}: a MoE model has both at "
            "1 or more; give them with --config"
        )
    top_k = 1 if options["moe_top1_expert"] else 2
    policy = options["moe_second_expert_policy"]
    if policy not in _SECOND_EXPERT:
        raise UserError(
            f"{source}: moe_second_expert_policy={policy!r} is none of TorchScale's: use 'all', "
            "'sampling' or 'random'"
        )
    keys: dict[str, Any] = {
        "num_experts": num_experts,
        "every": every,
        "top_k": top_k,
        "router": "xmoe" if options["use_xmoe"] else "linear",
        "second_expert": _SECOND_EXPERT[policy] if top_k == 2 else "all",
        "dispatch": "capacity",
        "capacity_factor": 1.0,
        "eval_capacity_fraction": _eval_capacity_fraction(top_k, num_experts, options, source),
        "route_padding": True,
    }
    if top_k == 2 and not options["moe_normalize_gate_prob_before_dropping"]:
        keys["normalize_weights"] = "after_dropping"
    notes = ["moe.route_padding=true: padding is routed and takes capacity"]
    if options["use_xmoe"]:
        keys |= {"d_router": 16, "normalize_tokens": False, "learned_temperature": False}
        notes.append(
            "moe.normalize_tokens=false, moe.learned_temperature=false, moe.d_router=16: "
            "TorchScale's X-MoE router, which differs from its paper's"
        )
    fraction = keys["eval_capacity_fraction"]
    if fraction is not None:
        notes.append(
            f"moe.eval_capacity_fraction={fraction:g}: what tokens are dropped in evaluation "
            "depends on the batch; null drops none"
        )
    if top_k == 2 and policy != "all":
        notes.append(
            f"moe.second_expert={keys['second_expert']!r} in training only: TorchScale draws the "
            "second expert in evaluation too, so its own logits change from call to call"
        )
    if num_experts > 1 and top_k == 2:
        notes.append(
            "in training an expert takes ceil(2 * tokens / experts) tokens, TorchScale's "
            "2 * ceil(tokens / experts)"
        )
    return ModelKeys(keys, notes)


def _eval_capacity_fraction(
    top_k: int, num_experts: int, options: Mapping[str, Any], source: str
) -> float | None:
    """Share of the tokens that an expert takes in evaluation; None if it takes all of them."""
    fraction = float(options["moe_eval_capacity_token_fraction"])
    if fraction > 0:
        return None if fraction >= 1 else fraction
    # 0 or less means the capacity of training: ceil(tokens / experts) for each of the top_k
    # choices.
    if num_experts <= top_k:
        return None
    if top_k == 1:
        share = 1 / num_experts
        # Rounded up, the share of a multiple of num_experts could come out one token too large.
        return share if Fraction(share) <= Fraction(1, num_experts) else math.nextafter(share, 0)
    raise UserError(
        f"{source}: moe_eval_capacity_token_fraction={fraction:g} asks for the capacity of "
        "training in evaluation, 2 * ceil(tokens / experts), and Magnetar's is a share of the "
        "tokens: give a share in (0, 1] with --config, which may drop other tokens"
    )
