"""The recipe of each of Magnetar's tensors out of a transformers model's.

The mapping runs backwards, from Magnetar's names to those of the files of `save_pretrained`, so
that every message can name the tensors as the user's file does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magnetar.convert.experts import place_of
from magnetar.models.config import ModelConfig

# Tables that follow from the config, which some versions have stored.
NOT_WEIGHTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias)")

_LLAMA = {
    "blocks": "model.layers.",
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "output": "lm_head",
    "attention_residual.norm": "input_layernorm",
    "ffn_residual.norm": "post_attention_layernorm",
    "attention.qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.deepspeed_moe.gate.wg": "mlp.gate",
    "experts.w1": "mlp.experts.{expert}.gate_proj",
    "experts.w2": "mlp.experts.{expert}.down_proj",
    "experts.w3": "mlp.experts.{expert}.up_proj",
}
_MIXTRAL = _LLAMA | {
    "ffn.deepspeed_moe.gate.wg": "block_sparse_moe.gate",
    "experts.w1": "block_sparse_moe.experts.{expert}.w1",
    "experts.w2": "block_sparse_moe.experts.{expert}.w2",
    "experts.w3": "block_sparse_moe.experts.{expert}.w3",
}
_GPT2 = {
    "blocks": "transformer.h.",
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "output": "lm_head",
    "attention_residual.norm": "ln_1",
    "ffn_residual.norm": "ln_2",
    "attention.qkv_proj": "attn.c_attn",
    "attention.out_proj": "attn.c_proj",
    "ffn.w1": "mlp.c_fc",
    "ffn.w2": "mlp.c_proj",
}
_OPT = {
    "blocks": "model.decoder.layers.",
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
    "attention_residual.norm": "self_attn_layer_norm",
    "ffn_residual.norm": "final_layer_norm",
    "attention.qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "ffn.w1": "fc1",
    "ffn.w2": "fc2",
}
_NAMES = {"gpt2": _GPT2, "mixtral": _MIXTRAL, "opt": _OPT}  # by model_type; others: _LLAMA
_TRANSPOSED = ("c_attn", "c_fc", "c_proj")  # matrices that GPT-2 stores as (d_in, d_out)
_FIRST_POSITION = {"opt": 2}  # row of the first position, by model_type
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Recipe:
    """The recipe of one of Magnetar's tensors.

    Attributes:
        sources: names of the tensors that are stacked along the first dimension.
        turned: number of the first sources whose heads are put into rotary's order.
        head_dim: width of a head.
        transposed: whether the result is transposed.
        first_row: index of the first row that is taken.
    """

    sources: tuple[str, ...]
    turned: int = 0
    head_dim: int = 0
    transposed: bool = False
    first_row: int = 0

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor, from those of `sources`."""
        parts = [
            _in_pairs(tensor, self.head_dim) if index < self.turned else tensor
            for index, tensor in enumerate(tensors)
        ]
        made = torch.cat(parts) if len(parts) > 1 else parts[0]
        made = made[self.first_row :]
        return made.t().contiguous() if self.transposed else made


def _in_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """(H * d, ...) -> (H * d, ...), each head's rows as pairs that one angle turns.

    Transformers turns row i of a head together with row i + d / 2, Magnetar 2i with 2i + 1.
    """
    halves = tensor.unflatten(0, (-1, 2, head_dim // 2))  # (H, 2, d / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def recipe(name: str, model_type: str, config: ModelConfig) -> Recipe:
    """The recipe of one of Magnetar's tensors.

    Args:
        name: name such as "blocks.0.attention.qkv_proj.weight".
        model_type: model_type of the transformers config.
        config: config of the model.
    """
    names, prefix = _NAMES.get(model_type, _LLAMA), ""
    module, _, parameter = name.rpartition(".")
    if in_block := _IN_BLOCK.fullmatch(module):
        prefix, module = f"{names['blocks']}{in_block[1]}.", in_block[2]
    place = place_of(name)
    expert = None if place is None else place.expert
    if place is not None and expert is not None:
        module, parameter = f"experts.{place.parameter}", "weight"
    sources = names[module].format(expert=expert).split()
    turned = {"attention.qkv_proj": 2, "attention.q_norm": 1, "attention.k_norm": 1}.get(module, 0)
    return Recipe(
        tuple(f"{prefix}{source}.{parameter}" for source in sources),
        turned if config.is_rotary else 0,
        config.head_width,
        transposed=expert is not None
        or (parameter == "weight" and sources[0].endswith(_TRANSPOSED)),
        first_row=_FIRST_POSITION.get(model_type, 0) if module == "positions" else 0,
    )
