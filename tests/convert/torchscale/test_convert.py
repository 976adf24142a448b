"""The import from files to folder: what the tensors decide, what is said, what is refused."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from magnetar.convert.torchscale.convert import Imported, import_torchscale, translate
from magnetar.convert.torchscale.options import DEFAULTS, Architecture
from magnetar.convert.torchscale.reader import Checkpoint
from magnetar.data.errors import UserError
from magnetar.launchers.convert import main
from magnetar.models.weights.load_save import load_model, load_weights
from tests.convert.torchscale.test_parity import TOLERANCE
from tests.convert.torchscale_models import (
    MAX_LEN,
    VOCAB,
    build,
    randomize,
    right_padding,
    sizes,
    small_options,
    stack_tensors,
    tokens,
)

PATH = Path("m.pt")


def imported(
    tensors: dict[str, Tensor], options: dict[str, Any] | None = None, kind: str = "options"
) -> Imported:
    if options is None:
        options = small_options()
    return translate(Checkpoint(PATH, tensors, options, kind))  # type: ignore[arg-type]


def two_stacks(**more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = stack_tensors("encoder.") | stack_tensors("decoder.", cross_attention=True)
    return tensors, small_options() | small_options("encoder") | more


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# What the tensors decide.


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_the_output_is_tied_where_the_tensors_are_equal(claimed: bool, equal: bool) -> None:
    tensors = stack_tensors()
    if equal:
        tensors["output_projection.weight"] = tensors["embed_tokens.weight"].clone()
    model = imported(tensors, small_options(share_decoder_input_output_embed=claimed))
    assert model.config.tie_embeddings == equal
    assert ("output.weight" in model.tensors) != equal
    noted = [note for note in model.notes if "output_projection" in note]
    assert len(noted) == (claimed != equal)
    if noted:
        expected = "are equal, so they are one" if equal else "differ, so they stay two"
        assert expected in noted[0]


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_embeddings_are_shared_where_the_tensors_are_equal(claimed: bool, equal: bool) -> None:
    tensors, options = two_stacks(share_all_embeddings=claimed)
    if equal:
        tensors["encoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"].clone()
    model = imported(tensors, options)
    assert model.config.share_embeddings == equal
    assert ("encoder.embedding.weight" in model.tensors) != equal
    assert sum("encoder.embed_tokens" in note for note in model.notes) == (claimed != equal)


def test_without_an_output_matrix_the_model_gives_features() -> None:
    tensors = without(stack_tensors(), "output_projection.weight")
    model = imported(tensors)
    assert not model.config.output_projection
    assert not model.config.tie_embeddings
    assert any(note.startswith("output_projection=false") for note in model.notes)
    assert not imported(
        tensors, small_options(vocab_size=11, no_output_layer=True)
    ).config.output_projection


def test_an_output_matrix_that_should_be_there_is_the_embedding_or_missing() -> None:
    tensors = without(stack_tensors(), "output_projection.weight")
    options = small_options(vocab_size=11)
    assert imported(tensors, options | {"share_decoder_input_output_embed": True}).config == (
        imported(
            tensors | {"output_projection.weight": tensors["embed_tokens.weight"]}, options
        ).config
    )
    with pytest.raises(UserError, match=r"1 missing, the first is output_projection.weight"):
        imported(tensors, options)


def test_positions_are_those_of_the_tensors() -> None:
    config = imported(stack_tensors(rows=10)).config
    assert (config.positions, config.max_seq_len) == ("learned", 8)
    bare = without(stack_tensors(), "embed_positions.weight")
    config = imported(bare, small_options(max_target_positions=33)).config
    assert (config.positions, config.max_seq_len) == ("none", 33)
    marked = bare | {"embed_positions._float_tensor": torch.zeros(1)}
    assert imported(marked).config.positions == "sinusoidal_fairseq"
    tensors, options = two_stacks()
    config = imported(tensors, options).config
    assert (config.max_seq_len, config.max_target_len) == (8, None)
    tensors["decoder.embed_positions.weight"] = torch.randn(7, 8)
    assert imported(tensors, options).config.max_target_len == 5


def test_the_first_two_rows_of_the_positions_stay_behind() -> None:
    tensors = stack_tensors(rows=10)
    model = imported(tensors)
    assert torch.equal(model.tensors["positions.weight"], tensors["embed_positions.weight"][2:])
    assert any("positions start at its row 2, so max 8 tokens" in note for note in model.notes)


def test_what_is_no_weight_is_passed_over() -> None:
    tensors = stack_tensors("decoder.") | {"decoder.version": torch.tensor([3.0])}
    assert imported(tensors).tensors.keys() == imported(stack_tensors()).tensors.keys()


@pytest.mark.parametrize("outer", ["model.", "lightning.net.model.", "encoder_decoder.lm."])
def test_a_model_within_a_model_is_imported(outer: str, tmp_path: Path) -> None:
    for tensors, options in ((stack_tensors("decoder."), small_options()), two_stacks()):
        inner = {f"{outer}{name}": tensor for name, tensor in tensors.items()}
        plain, found = imported(tensors, options), imported(inner, options)
        assert (found.config, found.tensors.keys()) == (plain.config, plain.tensors.keys())
        assert all(torch.equal(found.tensors[name], plain.tensors[name]) for name in plain.tensors)
        beside = inner | {"loss.weight": torch.ones(3)}
        with pytest.raises(UserError, match=f"loss.weight is not under {outer} as the model's la"):
            imported(beside, options)
        assert imported(without(beside, "loss.weight"), options)  # the way out
        second = inner | {f"teacher.{name}": tensor for name, tensor in tensors.items()}
        with pytest.raises(UserError, match=f"several models, with layers under {outer} and under"):
            imported(second, options)
        table = f"{outer}decoder.embed_tokens.weight"
        with pytest.raises(
            UserError, match=f"m.pt: {table} is missing, and Magnetar's models read"
        ):
            imported(without(inner, table), options)


TABLE = "layers.0.self_attn.xpos.scale"


def xpos_table(width: int) -> Tensor:
    """Equation 13 of arXiv 2212.10554 with gamma = 0.4, number by number."""
    return torch.tensor([(i + 0.4 * width) / (1.4 * width) for i in range(0, width, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model.decoder."])
def test_a_table_of_xpos_that_the_file_has_rounded_is_named(
    prefix: str, dtype: torch.dtype
) -> None:
    rounded = xpos_table(4).to(dtype)
    for table in (rounded, rounded.float()):
        state = stack_tensors(prefix) | {f"{prefix}{TABLE}": table}
        model = imported(state, small_options(xpos_rel_pos=True))
        noted = [note for note in model.notes if "is rounded in the file" in note]
        assert len(noted) == (dtype != torch.float32)
        assert all(note.startswith(f"{prefix}{TABLE} is rounded") for note in noted)


def test_a_table_of_xpos_that_the_options_contradict_is_refused() -> None:
    options = small_options(xpos_rel_pos=True)
    for table, message in (
        (xpos_table(8), r"is of shape \(4,\), and of heads of width 4, as .* it is \(2,\): give"),
        (xpos_table(4) + 0.01, "is not the table that TorchScale computes for heads of width 4"),
        (torch.full((2,), torch.nan), "is not the table that TorchScale computes"),
    ):
        with pytest.raises(UserError, match=f"m.pt: {TABLE} {message}"):
            imported(stack_tensors() | {TABLE: table}, options)
    state = stack_tensors() | {TABLE: xpos_table(8)}
    assert imported(state, options | {"decoder_attention_heads": 1})  # the way out
    with pytest.raises(UserError, match=f"m.pt: {TABLE} belongs to xPos, and by .* is false: give"):
        imported(state, small_options())


def test_half_precision_becomes_float32() -> None:
    model = imported({name: tensor.half() for name, tensor in stack_tensors().items()})
    assert {tensor.dtype for tensor in model.tensors.values()} == {torch.float32}
    assert "float16 in the file, float32 in the folder" in model.notes


def test_numbers_that_are_none_are_imported_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = stack_tensors()
    tensors["output_projection.weight"] = tensors["embed_tokens.weight"]
    tensors["embed_tokens.weight"][3, 4:7] = torch.tensor([math.nan, math.inf, -math.inf])
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        tensors[f"layers.0.self_attn.{name}.bias"][0] = math.nan
    options = small_options(share_decoder_input_output_embed=True)
    torch.save({"model": tensors, "config": options}, tmp_path / "m.pt")
    main(["import-torchscale", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    assert "warning     embedding.weight: 3 of 88 values are not finite" in printed
    assert "warning     blocks.0.attention.qkv_proj.bias: 3 of 24 values are not finite" in printed
    assert not any("stay two" in line for line in printed), "a NaN is its copy's equal"
    assert load_weights(tmp_path / "out")[1]["embedding.weight"][3, 4].isnan()


def test_the_options_name_the_class_where_the_tensors_do_not() -> None:
    assert imported(stack_tensors()).config.architecture == "decoder"
    assert imported(stack_tensors(), small_options("encoder")).config.architecture == "encoder"
    assert imported(stack_tensors("encoder."), small_options("encoder"), "namespace")
    for options, fits in (({"dropout": 0.1}, "neither"), (two_stacks()[1], "both")):
        with pytest.raises(UserError, match=f"m.pt: Encoder and Decoder have .* fit {fits}"):
            imported(stack_tensors(), options)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"output_projection.dense.weight": 1},
            "output_projection.dense.weight belongs to fairseq",
        ),
        ({"output_projection.bias": 11}, "output_projection.bias belongs to a bias of the output"),
        ({"vision_embed.proj.weight": 1}, "vision_embed.proj.weight belongs to BEiT-3's image pat"),
        ({"text_embed.weight": 1}, "text_embed.weight belongs to BEiT-3's embedding"),
        ({"embed_positions.A.weight": 1}, "embed_positions.A.weight belongs to positions of two m"),
        (
            {"layers.0.retention.q_proj.weight": 1},
            "layers.0.retention.q_proj.* belongs to a RetNet",
        ),
        ({"flat_param_0": 1}, "flat_param_0 belongs to FSDP's shards"),
        ({"layers.1.ffn.fc1.bias": 12}, "1 unexpected, the first is layers.1.ffn.fc1.bias"),
        (
            {"layers.0.ffn.fc1.bias": 5},
            "shape, the first is layers.0.ffn.fc1.bias, .5,. where .*12",
        ),
    ],
)
def test_tensors_that_magnetar_has_no_place_for_are_refused(
    change: dict[str, int], message: str
) -> None:
    tensors = stack_tensors() | {name: torch.zeros(size) for name, size in change.items()}
    with pytest.raises(UserError, match=f"m.pt: (the tensors do not fit the model: )?.*{message}"):
        imported(tensors)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "embed_positions.weight", "output_projection.weight"]
)
@pytest.mark.parametrize("shape", [(), (11,), (11, 8, 1)])
def test_tables_have_rows(name: str, shape: tuple[int, ...]) -> None:
    expected = re.escape(f"m.pt: {name} is of shape {shape}, and a table has two dimensions")
    with pytest.raises(UserError, match=expected):
        imported(stack_tensors() | {name: torch.zeros(shape)})


def test_a_table_of_positions_has_one_from_its_third_row_on() -> None:
    with pytest.raises(UserError, match=r"m.pt: embed_positions.weight has 2 rows, and positions"):
        imported(stack_tensors(rows=2))


def test_a_vocabulary_that_the_tables_contradict_is_refused() -> None:
    for size in (-1, 11):
        assert imported(stack_tensors(), small_options(vocab_size=size)).config.vocab_size == 11
    with pytest.raises(UserError, match=r"embed_tokens.weight has 11 rows, .* vocab_size is 64"):
        imported(stack_tensors(), small_options(vocab_size=64))
    longer = stack_tensors() | {"output_projection.weight": torch.zeros(12, 8)}
    with pytest.raises(UserError, match=r"output_projection.weight has 12 rows, .* is 11: give"):
        imported(longer, small_options(vocab_size=11))
    tensors, options = two_stacks(vocab_size=9)
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight has 11 rows, .* is 9"):
        imported(tensors, options)


def test_xpos_over_more_positions_than_float32_holds_is_refused() -> None:
    bare = without(stack_tensors(), "embed_positions.weight")
    options = small_options(xpos_rel_pos=True, xpos_scale_base=2)
    assert imported(bare, options | {"max_target_positions": 128}).config.xpos_scale_base == 2.0
    with pytest.raises(UserError, match=r"m.pt: its options make no .*: xpos_scale_base=2"):
        imported(bare, options | {"max_target_positions": 129})


def test_every_tensor_of_the_model_must_be_there() -> None:
    tensors = stack_tensors()
    for name in tensors:
        if not name.startswith(("embed", "output")):
            with pytest.raises(UserError, match=f"1 missing, the first is {re.escape(name)}"):
                imported(without(tensors, name))
    with pytest.raises(UserError, match=r"m.pt: embed_tokens.weight is missing, and Magnetar"):
        imported(without(tensors, "embed_tokens.weight"))


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match=r"m.pt: none of its 1 tensors belongs to a layer .* is x:"):
        imported({"x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"m.pt: holds a decoder with cross-attention and no enco"):
        imported(stack_tensors("decoder.", cross_attention=True))


def test_two_vocabularies_and_two_kinds_of_positions_are_refused() -> None:
    tensors, options = two_stacks()
    larger = tensors | {"encoder.embed_tokens.weight": torch.zeros(12, 8)}
    with pytest.raises(
        UserError, match=r"encoder.embed_tokens.weight has 12 rows and decoder.* 11"
    ):
        imported(larger, options)
    mixed = without(tensors, "decoder.embed_positions.weight")
    with pytest.raises(UserError, match=r"encoder's positions are learned and the decoder's none"):
        imported(mixed, options)


def test_options_that_make_no_model_are_refused_with_magnetars_reason() -> None:
    with pytest.raises(UserError, match=r"m.pt: its options make no .*: d_model=8 must be a mult"):
        imported(stack_tensors(), small_options() | {"decoder_attention_heads": 3})
    with pytest.raises(UserError, match=r"m.pt: its options make no .*: dropout=1.0: it should be"):
        imported(stack_tensors(), small_options(dropout=1.0))


def test_options_of_another_class_are_refused_only_where_someone_wrote_them() -> None:
    options = small_options(encoder_layers=3)
    with pytest.raises(UserError, match=r"m.pt: encoder_layers is no option of DecoderConfig"):
        imported(stack_tensors("decoder."), options)
    model = imported(stack_tensors("decoder."), options | {"lr": 0.1}, "namespace")
    assert model.config.num_layers == 1


@pytest.mark.parametrize("found", [1, 2, 8])
def test_another_number_of_experts_points_to_the_files_of_the_ranks(found: int) -> None:
    options = small_options(moe_freq=1, moe_expert_count=4)
    assert imported(stack_tensors(experts=4), options).config.moe is not None
    expected = rf"m.pt: layers.0.moe_layer has {found} experts, and moe_expert_count=4: of a model"
    with pytest.raises(UserError, match=expected):
        imported(stack_tensors(experts=found), options)


# fairseq.


class FairseqPositions(nn.Module):
    """Sines, then cosines, of positions from 2 on: fairseq's formula as a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        rows = []
        for position in range(2, tokens.size(1) + 2):
            angles = [position * 10000 ** (-i / (32 / 2 - 1)) for i in range(32 // 2)]
            rows.append([*(math.sin(a) for a in angles), *(math.cos(a) for a in angles)])
        return torch.tensor(rows).expand(tokens.size(0), -1, -1)


def fairseq_language_model(options: dict[str, Any]) -> nn.Module:
    """TorchScale's decoder as fairseq builds it: values overridden after the constructor."""
    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder

    config = DecoderConfig()
    config.override(argparse.Namespace(**options))
    embedding, output = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB, bias=False)
    output.weight = embedding.weight
    model = nn.Module()
    model.decoder = Decoder(config, embedding, FairseqPositions(), output)
    randomize(model)
    return model.eval()


FAIRSEQ = {
    **sizes("decoder"),
    "activation_fn": "relu",
    "share_decoder_input_output_embed": True,
    "no_scale_embedding": False,
    "subln": False,
    "deepnorm": False,
    "decoder_learned_pos": False,
    "arch": "lm_base",
    "vocab_size": None,
    "max_target_positions": None,
    "tokens_per_sample": 64,
}


@pytest.mark.parametrize(
    ("more", "norm"),
    [
        ({}, "pre"),
        ({"subln": True}, "subln"),
        ({"deepnorm": True, "decoder_normalize_before": False}, "deepnorm"),
        ({"decoder_normalize_before": False}, "post"),
    ],
)
@pytest.mark.parametrize("is_cfg", [True, False])
@torch.no_grad()
def test_fairseqs_language_models_keep_their_logits(
    more: dict[str, Any], norm: str, is_cfg: bool, tmp_path: Path, torchscale: None
) -> None:
    options = FAIRSEQ | more
    theirs = fairseq_language_model(options)
    args = argparse.Namespace(**options)
    torch.save(
        {
            "args": None if is_cfg else args,
            "cfg": {"_name": None, "model": args, "task": {"data": "x"}} if is_cfg else None,
            "model": theirs.state_dict() | {"decoder.version": torch.tensor([3.0])},
            "extra_state": {"epoch": 1},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        },
        tmp_path / "checkpoint_last.pt",
    )
    import_torchscale([tmp_path / "checkpoint_last.pt"], tmp_path / "out")
    config = load_weights(tmp_path / "out")[0]
    assert config.norm == norm
    assert config.positions == "sinusoidal_fairseq"
    assert config.max_seq_len == 64
    assert config.tie_embeddings
    batch, padding = tokens(3, 24, seed=1), right_padding([24, 17, 9])
    expected = theirs.decoder(batch, self_attn_padding_mask=padding)[0]
    found = load_model(tmp_path / "out")(batch, padding).logits
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=0, atol=TOLERANCE)


