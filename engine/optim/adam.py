"""The optimizer and its parameter groups, and AdamW with 8-bit states from bitsandbytes.

Each of the two moments of AdamW8bit takes one byte per element (arXiv 2110.02861). Blocks of 256
elements share a float32 scale, and a byte stands for one of 256 numbers in [-1, 1] (the code book).
Embeddings, as in the paper, and tensors of fewer than `min_8bit_size` elements keep float32
moments. That depends on the model only. The borders of the blocks depend on the layout as well,
since blocks are cut from a rank's flat partition.
"""

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magnetar.data.errors import UserError, missing_package
from magnetar.engine.config.deepspeed import ADAMS, EIGHT_BIT, LION, RADAM
from magnetar.engine.optim.lion import Lion

MOMENTS = ("exp_avg", "exp_avg_sq")

PACKAGE = "bitsandbytes"
VERSION = "0.50.2"
MIN_8BIT_SIZE = 4096
BLOCK = 256  # elements that share a scale; bitsandbytes' kernels are compiled for it
_MAX_NUMEL = 2**31 - 1  # the kernels index with 32 bits
_MAX_GROUP_NUMEL = 2**30  # 4 GiB of float32 gradients
_CHUNK = BLOCK * 2**14  # elements converted at a time


def require_optimizer_package(optimizer_type: str) -> None:
    """Refuse an optimizer whose package is missing."""
    if optimizer_type == EIGHT_BIT and find_spec(PACKAGE) is None:
        what = f'optimizer.type="{EIGHT_BIT}"'
        raise missing_package(what, f"{PACKAGE}=={VERSION}", "8bit", 'use type "AdamW"')


def small_groups(param_groups: Iterable[dict]) -> list[dict]:
    """The parameter groups, divided so that an update copies little memory at a time.

    In each update ZeRO 1 and 2 copy a group's weights, to lay them out one behind the other, and
    its gradients to float32. A group of one tensor is laid out already. Parameters keep their
    order, and one that is too large for a group forms a group by itself.
    """
    divided: list[dict] = []
    for group in param_groups:
        numel = math.inf  # of the last part; a group begins with a new one
        for parameter in group["params"]:
            if numel + parameter.numel() > _MAX_GROUP_NUMEL:
                divided.append(group | {"params": []})
                numel = 0
            divided[-1]["params"].append(parameter)
            numel += parameter.numel()
    return divided


def takes_8_bits(tensor_numel: int, is_embedding: bool, min_8bit_size: float) -> bool:
    """Whether a tensor's moments have 8 bits; each expert's tensor counts by itself."""
    return not is_embedding and tensor_numel >= min_8bit_size


def groups_by_bits(
    model: nn.Module, param_groups: Iterable[dict], min_8bit_size: int
) -> list[dict]:
    """The parameter groups, each divided into one of 8-bit and one of 32-bit moments.

    The model's parameters must still have their shapes. A tensor's moments have 8 bits from
    `min_8bit_size` elements on.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def bits(parameter: Any) -> int:
        # Experts' tensors are stacked, so their first dimension counts experts.
        is_stacked = hasattr(parameter, "group_name")
        numel = parameter[0].numel() if is_stacked else parameter.numel()
        return 8 if takes_8_bits(numel, id(parameter) in embeddings, min_8bit_size) else 32

    return [
        group | {"params": parameters, "optim_bits": number}
        for group in param_groups
        for number in (8, 32)
        if (parameters := [p for p in group["params"] if bits(p) == number])
    ]


def uses_deepspeeds_adam(optimizer: dict[str, Any]) -> bool:
    """Whether a config's optimizer is DeepSpeed's Adam, which is compiled at its first use."""
    return optimizer["type"] in ADAMS and not optimizer["params"].get("torch_adam", True)


def fuse_torchs_adam(deepspeed: dict[str, Any]) -> None:
    """Make PyTorch's Adam, if DeepSpeed's sections use it, update in one pass over the memory."""
    if deepspeed["optimizer"]["type"] in ADAMS and not uses_deepspeeds_adam(deepspeed["optimizer"]):
        deepspeed["optimizer"]["params"] |= {"torch_adam": True, "fused": True}


def take_client_optimizer(deepspeed: dict[str, Any]) -> Callable[[list[dict]], Any] | None:
    """A function from parameter groups to the optimizer, if DeepSpeed does not know its type.

    The optimizer's section is then removed from DeepSpeed's sections.
    """
    section = deepspeed["optimizer"]
    name, params = section["type"], section["params"]
    if name in ADAMS:
        return None
    del deepspeed["optimizer"]
    deepspeed |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    # DeepSpeed still warns of an optimizer that it has not tested. Magnetar's tests have.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "untested optimizer" not in record.getMessage()
    )
    numbers = {key: params[key] for key in ("lr", "betas", "weight_decay")}
    if name == LION:
        return partial(Lion, **numbers)
    numbers["eps"] = params["eps"]
    if name == RADAM:
        return partial(torch.optim.RAdam, decoupled_weight_decay=True, **numbers)
    # On import bitsandbytes warns of a missing 4-bit kernel for this CPU, which we do not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from magnetar.engine.optim.adam_8bit import BlockwiseAdamW

    return partial(BlockwiseAdamW, **numbers)


def check_lengths(keys: Iterable[Tensor]) -> None:
    """Refuse tensors of an optimizer that bitsandbytes' kernels would update only in part."""
    longest = max((tensor.numel() for tensor in keys), default=0)
    if longest > _MAX_NUMEL:
        raise UserError(
            f'optimizer.type="{EIGHT_BIT}" updates at most {_MAX_NUMEL:,} elements of a rank at a '
            f"time, and one group of this model has {longest:,}: use more ranks, or "
            f'zero_optimization.stage=3, whose sub_group_size divides them, or type "AdamW"',
            on_every_rank=True,
        )


