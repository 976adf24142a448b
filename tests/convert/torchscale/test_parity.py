"""An imported model has the logits of TorchScale's own: every configuration of its tests, and MoE.

torchscale imports fairscale and timm for features that change nothing here, so these two are stood
in for: `pip install --no-deps torchscale==0.3.0` is enough.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magnetar.convert.torchscale.convert import import_torchscale
from magnetar.data.errors import UserError
from magnetar.models.layers.attention import Cache
from magnetar.models.weights.load_save import load_model
from tests.convert.torchscale_models import (
    SIDES,
    VOCAB,
    build,
    right_padding,
    sizes,
    tokens,
    write,
)

pytestmark = pytest.mark.usefixtures("torchscale")

# Logits are of size 1, at the end of 5 layers at most. Their sums of 32 and 48 products run in
# another order: some 160 float32 roundings of 2^-24 each.
TOLERANCE = 160 * 2**-24

# What TorchScale's own tests vary, in each of its three architectures.
VARIATIONS: list[dict[str, Any]] = [
    {},
    {"vocab_size": 64},
    {"activation_fn": "relu"},
    {"drop_path_rate": 0.1},
    {"normalize_before": False},
    {"no_scale_embedding": False},
    {"layernorm_embedding": True},
    {"rel_pos_buckets": 32, "max_rel_pos": 256},
    {"deepnorm": True, "subln": False, "normalize_before": False},
    {"bert_init": True},
    {"multiway": True},
    {"checkpoint_activations": True},
    {"fsdp": True},
]
SHARING = {
    "encoder": ["share_encoder_input_output_embed"],
    "decoder": ["share_decoder_input_output_embed"],
    "encoder_decoder": ["share_decoder_input_output_embed", "share_all_embeddings"],
}
OF_ITS_TESTS = [
    (architecture, variation)
    for architecture in SIDES
    for variation in [*VARIATIONS, *({name: True} for name in SHARING[architecture])]
]
ALSO = [
    {"subln": False},
    {"subln": False, "normalize_before": False},
    {"activation_fn": "swish", "layernorm_eps": 1e-3},
    {"rel_pos_buckets": 33, "max_rel_pos": 20},
    {"xpos_rel_pos": True, "xpos_scale_base": 64},
    {"xpos_rel_pos": True, "rel_pos_buckets": 8, "max_rel_pos": 20},
]


def full_options(architecture: str, variation: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the config class: small sizes, a vocabulary, and the variation."""
    options: dict[str, Any] = {**sizes(architecture), "vocab_size": VOCAB}
    for name, value in variation.items():
        if name == "normalize_before":
            options |= {f"{side}_{name}": value for side in SIDES[architecture]}
        else:
            options[name] = value
    return options


def name_of(value: Any) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items()) or "defaults"
    return None