def test_fairseq_says_which_positions_there_are() -> None:
    tensors = without(stack_tensors("decoder."), "decoder.embed_positions.weight")
    options = small_options(subln=True, decoder_normalize_before=True)
    none = options | {"no_token_positional_embeddings": True}
    assert imported(tensors, none, "fairseq").config.positions == "none"
    config = imported(tensors, options, "fairseq").config
    assert (config.positions, config.max_seq_len) == ("sinusoidal_fairseq", 1024)
    assert imported(tensors, options | {"max_target_positions": 77}, "fairseq").config == (
        config.model_copy(update={"max_seq_len": 77})
    )
    with pytest.raises(UserError, match=r"embed_positions.weight is missing, and decoder_learned_"):
        imported(tensors, options | {"decoder_learned_pos": True}, "fairseq")


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_experts_of_any_number_of_ranks_make_the_same_model(num_ranks: int, tmp_path: Path) -> None:
    options = {
        **sizes("decoder"),
        "vocab_size": VOCAB,
        "moe_freq": 2,
        "moe_expert_count": 4,
        "moe_top1_expert": True,
        "use_xmoe": True,
    }
    theirs, config = build("decoder", options)
    args = argparse.Namespace(**vars(config), decoder_learned_pos=True)
    state = {f"decoder.{name}": tensor for name, tensor in theirs.state_dict().items()}
    shared = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    path = tmp_path / "checkpoint_3_100-shared.pt"
    torch.save({"args": args, "cfg": None, "model": shared, "extra_state": {}}, path)
    num_local = max(1, 4 // num_ranks)
    for rank in range(num_ranks):
        experts = {}
        for name, tensor in state.items():
            place = re.fullmatch(r"(.+\.experts)\.(\d)\.(.+)", name)
            if place and int(place[2]) in {(rank * num_local + i) % 4 for i in range(num_local)}:
                experts[f"{place[1]}.{int(place[2]) % num_local}.{place[3]}"] = tensor
        held = {"args": args, "cfg": None, "model": experts, "extra_state": {}}
        torch.save(held, tmp_path / f"checkpoint_3_100-rank-{rank}.pt")
    import_torchscale([path], tmp_path / "out")
    batch = tokens(3, 24, seed=1)
    found = load_model(tmp_path / "out")(batch).logits
    torch.testing.assert_close(found, theirs(batch)[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_bare_stack_in_a_checkpoint_of_fairseq_is_of_the_class_of_its_options(
    side: Architecture, experts: int, tmp_path: Path
) -> None:
    options = DEFAULTS[side] | small_options(side)
    if experts:
        options |= {"moe_freq": 1, "moe_expert_count": experts}
    state = stack_tensors(experts=experts)
    held = {"args": None, "cfg": {"model": argparse.Namespace(**options)}, "extra_state": {}}
    shared = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    path = tmp_path / ("c_last-shared.pt" if experts else "c_last.pt")
    torch.save(held | {"model": shared}, path)
    for rank in range(experts // 2):
        local = {
            name.replace(f".experts.{2 * rank + i}.", f".experts.{i}."): tensor
            for name, tensor in state.items()
            for i in range(2)
            if f".experts.{2 * rank + i}." in name
        }
        torch.save(held | {"model": local}, tmp_path / f"c_last-rank-{rank}.pt")
    import_torchscale([path], tmp_path / "out")
    config, tensors = load_weights(tmp_path / "out")
    assert config.architecture == side
    expected = imported(state, options, "fairseq")
    assert config == expected.config
    assert all(torch.equal(tensors[name], expected.tensors[name]) for name in tensors)
    # The length of the samples is that of a decoder's positions.
    bare = without(state, "embed_positions.weight")
    options |= {"max_source_positions": 33, "max_target_positions": None, "tokens_per_sample": 44}
    options = {
        name: value
        for name, value in options.items()
        if name in DEFAULTS[side] or name == "tokens_per_sample"
    }
    length = imported(bare, options, "fairseq").config.max_seq_len
    assert length == (33 if side == "encoder" else 44)


@torch.no_grad()
def test_safetensors_keep_ties_that_they_write_once(tmp_path: Path, torchscale: None) -> None:
    options = {
        **sizes("decoder"),
        "vocab_size": VOCAB,
        "share_decoder_input_output_embed": True,
    }
    theirs, _ = build("decoder", options)
    save_model(theirs, str(tmp_path / "m.safetensors"))
    (tmp_path / "o.json").write_text(json.dumps(options))
    path = tmp_path / "m.safetensors"
    import_torchscale([path], tmp_path / "out", tmp_path / "o.json")
    assert load_weights(tmp_path / "out")[0].tie_embeddings
    batch = tokens(2, MAX_LEN, seed=1)
    found = load_model(tmp_path / "out")(batch).logits
    torch.testing.assert_close(found, theirs(batch)[0], rtol=0, atol=TOLERANCE)


# The command.


def write_files(folder: Path, options: dict[str, Any], **more: Any) -> list[str]:
    torch.save(stack_tensors(**more), folder / "m.pt")
    (folder / "o.json").write_text(json.dumps(options))
    out = folder / "out"
    return ["import-torchscale", str(folder / "m.pt"), "--out", str(out)]


def test_the_command_writes_a_folder_and_says_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = small_options(moe_freq=1, moe_expert_count=4)
    arguments = write_files(tmp_path, options, experts=4)
    main([*arguments, "--config", str(tmp_path / "o.json")])
    printed = capsys.readouterr().out.splitlines()
    config, tensors = load_weights(tmp_path / "out")
    count = sum(tensor.numel() for tensor in stack_tensors(experts=4).values()) - 2 * 8
    assert sum(tensor.numel() for tensor in tensors.values()) == count
    assert f"parameters  {count:,}" in printed
    assert "was         TorchScale Decoder" in printed
    assert "experts     4 in each of 1 MoE layers" in printed
    assert any(line.startswith("note        moe.route_padding=true") for line in printed)
    assert config.moe is not None
    # The last lines are a program that runs.
    names = {"tokens": torch.zeros(1, 3, dtype=torch.int64)}
    exec("\n".join(printed[-3:]), names)
    assert names["logits"].shape == (1, 3, 11)


def test_options_from_a_json_replace_those_of_the_file(tmp_path: Path) -> None:
    held = {"model": stack_tensors(), "config": small_options(dropout=0.1, activation_fn="relu")}
    torch.save(held, tmp_path / "m.pt")
    (tmp_path / "o.json").write_text(json.dumps({"dropout": 0.2}))
    import_torchscale([tmp_path / "m.pt"], tmp_path / "out", tmp_path / "o.json")
    config = load_weights(tmp_path / "out")[0]
    assert (config.dropout, config.activation) == (0.2, "relu")


def test_bad_input_ends_the_command_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_files(tmp_path, small_options())
    config = ["--config", str(tmp_path / "o.json")]

    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    assert "m.pt: holds tensors alone, and they do not say how many heads" in error(*arguments)
    (tmp_path / "o.json").write_text(json.dumps(small_options(decoder_heads=2)))
    assert "decoder_heads is no option of TorchScale 0.3.0's" in error(*arguments, *config)
    assert not (tmp_path / "out").exists()
