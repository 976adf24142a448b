"""An exported folder, opened by transformers without Magnetar, against our own model."""

import json
import os
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path
from typing import Any, get_args

import pytest
import tokenizers
import torch

from magnetar.convert.huggingface.export import CARRIED, require_exportable, to_hf
from magnetar.data.errors import UserError
from magnetar.data.text.tokenizer import load_tokenizer, train_sentencepiece
from magnetar.launchers.convert import main
from magnetar.models.config import ModelConfig, NormName
from magnetar.models.decoding.generation import sample
from magnetar.models.transformer import EncoderDecoder, Transformer, build_model
from magnetar.models.weights.load_save import load_model, save_weights
from tests.ranks import ROOT

pytest.importorskip("transformers")

VOCAB, NUM_TOKENS = 40, 5
KEYS = {"vocab_size": VOCAB, "num_layers": 2, "d_model": 16, "d_ff": 24, "num_heads": 2}
KEYS |= {"max_seq_len": 16}
POSITIONS = ("none", "relative", "rotary", "xpos", "xpos_relative")
ROUTERS = (None, "xmoe", "linear")
# Every other key takes its turn in the grid below.
OTHERS: list[dict[str, Any]] = [
    {},
    {"activation": "swiglu", "qk_norm": True},
    {"activation": "relu", "tie_embeddings": False, "scale_embedding": True},
    {"activation": "swish", "embedding_norm": True},
    {"activation": "gelu_tanh"},
    {"positions": "sinusoidal", "stable_embedding": True},
    {"positions": "sinusoidal_fairseq", "norm_eps": 1e-3},
    {"positions": "learned", "qk_norm": True, "embedding_norm": True},
]
MOES: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 3, "gate": "sigmoid", "every": 1, "num_experts": [4, 6]},
    {"gate": "sigmoid", "top_k": 1, "dispatch": "capacity", "capacity_factor": 1.0},
    {"normalize_weights": "after_dropping", "every": 1},
    {"normalize_weights": "never"},
]
OF_XMOE = [{}, {"d_router": 3}, {"learned_temperature": False}, {"normalize_tokens": False}]


def grid() -> dict[str, dict[str, Any]]:
    others, moes, of_xmoe = cycle(OTHERS), cycle(MOES), cycle(OF_XMOE)
    found = {}
    for norm, positions, router in product(get_args(NormName), POSITIONS, ROUTERS):
        keys = KEYS | next(others) | {"norm": norm, "attention_positions": positions}
        if "relative" in positions:
            keys |= {"relative_buckets": 8, "relative_max_distance": 12}
        if router is not None:
            moe = {"num_experts": 4, "router": router} | next(moes)
            keys["moe"] = moe | (next(of_xmoe) if router == "xmoe" else {})
        found[f"{norm}-{positions}-{router}"] = keys
    return found


TWO = {"architecture": "encoder_decoder", "num_decoder_layers": 3, "max_target_len": 12}
MOE = {"num_experts": [2, 4], "every": 2}
BOTH = {
    f"two-{norm}": KEYS | TWO | {"norm": norm, "moe": MOE, "attention_positions": positions}
    for norm, positions in zip(get_args(NormName), cycle(("xpos_relative", "none", "rotary")))
} | {
    "two-shared": KEYS | TWO | {"share_embeddings": True, "tie_embeddings": True},
    "two-inner": KEYS | TWO | {"cross_attention_inner_norm": False, "tie_embeddings": False},
}
ENCODERS = {
    f"encoder-{norm}": KEYS | {"architecture": "encoder", "norm": norm, "moe": {"num_experts": 4}}
    for norm in get_args(NormName)
} | {"encoder-relative": KEYS | {"architecture": "encoder", "attention_positions": "xpos_relative"}}
DECODERS = grid()
MODELS = DECODERS | BOTH | ENCODERS