def imported(folder: Path, model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The model after its way through the files."""
    arguments = write(folder, model, options)
    out = folder / "imported"
    import_torchscale([Path(arguments[0])], out, Path(arguments[2]))
    return load_model(out)


@torch.no_grad()
def their_logits(model: nn.Module, architecture: str, inputs: list[Tensor]) -> Tensor:
    """Of a batch (tokens and their padding, the encoder's first) with TorchScale's masks."""
    if architecture == "encoder":
        return model(inputs[0], encoder_padding_mask=inputs[1])["encoder_out"]
    if architecture == "decoder":
        return model(inputs[0], self_attn_padding_mask=inputs[1])[0]
    encoded = model.encoder(inputs[0], encoder_padding_mask=inputs[1])
    return model.decoder(inputs[2], self_attn_padding_mask=inputs[3], encoder_out=encoded)[0]


@torch.no_grad()
def our_logits(model: nn.Module, architecture: str, inputs: list[Tensor]) -> Tensor:
    if architecture == "encoder_decoder":
        source, source_padding, target, target_padding = inputs
        return model(source, target, source_padding, target_padding).logits
    return model(*inputs).logits


def batch(architecture: str) -> list[Tensor]:
    """Sequences of unequal lengths, long enough for the larger buckets of distances."""
    inputs = [tokens(3, 24, seed=1), right_padding([24, 17, 9])]
    if architecture == "encoder_decoder":
        inputs += [tokens(3, 20, seed=2), right_padding([20, 6, 13])]
    return inputs


def assert_same_logits(
    theirs: nn.Module, ours: nn.Module, architecture: str, inputs: list[Tensor]
) -> None:
    expected = their_logits(theirs, architecture, inputs)
    found = our_logits(ours, architecture, inputs)
    real = ~inputs[-1]
    assert 0.3 < expected[real].std() < 10, "logits should be of size 1"
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=TOLERANCE)


def test_every_configuration_of_torchscales_tests_is_here() -> None:
    assert len(OF_ITS_TESTS) == 43


@pytest.mark.parametrize(("architecture", "variation"), OF_ITS_TESTS, ids=name_of)
def test_configurations_of_torchscales_tests_keep_their_logits(
    architecture: str, variation: dict[str, Any], tmp_path: Path
) -> None:
    options = full_options(architecture, variation)
    theirs, _ = build(architecture, options)
    if variation.get("multiway") and architecture != "encoder":
        with pytest.raises(
            UserError, match=r"multiway=true in an? .*decoder, whose second pools? "
        ):
            imported(tmp_path, theirs, options)
        return
    ours = imported(tmp_path, theirs, options)
    assert_same_logits(theirs, ours, architecture, batch(architecture))


@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("variation", ALSO, ids=name_of)
@pytest.mark.parametrize("architecture", SIDES)
def test_norms_and_attention_positions_keep_their_logits(
    architecture: str, variation: dict[str, Any], has_positions: bool, tmp_path: Path
) -> None:
    options = full_options(architecture, variation)
    theirs, _ = build(architecture, options, has_positions)
    ours = imported(tmp_path, theirs, options)
    assert_same_logits(theirs, ours, architecture, batch(architecture))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", SIDES)
def test_what_16_bits_have_rounded_is_read_as_it_is_but_for_the_table_of_xpos(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """With the exact table TorchScale has the same logits."""
    options = full_options(architecture, {"xpos_rel_pos": True, "xpos_scale_base": 8})
    theirs, _ = build(architecture, options)
    tables = {name: table.clone() for name, table in theirs.named_buffers() if "xpos" in name}
    assert tables
    ours = imported(tmp_path, theirs.to(dtype), options)
    theirs.float()
    inputs = batch(architecture)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_same_logits(theirs, ours, architecture, inputs)
    for name, table in tables.items():
        theirs.get_buffer(name).copy_(table)
    assert_same_logits(theirs, ours, architecture, inputs)


@pytest.mark.parametrize("split_position", [0, 7, 24])
def test_both_pools_of_a_multiway_encoder_are_imported(split_position: int, tmp_path: Path) -> None:
    options = full_options("encoder", {"multiway": True, "layernorm_embedding": True})
    theirs, _ = build("encoder", options)
    ours = imported(tmp_path, theirs, options)
    with torch.no_grad():
        source = tokens(2, 24, seed=1)
        expected = theirs(source, multiway_split_position=split_position)["encoder_out"]
        found = ours(source, split_position=split_position).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


MOE = [
    {"moe_top1_expert": True, "use_xmoe": True},
    {"moe_top1_expert": True},
    {"use_xmoe": True, "moe_second_expert_policy": "all"},
    {"moe_second_expert_policy": "all"},
    {"moe_second_expert_policy": "all", "moe_normalize_gate_prob_before_dropping": True},
]


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("moe", MOE, ids=name_of)
@pytest.mark.parametrize("architecture", SIDES)
@pytest.mark.usefixtures("one_rank")
def test_sparse_models_keep_their_logits(
    architecture: str, moe: dict[str, Any], every: int, fraction: float, tmp_path: Path
) -> None:
    options = full_options(architecture, moe) | {
        "moe_freq": every,
        "moe_expert_count": 4,
        "moe_eval_capacity_token_fraction": fraction,
    }
    theirs, config = build(architecture, options)
    # The constructor sets it to "random" with X-MoE, which draws in evaluation too.
    for module in theirs.modules():
        if hasattr(module, "second_expert_policy"):
            module.second_expert_policy = "all"
    config.moe_second_expert_policy = "all"
    ours = imported(tmp_path, theirs, vars(config))
    assert_same_logits(theirs, ours, architecture, batch(architecture))


@pytest.mark.parametrize("d_ff", [47, 50])
@pytest.mark.usefixtures("one_rank")
def test_experts_of_a_width_that_no_grouped_product_takes_keep_their_logits(
    d_ff: int, tmp_path: Path
) -> None:
    options = full_options("decoder", MOE[0]) | {
        "decoder_ffn_embed_dim": d_ff,
        "moe_freq": 1,
        "moe_expert_count": 4,
        "moe_eval_capacity_token_fraction": 1.0,
    }
    theirs, _ = build("decoder", options)
    ours = imported(tmp_path, theirs, options)
    assert_same_logits(theirs, ours, "decoder", batch("decoder"))


@pytest.mark.parametrize("moe", MOE, ids=name_of)
@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_training_drops_tokens_and_balances_experts_as_torchscale(
    architecture: str, moe: dict[str, Any], tmp_path: Path
) -> None:
    options = full_options(architecture, moe) | {"moe_freq": 1, "moe_expert_count": 4}
    theirs, config = build(architecture, options)
    for module in theirs.modules():
        if hasattr(module, "second_expert_policy"):
            module.second_expert_policy = "all"
    config.moe_second_expert_policy = "all"
    ours = imported(tmp_path, theirs, vars(config)).train()
    out = theirs.train()(tokens(3, 24, seed=1))
    expected, aux_losses = (
        (out["encoder_out"], out["l_aux"])
        if architecture == "encoder"
        else (out[0], out[1]["l_aux"])
    )
    found = ours(tokens(3, 24, seed=1))
    assert all(stats.dropped > 0 for stats in found.routing), "nothing was dropped"
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=TOLERANCE)
    for stats, aux_loss in zip(found.routing, aux_losses, strict=True):
        # A mean over 72 tokens, each with a softmax that is off as the logits are.
        assert stats.aux_loss.item() == pytest.approx(aux_loss.item(), rel=TOLERANCE)


DECODERS = [
    {},
    {"deepnorm": True},
    {"rel_pos_buckets": 32, "max_rel_pos": 256},
    {"xpos_rel_pos": True},
    {"layernorm_embedding": True, "no_scale_embedding": False},
    {
        "moe_freq": 1,
        "moe_expert_count": 4,
        "moe_top1_expert": True,
        "use_xmoe": True,
        "moe_eval_capacity_token_fraction": 1.0,  # with less a batch's length decides what drops
    },
]


@pytest.mark.parametrize("variation", DECODERS, ids=name_of)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_decoding_token_by_token_equals_torchscales(
    architecture: str, variation: dict[str, Any], tmp_path: Path
) -> None:
    options = full_options(architecture, variation)
    theirs, _ = build(architecture, options)
    ours = imported(tmp_path, theirs, options)
    target, first = tokens(2, 12, seed=2), 4
    if architecture == "encoder_decoder":
        source = tokens(2, 24, seed=1)
        encoded, memory = theirs.encoder(source), ours.encoder(source).logits
        theirs, ours = theirs.decoder, ours.decoder
    else:
        encoded, memory = None, None
    whole = ours(target, memory=memory).logits
    # TorchScale takes the last head in place of the last query of the relative bias, and stops.
    state: dict[Any, Any] | None = None if "max_rel_pos" in variation else {}
    cache = Cache(len(ours.blocks))
    for length in range(first, target.size(1) + 1):
        if state is not None:
            state["is_first_step"] = length == first
        new = target[:, :first] if length == first else target[:, length - 1 : length]
        expected = theirs(target[:, :length], encoder_out=encoded, incremental_state=state)[0]
        expected = expected[:, -new.size(1) :]
        found = ours(new, memory=memory, cache=cache).logits
        assert found.shape == expected.shape == (2, new.size(1), VOCAB)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(
            whole[:, length - new.size(1) : length], expected, rtol=0, atol=TOLERANCE
        )
