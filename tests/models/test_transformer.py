"""The models against a float64 reference written from the papers' formulas."""

import itertools
import math
import random
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from magnetar.models.config import ModelConfig, NormName
from magnetar.models.cost import flops_per_token, num_parameters
from magnetar.models.losses import IGNORE_INDEX
from magnetar.models.moe.layer import SparseFeedForward
from magnetar.models.transformer import (
    EncoderDecoder,
    ModelOutput,
    Transformer,
    build_model,
    empty_model,
    set_checkpointing,
)
from tests.models import brute_force, small
from tests.models.small import VOCAB

T, S = 6, 7
MOE = {"num_experts": 4, "every": 2}
ARCHITECTURES = ("decoder", "encoder", "encoder_decoder")
NORMS = get_args(NormName)
POSITIONS: dict[str, dict[str, object]] = {
    "learned": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "sinusoidal_fairseq": {"positions": "sinusoidal_fairseq"},
    "none": {"positions": "none"},
    "relative": {
        "attention_positions": "relative",
        "relative_buckets": 6,
        "relative_max_distance": 5,
    },
    "relative_both": {
        "positions": "learned",
        "attention_positions": "relative",
        "relative_bidirectional": True,
        "relative_buckets": 8,
        "relative_max_distance": 6,
    },
    "rotary": {"attention_positions": "rotary"},
    "xpos": {"attention_positions": "xpos", "xpos_scale_base": 7.0, "rope_theta": 50.0},
    "xpos_relative": {
        "attention_positions": "xpos_relative",
        "xpos_scale_base": 5.0,
        "relative_buckets": 4,
        "relative_max_distance": 4,
    },
}
# Tables of these are float32, whatever the model's type.
FLOAT32_POSITIONS = ("sinusoidal_fairseq", "rotary", "xpos", "xpos_relative")


def config(**keys: object) -> ModelConfig:
    more = {"num_decoder_layers": 3} if keys.get("architecture") == "encoder_decoder" else {}
    return small.config(**more | keys)


def random_model(**keys: object) -> Transformer | EncoderDecoder:
    return small.random_model(**config(**keys).model_dump(exclude_unset=True))


def token_ids(batch: int = 2, length: int = T, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def padded(batch: int, length: int) -> Tensor:
    """No padding in the first row; at the end, inside, at the start of the others."""
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[1, -2:] = True
    padding[2:, 0] = padding[2:, 3] = True
    return padding


def run(
    model: nn.Module,
    tokens: Tensor,
    padding: Tensor | None = None,
    source: Tensor | None = None,
    source_padding: Tensor | None = None,
) -> ModelOutput:
    """Any architecture; a source of its own where none is given."""
    if not isinstance(model, EncoderDecoder):
        return model(tokens, padding)
    source = token_ids(len(tokens), S, seed=1) if source is None else source
    return model(source, tokens, source_padding, padding)


def assert_equals_the_formulas(
    model: Transformer | EncoderDecoder,
    is_padded: bool,
    rtol: float,
    atol: float,
    split: int | None = None,
) -> None:
    tokens, source = token_ids(3), token_ids(3, S, seed=1)
    padding = padded(3, T) if is_padded else None
    source_padding = padded(3, S).flip(0) if is_padded else None
    with torch.no_grad():
        if isinstance(model, EncoderDecoder):
            logits = model(source, tokens, source_padding, padding).logits
        else:
            logits = model(tokens, padding, split_position=split).logits
        p = brute_force.parameters_of(model)
        for row in range(1, 3) if is_padded else range(1):
            expected = brute_force.model_output(
                p,
                model.config,
                tokens[row],
                None if padding is None else padding[row].tolist(),
                source=source[row],
                source_padding=None if source_padding is None else source_padding[row].tolist(),
                split=split,
            )
            real = slice(None) if padding is None else ~padding[row]
            found = logits[row][real].double()
            torch.testing.assert_close(found, expected[real], rtol=rtol, atol=atol)


HEADS: dict[str, dict[str, object]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "wide": {"num_kv_heads": 1, "head_dim": 6},
}
FACTORS: dict[str, tuple] = {
    "architecture": ARCHITECTURES,
    "norm": NORMS,
    "activation": ("gelu", "gelu_tanh", "relu", "swish", "swiglu"),
    "kind": tuple(POSITIONS),
    "norm_type": ("layernorm", "rmsnorm"),
    "bias": (False, True),
    "heads": tuple(HEADS),
    "qk_norm": (False, True),
    "scale_embedding": (False, True),
    "embedding_norm": (False, True),
    "stable_embedding": (False, True),
    "tie_embeddings": (False, True),
    "norm_eps": (1e-5, 0.03),
    "padded": (False, True),
    "special": (0, 1, 2, 3),
}


def pairwise() -> list[dict]:
    """Configurations among which every two values of two factors stand together once."""
    chooser = random.Random(0)
    names = list(FACTORS)
    uncovered = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
    }
    cases: list[dict] = []
    while uncovered:
        best: dict = {}
        best_covered: set = set()
        for _ in range(20):
            case = {name: chooser.choice(values) for name, values in FACTORS.items()}
            a, x, b, y = chooser.choice(sorted(uncovered, key=str))
            case |= {a: x, b: y}
            pairs = {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}
            if len(pairs & uncovered) > len(best_covered):
                best, best_covered = case, pairs & uncovered
        uncovered -= best_covered
        cases.append(best)
    return cases