ROWS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [8]]
PADDED = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 0, 0, 0, 0]]
MASK = [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
TARGET = [[1, 7, 7, 2], [1, 8, 2, 9]]


def drawn(keys: dict[str, Any]) -> Transformer | EncoderDecoder:
    """A model whose every tensor is random, LayerNorms and temperatures too."""
    model = build_model(keys, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.mul_(0.02 if name.endswith("temperature") else 0.2))
    return model


TEXTS = ["the senate builds", " two  spaces\nand a line", "\u00e9migr\u00e9 \U0001f642"]


def vocabularies(folder: Path) -> dict[str, Path]:
    """A SentencePiece model and a tokenizer.json."""
    lines = [f"the senate builds peace and a railroad {number}." for number in range(200)]
    train_sentencepiece(lines, 290, folder / "tokenizer.model")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=280, special_tokens=["<|endoftext|>"])
    (folder / "bpe.json").write_text(bpe.to_str())
    return {"sentencepiece": folder / "tokenizer.model", "bpe": folder / "bpe.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    cases = []
    for name, keys in MODELS.items():
        model = drawn(keys)
        save_weights(folder / "ours" / name, model.config, dict(model.state_dict()))
        to_hf(folder / "ours" / name, folder / name)
        cases.append({"name": name, "rows": ROWS, "num_tokens": NUM_TOKENS})
        cases[-1] |= {"source": PADDED, "source_mask": MASK, "target": TARGET}
    for name, file in vocabularies(folder).items():
        model = drawn(KEYS | {"vocab_size": 300})
        save_weights(folder / "ours" / name, model.config, dict(model.state_dict()))
        report = to_hf(folder / "ours" / name, folder / name, tokenizer=file)
        assert not any(line.startswith("warning") for line in report)
        cases.append({"name": name, "rows": ROWS, "num_tokens": 1, "texts": TEXTS})
    (folder / "cases.json").write_text(json.dumps(cases))
    reader = ROOT / "tests" / "convert" / "huggingface" / "read_exports.py"
    done = subprocess.run(
        [sys.executable, "-P", str(reader), str(folder)],
        cwd=folder,
        env=os.environ
        | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "found.pt")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_same_logits_and_greedy_tokens(
    name: str, found: dict, folder: Path
) -> None:
    model = load_model(folder / "ours" / name)
    assert isinstance(model, Transformer)
    with torch.no_grad():
        for index, row in enumerate(ROWS):
            tokens = torch.tensor([row])
            logits = model(tokens).logits[0]
            for kind in ("alone", "left", "right"):
                close(logits, found[name][kind][index])
            continued = sample(model, tokens, NUM_TOKENS, temperature=0)[0, len(row) :]
            assert found[name]["tokens"][index] == continued.tolist()
    assert found[name]["uncached"] == found[name]["tokens"]
    assert found[name]["beams agree"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_decoder_has_the_same_logits_and_greedy_tokens(
    name: str, found: dict, folder: Path
) -> None:
    model = load_model(folder / "ours" / name)
    source, padding = torch.tensor(PADDED), torch.tensor(MASK) == 0
    with torch.no_grad():
        close(model(source, torch.tensor(TARGET), padding).logits, found[name]["logits"])
        target = torch.ones(2, 1, dtype=torch.long)
        for _ in range(NUM_TOKENS):
            best = model(source, target, padding).logits[:, -1].argmax(-1, keepdim=True)
            target = torch.cat([target, best], dim=1)
    assert found[name]["tokens"] == target[:, 1:].tolist()
    assert found[name]["beams agree"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_the_same_logits(name: str, found: dict, folder: Path) -> None:
    model, seen = load_model(folder / "ours" / name), torch.tensor(MASK) == 1
    with torch.no_grad():
        logits = model(torch.tensor(PADDED), ~seen).logits
    close(logits[seen], found[name]["logits"][seen])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentencepiece", "bpe"])
def test_texts_have_the_same_ids_and_come_back(name: str, found: dict, folder: Path) -> None:
    tokenizer = load_tokenizer(folder / name)
    assert found[name]["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert found[name]["decoded"] == [tokenizer.decode(ids) for ids in found[name]["ids"]]
    assert found[name]["eos"] == tokenizer.eos_id


@pytest.mark.slow
def test_the_folder_is_still_one_of_our_own(found: dict, folder: Path) -> None:
    name = next(iter(DECODERS))
    ours, theirs = load_model(folder / "ours" / name), load_model(folder / name)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_command_writes_the_folder_and_says_how_to_open_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = drawn(KEYS)
    save_weights(tmp_path / "lm", model.config, dict(model.state_dict()))
    words = ["to-hf", str(tmp_path / "lm"), "--out", str(tmp_path / "hf"), "--dtype", "bfloat16"]
    main([*words, "--shard-size", "5KB"])
    printed = capsys.readouterr().out
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'hf'}'" in printed
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"README.md", "config.json", "modeling_magnetar.py"} <= names
    assert "model.safetensors.index.json" in names
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_magnetar.MagnetarForCausalLM"
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"architecture": "encoder", "multiway": True}, "model.multiway=true"),
        ({"output_projection": False, "tie_embeddings": False}, "model.output_projection=false"),
        (
            {"moe": {"num_experts": 4, "eval_capacity_fraction": 0.25}},
            "model.moe.eval_capacity_fraction=0.25",
        ),
    ],
)
def test_what_the_file_does_not_compute_is_refused_by_its_key(keys: dict, named: str) -> None:
    with pytest.raises(UserError) as refused:
        require_exportable(ModelConfig.model_validate(KEYS | keys))
    assert str(refused.value).startswith(f"{named} has no counterpart")


def test_every_carried_key_is_one_of_a_model() -> None:
    config = ModelConfig.model_validate(KEYS | {"moe": {"num_experts": 4}})
    assert config.moe is not None
    known = set(type(config).model_fields) | {f"moe.{k}" for k in type(config.moe).model_fields}
    assert known >= CARRIED
