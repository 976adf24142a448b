"""Stacked experts against a Python loop over separate networks."""

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.moe.experts import Experts
from tests.models import brute_force

D, F = 8, 16
# float32 against float64: sums of at most 16 products of numbers around 1, then a LayerNorm.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
COUNTS = [[3, 1, 5, 2], [0, 4, 0, 7], [0, 0, 0, 6], [9, 0, 0, 0], [1], [0, 2]]


def build(
    num_experts: int, activation: str = "gelu", inner_norm: bool = True, **more: float
) -> Experts:
    experts = Experts(num_experts, D, F, activation, inner_norm, 1.0, **more)
    brute_force.randomize(experts, seed=1)
    return experts


class Separate(nn.Module):
    """One expert as torch's own layers in float64, with copies of its weights."""

    def __init__(self, experts: Experts, index: int, activation: str) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(D, F), nn.Linear(F, D)
        self.w3 = nn.Linear(D, F) if activation == "swiglu" else None
        self.norm = nn.LayerNorm(F, experts.norm_eps) if experts.inner_norm else nn.Identity()
        self.activation = {"gelu": nn.GELU(), "relu": nn.ReLU()}.get(activation, nn.SiLU())
        with torch.no_grad():
            for name, tensor in self.parts().items():
                tensor.copy_(getattr(experts, name)[index])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.w1(x))
        return self.w2(self.norm(h if self.w3 is None else h * self.w3(x)))

    def parts(self) -> dict[str, Tensor]:
        """The weights under the stacked tensors' names, in their layout."""
        found = {}
        for number in (1, 2, 3):
            linear = getattr(self, f"w{number}")
            if linear is not None:
                found |= {f"w{number}": linear.weight.data.T, f"b{number}": linear.bias.data}
        if isinstance(self.norm, nn.LayerNorm):
            found |= {"norm_weight": self.norm.weight.data, "norm_bias": self.norm.bias.data}
        return found

    def gradients(self) -> dict[str, Tensor]:
        """The same of the gradients."""
        for parameter in self.parameters():
            parameter.data = parameter.grad
        return self.parts()


@pytest.mark.parametrize("inner_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swish", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_outputs_and_all_gradients_equal_a_loop_over_separate_experts(
    counts: list[int], activation: str, inner_norm: bool
) -> None:
    experts = build(len(counts), activation, inner_norm, norm_eps=0.05)
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randn(sum(counts), D, generator=generator).requires_grad_()
    upstream = torch.randn(sum(counts), D, generator=generator)
    out = experts(rows, torch.tensor(counts))
    out.backward(upstream)
    assert rows.grad is not None
    start = 0
    for index, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        network = Separate(experts, index, activation)
        own_rows = rows[part].detach().double().requires_grad_()
        own_out = network(own_rows)
        own_out.backward(upstream[part].double())
        torch.testing.assert_close(out[part].double(), own_out, **ROUNDING)
        torch.testing.assert_close(rows.grad[part].double(), own_rows.grad, **ROUNDING)
        gradients = network.gradients()
        assert set(gradients) == {name for name, _ in experts.named_parameters()}
        for name, expected in gradients.items():
            found = getattr(experts, name).grad[index]
            torch.testing.assert_close(found.double(), expected, **ROUNDING)
            if count == 0:
                assert not found.any(), f"{name} of expert {index} has a gradient without rows"


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("inner_norm", [True, False])
def test_dropout_stands_between_activation_and_norm_in_training_only(
    inner_norm: bool, activation: str
) -> None:
    experts = build(2, activation, inner_norm, activation_dropout=0.4)
    rows, counts = torch.randn(9, D), torch.tensor([4, 5])
    expected = []
    torch.manual_seed(3)
    kept = nn.functional.dropout(torch.ones(9, F), 0.4)  # 0 or 1 / 0.6
    assert 0 < (kept == 0).double().mean() < 1
    for index, part in enumerate((slice(0, 4), slice(4, 9))):
        network = Separate(experts, index, activation)
        network.norm.register_forward_pre_hook(lambda _, h, part=part: (h[0] * kept[part],))
        expected.append(network(rows[part].double()))
    torch.manual_seed(3)
    torch.testing.assert_close(experts(rows, counts).double(), torch.cat(expected), **ROUNDING)
    plain = build(2, activation, inner_norm).eval()
    # Without dropout both run the same operations.
    assert torch.equal(experts.eval()(rows, counts), plain(rows, counts))


@pytest.mark.parametrize("inner_norm", [True, False])
def test_no_rows_at_all_give_no_rows_and_zero_gradients(inner_norm: bool) -> None:
    experts = build(3, inner_norm=inner_norm)
    rows = torch.zeros(0, D, requires_grad=True)
    out = experts(rows, torch.zeros(3, dtype=torch.long))
    out.backward(torch.zeros(0, D))
    assert out.shape == (0, D)
    assert rows.grad is not None
    assert rows.grad.shape == (0, D)
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_bf16_experts_stay_close_to_float32() -> None:
    experts = build(2).bfloat16()
    rows, counts = torch.randn(10, D).bfloat16(), torch.tensor([4, 6])
    out = experts(rows, counts)
    assert out.dtype == torch.bfloat16
    exact = experts.float()(rows.float(), counts)
    # bf16 has 8 bits: each of some five roundings is up to 4e-3 of numbers of size 1 to 3.
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.06)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("inner_norm", [True, False])
def test_a_state_dict_has_one_entry_for_each_parameter_of_each_expert(
    inner_norm: bool, activation: str
) -> None:
    names = ["w1", "b1", "w2", "b2"] + ["norm_weight", "norm_bias"] * inner_norm
    names += ["w3", "b3"] * (activation == "swiglu")
    experts = build(3, activation, inner_norm)
    state = experts.state_dict(prefix="moe.experts.")
    assert set(state) == {
        f"moe.experts.deepspeed_experts.{i}.{name}" for i in range(3) for name in names
    }
    for i in range(3):
        for name in names:
            entry = state[f"moe.experts.deepspeed_experts.{i}.{name}"]
            assert torch.equal(entry, getattr(experts, name)[i])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_round_trips_bitwise(nested: bool, activation: str) -> None:
    wrap = (lambda experts: nn.ModuleDict({"experts": experts})) if nested else (lambda e: e)
    source = wrap(build(3, activation))
    target = wrap(Experts(3, D, F, activation, True, 1.0))
    brute_force.randomize(target, seed=9)
    target.load_state_dict({key: value.clone() for key, value in source.state_dict().items()})
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("missing", ["deepspeed_experts.1.b1", "deepspeed_experts.0.norm_bias"])
def test_a_missing_expert_is_reported(missing: str) -> None:
    state = build(2).state_dict()
    del state[missing]
    name = missing.rpartition(".")[2]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        Experts(2, D, F, "gelu", True, 1.0).load_state_dict(state)


def test_one_expert_too_many_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*deepspeed_experts\.2\."):
        Experts(2, D, F, "gelu", True, 1.0).load_state_dict(build(3).state_dict())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_few_rows_without_gradients_get_what_many_get(activation: str) -> None:
    experts = build(8, activation).eval()
    counts = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0])
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few = experts(rows, counts)
    # The affine part of the norm acts on the activations in one, on the matrix in the other.
    torch.testing.assert_close(few, experts(rows, counts), **ROUNDING)