def special_keys(case: dict) -> tuple[dict, int | None]:
    """What one architecture alone has, and the position of a multiway split."""
    special, architecture = case["special"], case["architecture"]
    if special == 3:
        return {"output_projection": False, "tie_embeddings": False}, None
    if special and architecture == "encoder":
        splits = {1: 3, 2: 0} if case["qk_norm"] else {1: None, 2: T + 3}
        return {"multiway": True}, splits[special]
    if special and architecture == "encoder_decoder":
        inner = {"cross_attention_inner_norm": False} if case["norm"] == "subln" else {}
        return {"max_target_len": T} | (inner if special == 1 else {"share_embeddings": True}), None
    return {"num_heads": 2 if special else 4}, None


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case.values())))
def test_a_dense_model_equals_the_formulas(case: dict) -> None:
    keys = {k: v for k, v in case.items() if k not in ("kind", "padded", "special", "heads")}
    more, split = special_keys(case)
    if case["qk_norm"] and case["special"] == 2:
        more["qk_norm_over"] = "all_heads"
    model = random_model(**keys | POSITIONS[case["kind"]] | HEADS[case["heads"]] | more).double()
    tolerance = 3e-5 if case["kind"] in FLOAT32_POSITIONS else 1e-9
    assert_equals_the_formulas(model, case["padded"], tolerance, tolerance, split)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("norm", "activation", "moe"),
    [
        ("subln", "gelu", MOE),
        ("pre", "swiglu", MOE | {"every": 1, "router": "linear", "top_k": 1}),
        ("deepnorm", "relu", MOE | {"gate": "sigmoid"}),
        ("normformer", "swiglu", MOE | {"top_k": 3}),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sparse_model_equals_the_formulas(
    architecture: str, norm: str, activation: str, moe: dict, is_padded: bool
) -> None:
    assert_a_sparse_model_equals_the_formulas(
        is_padded, architecture=architecture, norm=norm, activation=activation, moe=moe
    )


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("activation", "moe"),
    [
        ("swiglu", {"num_experts": 4, "first_dense_layers": 1, "every": 1}),
        ("gelu", MOE | {"expert_d_ff": 8, "shared_d_ff": 12, "router": "linear"}),
        ("swiglu", MOE | {"shared_d_ff": 12, "shared_gate": True, "weight_scale": 2.5}),
        ("swish", MOE | {"top_k": 3, "normalize_weights": "never", "weight_scale": 0.5}),
        ("relu", MOE | {"normalize_weights": "after_dropping", "weight_scale": 3.0}),
    ],
)
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_today_equal_the_formulas(
    activation: str, moe: dict, norm_type: str, bias: bool, is_padded: bool
) -> None:
    assert_a_sparse_model_equals_the_formulas(
        is_padded,
        norm="subln",
        activation=activation,
        moe=moe,
        norm_type=norm_type,
        bias=bias,
        num_layers=3 if "first_dense_layers" in moe else 2,
    )