class EightBitMoment(NamedTuple):
    """A stretch of a moment that is stored in 8 bits.

    Attributes:
        codes: (n,) uint8, codes of the whole partition.
        scales: (ceil(n / 256),) float32, scales of its blocks.
        code_book: (256,) float32, ascending.
        start, stop: first element of the stretch, and the one after its last.
    """

    codes: Tensor
    scales: Tensor
    code_book: Tensor
    start: int
    stop: int

    def numel(self) -> int:
        """Elements of the stretch."""
        return self.stop - self.start

    def narrow(self, _dim: int, start: int, length: int) -> "EightBitMoment":
        """A part of the stretch, like Tensor.narrow."""
        begin = self.start + start
        return self._replace(start=begin, stop=begin + length)

    def copy_to(self, out: Tensor, non_blocking: bool = False) -> None:
        """Write the stretch's values to `out` (n,) float32, in chunks of little memory."""
        for first in range(self.start, self.stop, _CHUNK):
            last = min(first + _CHUNK, self.stop)
            blocks = torch.arange(first, last, device=self.codes.device) // BLOCK
            values = self.code_book[self.codes[first:last].long()] * self.scales[blocks]
            out[first - self.start : last - self.start].copy_(values, non_blocking=non_blocking)


Moment = Tensor | EightBitMoment


def moments(state: dict[str, Any]) -> dict[str, Moment]:
    """Adam's two moments of a tensor, by their names in checkpoints.

    PyTorch and DeepSpeed use these names; bitsandbytes calls them state1 and state2. While a
    checkpoint is read, 8-bit moments have float32 copies under these names.
    """
    found: dict[str, Moment] = {name: state[name].view(-1) for name in MOMENTS if name in state}
    if found or "state1" not in state:
        return found
    for number, name in enumerate(MOMENTS, start=1):
        codes = state[f"state{number}"].view(-1)
        if codes.dtype == torch.uint8:
            scales, code_book = state[f"absmax{number}"], state[f"qmap{number}"]
            found[name] = EightBitMoment(codes, scales, code_book, 0, codes.numel())
        else:
            found[name] = codes
    return found


def round_to_8_bits(adam: Any) -> None:
    """Put the float32 copies that `BlockwiseAdamW.make_states` made into the states."""
    for state in adam.state.values():
        if MOMENTS[0] not in state or "state1" not in state:
            continue  # float32 moments, or another optimizer's
        for number, name in enumerate(MOMENTS, start=1):
            values = state.pop(name)
            codes, scales = state[f"state{number}"].view(-1), state[f"absmax{number}"]
            for first in range(0, len(values), _CHUNK):
                chunk = values[first : first + _CHUNK].to(codes.device)
                found = quantised(chunk, state[f"qmap{number}"])
                codes[first : first + len(chunk)] = found[0]
                scales[first // BLOCK : first // BLOCK + len(found[1])] = found[1]


def quantised(values: Tensor, code_book: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the blocks of a moment.

    Values that came from codes and scales of the same blocks are represented with the same bits,
    so an optimizer that is resumed in the same layout goes on exactly.

    Args:
        values: (n,) float32, from the beginning of a block.
        code_book: (256,) float32, ascending up to 1.

    Returns:
        (n,) uint8 and (ceil(n / 256),) float32.
    """
    blocks = nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    # The first moment's code book runs from -0.993 to 1, the second moment's from 0 to 1.
    below = blocks.amin(1, keepdim=True) / code_book[0]  # (blocks, 1)
    scales = blocks.amax(1, keepdim=True) / code_book[-1]
    scales = torch.where(code_book[0] < 0, scales.maximum(below), scales).abs()  # no -0
    middles = (code_book[1:] + code_book[:-1]) / 2
    # The smallest normal number divides a block of zeros.
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(shares, middles)
    # If the values came from a scale, rounding may have moved the quotient up to two units off it.
    best, best_scales = (code_book[codes] * scales == blocks).sum(1, keepdim=True), scales
    for units in (-2, -1, 1, 2):
        other = (scales.view(torch.int32) + units).view(torch.float32)
        matches = (code_book[codes] * other == blocks).sum(1, keepdim=True)
        is_better = (matches > best) & (scales > 0)
        best = torch.where(is_better, matches, best)
        best_scales = torch.where(is_better, other, best_scales)
    return codes.view(-1)[: len(values)].to(torch.uint8), best_scales.view(-1)
