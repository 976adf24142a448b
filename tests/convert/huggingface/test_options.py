"""What of a transformers model is refused, and with which words; and what reads the folder."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from magnetar.convert.huggingface.convert import translate
from magnetar.convert.huggingface.names import recipe
from magnetar.convert.huggingface.options import FAMILIES, model_keys
from magnetar.data.errors import UserError
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import in_memory
from magnetar.models.weights.load_save import load_model, tensor_shapes
from tests.convert.conversions import Refusal, convert

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MOE = QWEN3 | EXPERTS | {"model_type": "qwen3_moe", "moe_intermediate_size": 8}
MOE |= {"decoder_sparse_step": 1}
OLMOE = LLAMA | EXPERTS | {"model_type": "olmoe"}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 20,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 8,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.2,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "word_embed_proj_dim": 16,
    "dropout": 0.1,
    "activation_function": "relu",
    "init_std": 0.02,
}


def config_of(options: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(model_keys(options, "config.json"))


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (LLAMA, "model_type", "gemma3"),
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "attention_bias", True),  # without mlp_bias
        (LLAMA, "is_encoder_decoder", True),
        (LLAMA, "quantization_config", {"bits": 4}),
        (LLAMA, "final_logit_softcapping", 30.0),
        (LLAMA, "sliding_window", 4),
        (QWEN3, "layer_types", ["full_attention", "sliding_attention"]),
        (QWEN3, "attention_bias", True),
        (MOE, "mlp_only_layers", [1]),
        (MOE, "num_experts_per_tok", 1),
        (OLMOE, "clip_qkv", 8.0),
        (GPT2, "n_ctx", 7),
        (GPT2, "resid_pdrop", 0.0),
        (GPT2, "activation_function", "tanh"),
        (GPT2, "scale_attn_weights", False),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "reorder_and_upcast_attn", True),
        (GPT2, "add_cross_attention", True),
        (OPT, "word_embed_proj_dim", 8),
        (OPT, "enable_bias", False),
        (OPT, "layer_norm_elementwise_affine", False),
        (OPT, "_remove_final_layer_norm", True),
        (OPT, "layerdrop", 0.1),
    ],
)
def test_an_option_without_a_counterpart_is_refused_by_its_key(
    options: dict, key: str, value: object
) -> None:
    config_of(options)
    with pytest.raises(UserError) as caught:
        model_keys(options | {key: value}, "there/config.json")
    assert str(caught.value).startswith(f"there/config.json: {key}=")
    assert "convert another model" in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type='yarn' must be one of default, linear,"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type='dynamic' must be one of"),
        ({"factor": 2.0}, "rope_parameters.factor=2.0 does not belong to rope_type default"),
        ({"rope_type": "linear"}, "rope_type='linear' needs factor"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "rope_parameters.mscale=1.0 does"),
    ],
)
def test_other_rotary_frequencies_are_refused(rope: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_of(LLAMA | {"rope_scaling": rope})


def test_rotary_frequencies_are_read_from_both_versions_of_the_file() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    assert config_of(LLAMA | {"rope_parameters": rope}).rope_theta == 5e5
    assert config_of(LLAMA | {"rope_theta": 3e5, "rope_scaling": None}).rope_theta == 3e5
    old = LLAMA | {"rope_theta": 3e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = LLAMA | {
        "rope_parameters": {"rope_theta": 3e5, "rope_type": "linear", "factor": 2.0},
    }
    assert config_of(old) == config_of(new)
    assert config_of(old).rope_scaling is not None


def test_a_missing_key_is_named_and_windows_that_are_off_mean_nothing() -> None:
    with pytest.raises(UserError, match="hidden_size is missing"):
        config_of({name: value for name, value in LLAMA.items() if name != "hidden_size"})
    on = {"use_sliding_window": True, "sliding_window": 4}
    with pytest.raises(UserError, match="sliding_window=4 must be None"):
        config_of(QWEN3 | on)
    config_of(QWEN3 | {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1})
    moe = config_of(MOE | {"mlp_only_layers": [0]}).moe
    assert moe is not None
    assert moe.first_dense_layers == 1


def random_tensors(options: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors under the names of save_pretrained, of a model with one tensor for each of ours."""
    config, found = config_of(options), {}
    for name, shape in tensor_shapes(config).items():
        made = recipe(name, options["model_type"], config)
        sizes = [shape[0]]
        if len(made.sources) == 3:
            num_kv_heads = config.num_kv_heads or config.num_heads
            heads = (config.num_heads, num_kv_heads, num_kv_heads)
            sizes = [config.head_width * number for number in heads]
        for source, rows in zip(made.sources, sizes, strict=True):
            size = (rows + made.first_row, *shape[1:])
            found[source] = torch.randn(size[::-1] if made.transposed else size)
    return found


def test_every_family_has_names_for_all_its_tensors() -> None:
    cases = [LLAMA, QWEN3, MOE, OLMOE, GPT2, OPT]
    mixtral = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    cases.append(mixtral)
    assert {options["model_type"] for options in cases} == set(FAMILIES)
    for options in cases:
        config, tensors = translate(options, in_memory(random_tensors(options)), "there")
        assert set(tensors.specs) == set(tensor_shapes(config))


def test_tensors_that_do_not_fit_are_named() -> None:
    tensors = random_tensors(LLAMA)
    norm = "model.norm.weight"
    for changes, message in (
        ({"score.weight": torch.ones(2, 16)}, "score.weight is a tensor that the model of its"),
        ({norm: torch.ones(15)}, rf"{norm} have shapes \[\(15,\)\], which do not make \(16,\)"),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.ones(15, 16)},
            r"q_proj.weight and .* have shapes \[\(15, 16\), \(8, 16\), \(8, 16\)\]",
        ),
    ):
        with pytest.raises(UserError, match=message):
            translate(LLAMA, in_memory(tensors | changes), "there")
    del tensors[norm]
    with pytest.raises(UserError, match=f"there: {norm} is missing: copy the folder again"):
        translate(LLAMA, in_memory(tensors), "there")


def test_what_earlier_versions_stored_beside_weights_is_left_out() -> None:
    tied = {"tie_word_embeddings": True}
    tensors = random_tensors(LLAMA | tied) | {"lm_head.weight": torch.ones(20, 16)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    translate(LLAMA | tied, in_memory(tensors), "there")
    # The Hub's GPT-2 has no prefix, and masks.
    tensors = {name.removeprefix("transformer."): t for name, t in random_tensors(GPT2).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    _, made = translate(GPT2, in_memory(tensors), "there")
    assert torch.equal(made.read("positions.weight"), tensors["wpe.weight"])


def save(folder: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(options).items()}
    save_file(tensors, folder / "model.safetensors")


def test_the_command_keeps_types_and_writes_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "theirs", MOE, torch.bfloat16)
    convert("from-hf", tmp_path / "theirs", "--out", tmp_path / "ours", "--shard-size", "2KB")
    said = capsys.readouterr().out
    assert "qwen3_moe of transformers" in said
    assert "decoder, norm pre, rmsnorm" in said
    assert "not copied" in said
    model = load_model(tmp_path / "ours")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3


def test_the_command_refuses_a_folder_without_a_config(tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("from-hf", tmp_path / "empty", "--out", tmp_path / "ours")
    assert "config.json cannot be read" in said
    assert not (tmp_path / "ours").exists()