def assert_a_sparse_model_equals_the_formulas(is_padded: bool, **keys: object) -> None:
    model = random_model(norm_eps=1e-3, **keys)
    # float32 through up to five layers; logits are of size 1 to 5.
    assert_equals_the_formulas(model, is_padded, 1e-3, 3e-4)


def test_routing_is_that_of_the_encoder_and_then_of_the_decoder() -> None:
    model = random_model(architecture="encoder_decoder", moe=MOE | {"every": 1, "num_experts": 5})
    source, target = token_ids(2, S), token_ids(2, T)
    routing = model(source, target).routing
    assert [int(stats.load.sum()) for stats in routing] == 2 * [2 * 2 * S] + 3 * [2 * 2 * T]
    for every, layers in ((1, 5), (2, 2), (3, 1)):
        moe = MOE | {"every": every}
        model = random_model(architecture="encoder_decoder", moe=moe)
        assert len(model(source, target).routing) == layers


def test_the_encoders_moe_layers_alone_may_count_positions_first() -> None:
    moe = MOE | {"time_major": True}
    for architecture in ARCHITECTURES:
        for name, module in random_model(architecture=architecture, moe=moe).named_modules():
            if name.endswith("deepspeed_moe"):
                is_encoders = architecture == "encoder" or name.startswith("encoder.")
                assert module.time_major == is_encoders


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_a_later_token_changes_no_earlier_logit(
    architecture: str, kind: str, moe: dict | None
) -> None:
    model = random_model(architecture=architecture, moe=moe, **POSITIONS[kind]).eval()
    tokens = token_ids()
    before = run(model, tokens).logits
    for position in range(1, T):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = run(model, changed).logits
        # Another token's expert moves the borders of the matmuls' blocks, nothing else.
        tolerance = 0.0 if moe is None else 2e-5
        difference = (after - before).abs().amax(-1)
        assert (difference[:, :position] <= tolerance).all()
        assert (difference[:, position:] > 1e-3).all(), "later logits must depend on the token"


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("norm", NORMS)
def test_every_token_changes_every_output_of_an_encoder(norm: str, moe: dict | None) -> None:
    model = random_model(architecture="encoder", norm=norm, moe=moe).eval()
    tokens = token_ids()
    before = model(tokens).logits
    for position in range(T):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        assert ((model(changed).logits - before).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("moe", [None, MOE, MOE | {"dispatch": "capacity", "capacity_factor": 9.0}])
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stands_in_padding_changes_nothing(
    architecture: str, kind: str, moe: dict | None
) -> None:
    model = random_model(architecture=architecture, moe=moe, **POSITIONS[kind])
    tokens, source = token_ids(3), token_ids(3, S, seed=1)
    padding, source_padding = padded(3, T), padded(3, S).flip(0)
    first = run(model, tokens, padding, source, source_padding)
    other_tokens = torch.where(padding, (tokens + 3) % VOCAB, tokens)
    other_source = torch.where(source_padding, (source + 3) % VOCAB, source)
    second = run(model, other_tokens, padding, other_source, source_padding)
    # Exactly: what differs is multiplied by 0 or left out, and the shapes are the same.
    assert torch.equal(first.logits[~padding], second.logits[~padding])
    for a, b in zip(first.routing, second.routing, strict=True):
        assert torch.equal(a.load, b.load)
    plain = run(model, tokens, None, source, None)
    assert not torch.allclose(plain.logits[~padding], first.logits[~padding], atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_moe_layer_draws_noise_of_its_own(architecture: str) -> None:
    model = random_model(architecture=architecture, moe=MOE | {"every": 1}, num_layers=3)
    layers = [module.layer for module in model.modules() if isinstance(module, SparseFeedForward)]
    assert sorted(layers) == list(range(6 if architecture == "encoder_decoder" else 3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_keys_of_samples_reach_every_stack(architecture: str) -> None:
    moe = MOE | {"every": 1, "jitter": 0.5}
    model = random_model(architecture=architecture, moe=moe, num_layers=1)
    inputs = (token_ids(2, S), token_ids(2)) if "_" in architecture else (token_ids(2),)
    keys = torch.tensor([1, 2])
    first, again, other = (model(*inputs, sample_keys=k) for k in (keys, keys, keys + 1))
    assert torch.equal(first.logits, again.logits)  # the same call
    for one, two in zip(first.routing, other.routing, strict=True):
        assert not torch.equal(one.probs, two.probs)


def test_padding_that_is_routed_enters_an_encoder_as_zeros() -> None:
    model = random_model(architecture="encoder", moe=MOE | {"route_padding": True})
    tokens, padding = token_ids(3), padded(3, T)
    first = model(tokens, padding)
    second = model(torch.where(padding, (tokens + 3) % VOCAB, tokens), padding)
    assert first.routing[0].load.sum() == 2 * 3 * T
    # Exactly: the first layer sees the same zeros.
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.routing[0].aux_loss, second.routing[0].aux_loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_at_the_end_equals_a_shorter_sequence(architecture: str) -> None:
    model = random_model(architecture=architecture, moe=MOE)
    tokens, source = token_ids(2), token_ids(2, S, seed=1)
    padding = torch.zeros(2, T, dtype=torch.bool)
    source_padding = torch.zeros(2, S, dtype=torch.bool)
    padding[:, -2:] = source_padding[:, -3:] = True
    long = run(model, tokens, padding, source, source_padding).logits
    short = run(model, tokens[:, :-2], None, source[:, :-3]).logits
    torch.testing.assert_close(long[:, :-2], short, rtol=0, atol=2e-5)  # sums in other orders


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_of_padding_alone_stays_finite(
    architecture: str, kind: str, moe: dict | None, dtype: torch.dtype
) -> None:
    model = random_model(architecture=architecture, moe=moe, **POSITIONS[kind]).to(dtype)
    tokens = token_ids(2)
    padding = torch.tensor([[True] * T, [False] * T])
    source_padding = torch.tensor([[True] * S, [False] * S])
    output = run(model, tokens, padding, None, source_padding)
    assert output.logits.dtype == dtype
    assert output.logits.isfinite().all()
    F.cross_entropy(output.logits[1:].flatten(0, 1).float(), tokens[1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_changes_no_logit_of_another_one(architecture: str) -> None:
    model = random_model(architecture=architecture, moe=MOE).eval()
    tokens, source = token_ids(3), token_ids(3, S, seed=1)
    alone = run(model, tokens[1:2], None, source[1:2]).logits
    together = run(model, tokens, None, source).logits[1:2]
    # Matmuls of other sizes sum in another order.
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "activation_dropout", "drop_path"])
@pytest.mark.parametrize("moe", [None, MOE | {"every": 1}], ids=["dense", "moe"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_acts_in_training_alone(architecture: str, moe: dict | None, key: str) -> None:
    tokens = token_ids()
    plain = random_model(architecture=architecture, moe=moe)
    expected = run(plain, tokens).logits
    model = random_model(architecture=architecture, moe=moe, **{key: 0.5})
    torch.manual_seed(0)
    assert not torch.allclose(run(model, tokens).logits, expected, atol=1e-2)
    # Outside training the same operations run.
    assert torch.equal(run(model.eval(), tokens).logits, run(plain.eval(), tokens).logits)


def test_the_embedding_has_dropout_of_its_own() -> None:
    model = random_model(architecture="encoder", dropout=0.4, positions="none")
    x = model.embed(torch.zeros(200, 12, dtype=torch.int64))
    row = model.embedding.weight[0]
    kept = x != 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.02)  # 38400 draws
    torch.testing.assert_close(x[kept], (row / 0.6).expand_as(x)[kept])


def test_embeddings_given_in_place_of_tokens_are_treated_like_the_tokens_own() -> None:
    keys = {"scale_embedding": True, "stable_embedding": True, "embedding_norm": True}
    model = random_model(architecture="encoder", **keys)
    tokens, padding = token_ids(3), padded(3, T)
    rows = model.embedding.weight[tokens]
    given = model(None, padding, token_embeddings=rows).logits
    assert torch.equal(given, model(tokens, padding).logits)  # the same rows, then the same calls
    other = model(None, padding, token_embeddings=rows + torch.randn_like(rows)).logits
    assert not torch.allclose(other, given, atol=1e-2)


def test_the_output_projection_is_the_embedding_only_if_tied() -> None:
    for architecture in ARCHITECTURES:
        tied = random_model(architecture=architecture)
        untied = random_model(architecture=architecture, tie_embeddings=False)
        ends = [getattr(model, "decoder", model) for model in (tied, untied)]
        assert ends[0].output.weight is ends[0].embedding.weight
        assert ends[1].output.weight is not ends[1].embedding.weight


def test_encoder_and_decoder_have_one_embedding_only_if_shared() -> None:
    shared = random_model(architecture="encoder_decoder", share_embeddings=True)
    apart = random_model(architecture="encoder_decoder")
    assert shared.encoder.embedding.weight is shared.decoder.embedding.weight
    assert apart.encoder.embedding.weight is not apart.decoder.embedding.weight
    assert shared.encoder.output is None


@pytest.mark.parametrize(
    ("keys", "stack", "length", "message"),
    [
        ({"max_seq_len": 8}, None, 9, "a sequence of 9 tokens exceeds the model's max_seq_len=8"),
        (
            {"architecture": "encoder_decoder", "max_seq_len": 8, "max_target_len": 5},
            "decoder",
            6,
            "a sequence of 6 tokens exceeds the model's max_target_len=5",
        ),
        (
            {"architecture": "encoder_decoder", "max_seq_len": 8},
            "decoder",
            9,
            "a sequence of 9 tokens exceeds the model's max_seq_len=8",
        ),
        (
            {"architecture": "encoder_decoder", "max_seq_len": 8, "max_target_len": 12},
            "encoder",
            9,
            "a sequence of 9 tokens exceeds the model's max_seq_len=8",
        ),
    ],
)
@pytest.mark.parametrize("kind", POSITIONS)
def test_a_sequence_that_is_too_long_is_refused(
    keys: dict, stack: str | None, length: int, message: str, kind: str
) -> None:
    model = random_model(**keys | POSITIONS[kind])
    part = model.get_submodule(stack) if stack else model
    memory = torch.randn(1, 3, 16) if stack == "decoder" else None
    with pytest.raises(ValueError, match=message) as caught:
        part(token_ids(1, length), memory=memory)
    assert "shorten it, or use a model with more positions" in str(caught.value)
    assert part(token_ids(1, length - 1), memory=memory).logits.size(1) == length - 1


def gradients(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits, routing = run(model, tokens, padded(3, T))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    for stats in routing:
        loss = loss + stats.aux_loss + stats.z_loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("kind", ["learned", "relative", "xpos_relative"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_activations_give_the_same_loss_and_gradients(
    architecture: str, kind: str, moe: dict | None, use_reentrant: bool
) -> None:
    model = random_model(architecture=architecture, moe=moe, dropout=0.1, **POSITIONS[kind])
    tokens, calls = token_ids(3), []

    def recomputed(function: object, *tensors: Tensor) -> object:
        assert all(isinstance(tensor, Tensor) for tensor in tensors)
        calls.append(function)
        return checkpoint(function, *tensors, use_reentrant=use_reentrant)

    torch.manual_seed(0)
    loss, expected = gradients(model, tokens)
    set_checkpointing(model, recomputed)
    torch.manual_seed(0)
    again, found = gradients(model, tokens)
    assert len(calls) == (5 if architecture == "encoder_decoder" else 2)
    assert torch.equal(loss, again)  # the same forward pass
    # Gradients of a tensor used twice may be added in another order: two roundings of numbers
    # around 1 and of their sums of up to 18 tokens.
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    calls.clear()
    with torch.no_grad():
        run(model, tokens)
    run(model.eval(), tokens)
    set_checkpointing(model.train(), None)
    run(model, tokens)
    assert calls == [], "nothing is recomputed without gradients, in evaluation, or if unset"


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    model = build_model(config(d_model=256, d_ff=256, vocab_size=500, num_layers=1), seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(500, (16, 13), generator=generator)
    losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    # Logits of variance s^2 = 256 * 0.02^2 add s^2 / 2 = 0.05 to ln V.
    assert (losses.total / losses.num_tokens).item() == pytest.approx(
        math.log(500) + 0.05, abs=0.05
    )


COUNTED: list[dict] = [
    {},
    {"norm": "normformer", "tie_embeddings": False, "attention_positions": "xpos_relative"},
    {"norm": "admin", "stable_embedding": True, "embedding_norm": True, "qk_norm": True},
    {"activation": "swiglu", "positions": "sinusoidal"},
    {"output_projection": False, "tie_embeddings": False},
    {"moe": {"num_experts": 4, "every": 2}},
    {"moe": {"num_experts": 4, "every": 2, "ep_size": 2}, "activation": "swiglu"},
    {"moe": {"num_experts": 6, "every": 1, "top_k": 1, "d_router": 3}, "norm": "pre"},
    {"moe": {"num_experts": 40, "every": 3, "router": "linear"}, "tie_embeddings": False},
    {"moe": {"num_experts": 40, "every": 2, "gate": "sigmoid", "top_k": 7}},
]


KINDS: list[dict] = [
    *({"architecture": architecture} for architecture in ARCHITECTURES),
    {"architecture": "encoder_decoder", "share_embeddings": True},
    {"architecture": "encoder", "multiway": True},
]


@pytest.mark.parametrize(
    "keys",
    [a | b for a in COUNTED for b in KINDS if not ("moe" in a and "multiway" in b)],
    ids=str,
)
def test_num_parameters_equals_a_count(keys: dict) -> None:
    cfg = config(**{"num_layers": 4} | keys)
    whole = cfg.model_dump()
    if cfg.moe is not None:
        whole["moe"]["ep_size"] = 1
    total = active = 0
    for name, parameter in empty_model(ModelConfig.model_validate(whole)).named_parameters():
        total += parameter.numel()
        if name.endswith(("positions.weight", "relative_bias.weight")):
            continue  # a look-up
        if name.endswith("embedding.weight"):
            is_output = cfg.tie_embeddings and name != "encoder.embedding.weight"
            active += parameter.numel() if is_output else 0
        elif ".experts." in name:
            assert cfg.moe is not None
            active += cfg.moe.top_k * parameter[0].numel()
        else:
            active += parameter.numel()
    assert num_parameters(cfg) == (total, active)


@pytest.mark.parametrize("seq_len", [4, 64])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("heads", [{}, {"head_dim": 6}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_equal_the_ones_that_torch_counts(
    architecture: str, heads: dict, tie: bool, seq_len: int
) -> None:
    sizes = {"max_seq_len": 64, "num_layers": 3, "tie_embeddings": tie} | heads
    cfg = config(architecture=architecture, **sizes)
    model = build_model(cfg, seed=0)
    tokens = token_ids(2, seq_len)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(model, tokens, None, tokens).logits.sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    # torch counts the whole square of attention, of which a causal model needs half, and counts
    # no vector: 6 FLOPs a token each in ours.
    attentions = {"decoder": (3, 0), "encoder": (0, 3), "encoder_decoder": (3, 3 + 3)}
    causal, full = attentions[architecture]
    square = counts["aten.bmm"] / (causal + full)
    matrices = counts["aten.mm"] + counts["aten.addmm"] + square * (causal / 2 + full)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert flops_per_token(cfg, seq_len) == pytest.approx(
        matrices / tokens.numel() + 6 * vectors, rel=1e-12
    )


def train(model: nn.Module, steps: int, loss_of: object) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss, aux_loss = loss_of(step)  # type: ignore[operator]
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_decoder_learns_to_copy_the_previous_token() -> None:
    model = build_model(config(d_model=32, moe=MOE), seed=0)

    def loss_of(step: int) -> tuple[Tensor, Tensor]:
        tokens = token_ids(16, 10, seed=step)
        targets = torch.cat([torch.full((16, 1), IGNORE_INDEX), tokens[:, :-1]], dim=1)
        losses, routing = model(tokens, targets=targets)
        return losses.total / losses.num_tokens, 0.01 * routing[0].aux_loss

    losses = train(model, 60, loss_of)
    assert losses[0] > 0.9 * math.log(VOCAB)
    assert losses[-1] < 0.5, "attention cannot reach one token back"
