"""Small models of TorchScale with random weights, their files, and what they say."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 50
MAX_LEN = 40
SIZES = {
    "encoder_embed_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 48,
    "encoder_layers": 3,
    "decoder_embed_dim": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_embed_dim": 48,
    "decoder_layers": 2,
}
SIDES = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "encoder_decoder": ("encoder", "decoder"),
}


def sizes(architecture: str) -> dict[str, int]:
    return {
        name: size
        for name, size in SIZES.items()
        if any(name.startswith(f"{side}_") for side in SIDES[architecture])
    }


def build(
    architecture: str, options: dict[str, Any], has_positions: bool = True
) -> tuple[nn.Module, Any]:
    """The model with random weights in evaluation mode, and its config object."""
    from torchscale.architecture import config as configs
    from torchscale.architecture.decoder import Decoder
    from torchscale.architecture.encoder import Encoder
    from torchscale.architecture.encoder_decoder import EncoderDecoder
    from torchscale.component.embedding import PositionalEmbedding, TextEmbedding

    classes = {
        "encoder": (configs.EncoderConfig, Encoder),
        "decoder": (configs.DecoderConfig, Decoder),
        "encoder_decoder": (configs.EncoderDecoderConfig, EncoderDecoder),
    }
    make_config, make_model = classes[architecture]
    config = make_config(**options)
    prefixes = ("",) if len(SIDES[architecture]) == 1 else ("encoder_", "decoder_")
    vocab = max(config.vocab_size, VOCAB)
    parts: dict[str, nn.Module] = {}
    for prefix in prefixes:
        parts[f"{prefix}embed_tokens"] = TextEmbedding(vocab, 32)
        if has_positions:
            parts[f"{prefix}embed_positions"] = PositionalEmbedding(MAX_LEN + 2, 32)
    if getattr(config, "share_all_embeddings", False):
        parts["decoder_embed_tokens"] = parts["encoder_embed_tokens"]
    if getattr(config, "share_encoder_input_output_embed", False):
        # TorchScale asks its config for an option that it does not have.
        parts["output_projection"] = nn.Linear(32, vocab, bias=False)
        parts["output_projection"].weight = parts["embed_tokens"].weight
    model = make_model(config, **parts)
    randomize(model)
    return model.eval(), config


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Every parameter anew, biases and norms too, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_gain = parameter.dim() == 1 and name.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.2 * noise + is_gain)


def write(folder: Path, model: nn.Module, options: dict[str, Any]) -> list[str]:
    """Its state dict and its options as files, and the arguments that name them."""
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "options.json").write_text(json.dumps(options))
    return [str(folder / "model.pt"), "--config", str(folder / "options.json")]


def tokens(batch: int, length: int, seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def right_padding(lengths: list[int]) -> Tensor:
    """(B, T) bool, True from each sequence's length on."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)


def stack_tensors(
    prefix: str = "", cross_attention: bool = False, experts: int = 0, rows: int = 10
) -> dict[str, Tensor]:
    """One Sub-LN layer of width 8 under TorchScale's names, without TorchScale."""
    d_model, d_ff, layer = 8, 12, f"{prefix}layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (11, d_model),
        f"{prefix}embed_positions.weight": (rows, d_model),
    }
    norms = {f"{prefix}layer_norm": d_model}
    linears = {}
    for attention in ("self_attn", "encoder_attn")[: 1 + cross_attention]:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linears[f"{layer}.{attention}.{name}"] = (d_model, d_model)
        norms[f"{layer}.{attention}_layer_norm"] = d_model
    norms |= {f"{layer}.self_attn.inner_attn_ln": d_model, f"{layer}.final_layer_norm": d_model}
    for ffn in [f"{layer}.moe_layer.experts.{e}" for e in range(experts)] or [f"{layer}.ffn"]:
        linears |= {f"{ffn}.fc1": (d_ff, d_model), f"{ffn}.fc2": (d_model, d_ff)}
        norms[f"{ffn}.ffn_layernorm"] = d_ff
    if experts:
        shapes[f"{layer}.moe_layer.gate.wg.weight"] = (experts, d_model)
    for name, (d_out, d_in) in linears.items():
        shapes |= {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    if prefix != "encoder.":
        shapes[f"{prefix}output_projection.weight"] = (11, d_model)
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def small_options(side: str = "decoder", **more: Any) -> dict[str, Any]:
    """The options that `stack_tensors` fits."""
    return {
        f"{side}_embed_dim": 8,
        f"{side}_attention_heads": 2,
        f"{side}_ffn_embed_dim": 12,
        f"{side}_layers": 1,
        **more,
    }
