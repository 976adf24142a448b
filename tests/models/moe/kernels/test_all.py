"""The kernels around the experts against float64 sums, in Triton's interpreter or on a GPU."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.machine import lacks

if not lacks("triton"):
    from magnetar.models.moe.kernels.expert_ffn import ExpertFFN
    from magnetar.models.moe.kernels.permute import CombineRows, GatherRows
    from magnetar.models.moe.kernels.tiles import num_tiles, sum_tiles

pytestmark = pytest.mark.needs("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {"gelu": F.gelu, "relu": torch.relu, "swish": F.silu}


class Dispatch(NamedTuple):
    """Random choices of N tokens, some of them dropped, and the rows that follow from them."""

    experts: Tensor
    kept: Tensor
    row_of: Tensor
    assignment_of: Tensor
    offsets: Tensor


def dispatch(num_tokens: int, num_experts: int, top_k: int, drop: bool) -> Dispatch:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    # The last expert gets nothing, and the first one more than a tile.
    experts = (scores + torch.linspace(1.0, 0.0, num_experts)).topk(top_k).indices
    kept = torch.rand(num_tokens, top_k, generator=generator) > (0.3 if drop else -1.0)
    expert_of = experts.where(kept, num_experts).view(-1)
    assignment_of = expert_of.argsort(stable=True)[: int(kept.sum())]
    row_of = torch.full((num_tokens * top_k,), -1, dtype=torch.int32)
    row_of[assignment_of] = torch.arange(len(assignment_of), dtype=torch.int32)
    counts = torch.bincount(expert_of, minlength=num_experts + 1)[:num_experts]
    found = (experts, kept, row_of.view(-1, top_k), assignment_of.int(), counts.cumsum(0).int())
    return Dispatch(*(tensor.to(DEVICE) for tensor in found))


def layer(tensors: dict[str, Tensor], chosen: Dispatch, activation: str) -> Tensor:
    """Every token through every expert, then its own are picked."""
    x = torch.einsum("nd,edf->nef", tensors["tokens"], tensors["w1"]) + tensors["b1"]
    h = ACTIVATIONS[activation](x)
    if "gain" in tensors:
        h = F.layer_norm(h, h.shape[-1:]) * tensors["gain"] + tensors["shift"]
    y = torch.einsum("nef,efd->ned", h, tensors["w2"])
    if "b2" in tensors:
        y = y + tensors["b2"]
    index = chosen.experts.unsqueeze(-1).expand(-1, -1, y.size(-1))
    return (y.gather(1, index) * (tensors["weights"] * chosen.kept).unsqueeze(-1)).sum(1)


def kernels(tensors: dict[str, Tensor], chosen: Dispatch, activation: str) -> Tensor:
    experts, _, row_of, assignment_of, offsets = chosen
    rows = GatherRows.apply(tensors["tokens"], row_of, assignment_of)
    norm = (tensors.get("gain"), tensors.get("shift"))
    first = (tensors["w1"], tensors["b1"], *norm)
    y = ExpertFFN.apply(rows, *first, tensors["w2"], None, offsets, None, activation, 1e-5)
    picked = (tensors["weights"], experts, row_of, assignment_of, offsets)
    return CombineRows.apply(y, tensors.get("b2"), *picked)


SIZES = [  # tokens, d_model, d_ff, experts, top_k
    (20, 16, 32, 4, 2),
    (70, 16, 48, 4, 2),
    (33, 16, 32, 5, 3),
    (33, 64, 96, 3, 1),
    (150, 64, 32, 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("size", "drop", "bias", "activation"),
    [
        (size, index % 2 == 1, index != 3, ("gelu", "gelu", "swish", "relu", "gelu")[index])
        for index, size in enumerate(SIZES)
    ],
)
def test_layer(
    size: tuple[int, ...], drop: bool, bias: bool, norm: bool, activation: str, dtype: torch.dtype
) -> None:
    num_tokens, d_model, d_ff, num_experts, top_k = size
    chosen = dispatch(num_tokens, num_experts, top_k, drop)
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (num_tokens, d_model),
        "w1": (num_experts, d_model, d_ff),
        "b1": (num_experts, d_ff),
        "w2": (num_experts, d_ff, d_model),
        "weights": (num_tokens, top_k),
    }
    shapes |= {"gain": shapes["b1"], "shift": shapes["b1"]} if norm else {}
    shapes |= {"b2": (num_experts, d_model)} if bias else {}
    generator = torch.Generator().manual_seed(1)
    ours, exact = {}, {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * 0.3 + (name == "gain")
        own = value.to(torch.float32 if name == "weights" else dtype)
        ours[name] = own.to(DEVICE).requires_grad_()
        exact[name] = own.to(DEVICE).double().requires_grad_()
    upstream = torch.randn(num_tokens, d_model, generator=generator).to(DEVICE, dtype)
    out, expected = kernels(ours, chosen, activation), layer(exact, chosen, activation)
    # Some 30 roundings of 2^-24, or of 2^-11 in fp16 for each of 6 stored tensors, as shares of the
    # largest number.
    tolerance = 2e-6 if dtype == torch.float32 else 3e-3
    assert_close(out, expected, tolerance)
    found = torch.autograd.grad(out, list(ours.values()), upstream)
    wanted = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, tolerance)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Differences as shares of the largest number."""
    assert found.shape == wanted.shape
    difference = (found.detach().double() - wanted.detach()).abs().max()
    assert difference <= tolerance * wanted.detach().abs().max()


def test_nothing_to_do() -> None:
    chosen = dispatch(0, 3, 2, drop=False)
    tokens = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    rows = GatherRows.apply(tokens, chosen.row_of, chosen.assignment_of)
    assert rows.shape == (0, 16)
    (grad,) = torch.autograd.grad(rows.sum(), tokens)
    assert grad.shape == (0, 16)


def test_sums_over_tiles_leave_out_what_no_tile_wrote() -> None:
    ends = torch.tensor([70, 70, 75], dtype=torch.int32, device=DEVICE)
    partial = torch.full((num_tiles(75, 3, 32), 5), torch.nan, device=DEVICE)
    partial[:3], partial[3] = torch.arange(15.0).view(3, 5), 7.0  # 3 tiles of 32 rows, 0 and 1
    sums = sum_tiles(partial, ends, 32, torch.float32).cpu()
    expected = [[15.0, 18.0, 21.0, 24.0, 27.0], [0.0] * 5, [7.0] * 5]
    assert sums.tolist() == expected
    both = sum_tiles(torch.stack([partial, 2 * partial]), ends, 32, torch.float32).cpu()
    assert both.tolist() == [expected, [[2 * value for value in row] for row in expected]]
