"""Models of the transformers package and what they become: logits and gradients in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.convert.huggingface.convert import from_hf
from magnetar.models.weights.load_save import load_model, load_weights

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 50, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Of its four pairs one keeps its frequency, one is slow, and two lie between.
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 14,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": LENGTH}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, biased and tied": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA_3}),
    "Llama, positions interpolated": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0}},
    ),
    "Qwen3": ("Qwen3", {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "Qwen3-MoE": (
        "Qwen3Moe",
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_experts": 6,
            "moe_intermediate_size": 12,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0, 1],
            "norm_topk_prob": True,
        },
    ),
    "OLMoE": ("Olmoe", EXPERTS | {"num_experts": 5, "num_experts_per_tok": 3}),
    "OLMoE, normalized": ("Olmoe", EXPERTS | {"num_experts": 5, "norm_topk_prob": True}),
    "GPT-2": ("GPT2", GPT2),
    "GPT-2, untied, relu": (
        "GPT2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40},
    ),
    "OPT": ("OPT", OPT),
    "OPT, post": ("OPT", OPT | {"do_layer_norm_before": False, "activation_function": "gelu"}),
    "Mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4}),
}
# Sums of up to 48 products through four layers, in another order than theirs: float32 rounds each
# by 6e-8 of its size, and the largest differences measured are below 2e-6.
TOLERANCE = 1e-5


def build(case: str) -> nn.Module:
    """The model with random weights, norms too, so that each of them matters."""
    name, options = CASES[case]
    config_class = getattr(transformers, f"{name}Config")
    known = config_class().to_dict()
    config = config_class(**{k: v for k, v in SIZES.items() if k in known} | options)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.2 * noise + (parameter.dim() == 1))
    return model


def token_ids() -> Tensor:
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten())


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = build(case)
    from_hf(save(theirs, tmp_path / "theirs"), tmp_path / "ours", None)
    ours = load_model(tmp_path / "ours")
    expected, logits = theirs(token_ids()).logits, ours(token_ids()).logits
    largest = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * largest)
    loss_of(expected).backward()
    loss_of(logits).backward()
    # Their gradients take the way of the weights, whose conversion is linear.
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    from_hf(save(theirs, tmp_path / "gradients"), tmp_path / "expected", None)
    _, gradients = load_weights(tmp_path / "expected")
    found = {}
    for module in ours.modules():  # as a state dict has them, expert by expert
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.grad
    found = ours.state_dict()
    assert set(gradients) <= set(found)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=TOLERANCE * scale, msg=name)
