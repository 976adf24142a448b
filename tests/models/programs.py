"""What the tests of this folder run on several ranks; see tests.ranks."""

from typing import Any

import torch

D, F, NUM_EXPERTS = 8, 16, 4
CASES: dict[str, dict[str, Any]] = {
    "top 2": {},
    "top 1, sigmoid": {"top_k": 1, "gate": "sigmoid"},
    "capacity": {"dispatch": "capacity", "capacity_factor": 0.6},
    "no token for rank 1": {"router": "linear"},
    "no token for rank 0": {"router": "linear", "top_k": 1},
    "linear": {"router": "linear"},
    "top 3, SwiGLU": {"top_k": 3, "activation": "swiglu"},
    "padding": {},
    "padding, capacity": {"dispatch": "capacity", "capacity_factor": 0.6},
    "padding, capacity, prioritized": {
        "dispatch": "capacity",
        "capacity_factor": 0.6,
        "capacity_order": "batch_prioritized",
    },
    "capacity of each rank": {
        "dispatch": "capacity",
        "capacity_factor": 0.6,
        "capacity_scope": "rank",
    },
    "rank 0 is padding": {"top_k": 1},
    "rank 1 is padding": {"normalize_weights": "after_dropping"},
    "all is padding": {},
    "no norm": {},
    "experts without tokens": {"router": "linear"},
}
# With the linear router of these cases no token wants these experts.
UNWANTED = {
    "no token for rank 1": [2, 3],
    "no token for rank 0": [0, 1],
    "experts without tokens": [1, 2],
}


def tokens(rank: int, length: int = 9) -> torch.Tensor:
    """(2, length, D) of a rank; the first number of every token is 1, for routers that insist."""
    x = torch.randn(2, length, D, generator=torch.Generator().manual_seed(rank))
    x[..., 0] = 1.0
    return x


def padding(case: str, rank: int, length: int = 9) -> torch.Tensor | None:
    """(2, length) of a rank, of another number on each; None in a case without any."""
    if "padding" not in case:
        return None
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, 1 + 5 * rank :] = mask[1, 2] = True
    if case in ("all is padding", f"rank {rank} is padding"):
        mask.fill_(True)
    return mask


def moe_keys(case: str) -> dict[str, Any]:
    """The keys of `moe` of a case."""
    return {key: value for key, value in CASES[case].items() if key != "activation"}


def build(case: str, ep_size: int) -> Any:
    """A layer with the same random parameters for every ep_size, biases and norms included."""
    from magnetar.models.moe.config import MoELayerConfig
    from magnetar.models.moe.deepspeed import ReplicatedMoE
    from tests.models.brute_force import randomize

    kind = (CASES[case].get("activation", "gelu"), case != "no norm", 1.0)
    moe = MoELayerConfig(num_experts=NUM_EXPERTS, **moe_keys(case))
    whole = ReplicatedMoE(D, F, moe, *kind)
    randomize(whole)
    if case in UNWANTED:
        whole.deepspeed_moe.gate.wg.weight.data[:, 0] = 20.0
        whole.deepspeed_moe.gate.wg.weight.data[UNWANTED[case], 0] = -20.0
    if ep_size == 1:
        return whole
    moe = MoELayerConfig(num_experts=NUM_EXPERTS, ep_size=ep_size, **moe_keys(case))
    layer = ReplicatedMoE(D, F, moe, *kind)
    first = torch.distributed.get_rank() % ep_size * layer.num_local_experts
    for (name, parameter), source in zip(layer.named_parameters(), whole.parameters(), strict=True):
        is_expert = ".experts." in name
        local = slice(first, first + layer.num_local_experts)
        parameter.data.copy_(source.data[local] if is_expert else source.data)
    layer.set_deepspeed_parallelism()
    return layer


def outputs_and_gradients() -> dict[tuple[str, int], dict[str, Any]]:
    """Of each case and ep_size: this rank's outputs, statistics and gradients of its own tokens."""
    from magnetar.engine.build import start_distributed
    from magnetar.engine.train_step import first_choices, routing_losses

    start_distributed()
    rank = torch.distributed.get_rank()
    found = {}
    for case in CASES:
        for ep_size in (1, 2):
            layer = build(case, ep_size)
            x = tokens(rank).requires_grad_()
            out, stats = layer(x, padding(case, rank))
            (chosen,) = first_choices([[stats]])
            # Shares of the whole batch's means, so that their mean over the two ranks is that.
            aux_loss, z_loss = (2 * loss for loss in routing_losses([stats], [chosen], x))
            ((out * tokens(rank + 10)).sum() + aux_loss + z_loss).backward()
            layer.eval()
            with torch.no_grad():
                length = 3 + 5 * rank
                uneven, _ = layer(tokens(rank, length), padding(case, rank, length))
            found[case, ep_size] = {
                "output": out.detach(),
                "uneven": uneven,
                "input_grad": x.grad,
                "load": stats.load,
                "dropped": stats.dropped,
                "aux_loss": aux_loss.detach(),
                "z_loss": z_loss.detach(),
                "entropy": 2 * stats.entropy / chosen.sum().clamp(min=1),
                "grads": {
                    name: torch.zeros_like(p) if p.grad is None else p.grad
                    for name, p in layer.named_parameters()
                },
            }
    return found


def with_and_without_kernels(cases: list[str], dtype: str = "float32") -> dict:
    """Case -> its results with kernels, twice; (case, "plain") -> those without."""
    import magnetar.models.kernels
    from magnetar.engine.build import start_distributed

    torch.set_num_threads(1)
    device = start_distributed()
    usable = magnetar.models.kernels.usable
    if device.type == "cpu":  # Triton's interpreter
        usable = lambda x: x.element_size() <= 4  # noqa: E731
    results: dict = {}
    for case in cases:
        magnetar.models.kernels.usable = usable
        results[case] = [one_pass(case, device, dtype) for _ in range(2)]
        magnetar.models.kernels.usable = lambda _: False
        results[case, "plain"] = one_pass(case, device, dtype)
    return results


def one_pass(case: str, device: torch.device, dtype: str) -> dict[str, torch.Tensor]:
    """Outputs, statistics and gradients of this rank's tokens through a layer of all ranks."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    layer = build(case, world_size).to(device, getattr(torch, dtype))
    length = 9 + rank % 2 * ("capacity" not in case)
    x = tokens(rank, length).to(device, getattr(torch, dtype)).requires_grad_()
    mask = padding(case, rank, length)
    out, stats = layer(x, None if mask is None else mask.to(device))
    ((out * tokens(rank + 10, length).to(device)).sum() + stats.aux_loss + stats.z_loss).backward()
    assert x.grad is not None
    results = {"out": out.detach(), "x": x.grad} | stats._asdict()
    results |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.detach().cpu() for name, value in results.items()}


def initial_states(ep_sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    """The initial model's state dict on this rank, for each ep_size."""
    from magnetar.engine.build import start_distributed
    from magnetar.models.config import ModelConfig
    from magnetar.models.transformer import build_model

    start_distributed()
    states = []
    for ep_size in ep_sizes:
        config = ModelConfig.model_validate(
            {
                "vocab_size": 31,
                "num_layers": 2,
                "d_model": D,
                "d_ff": F,
                "num_heads": 2,
                "max_seq_len": 8,
                "moe": {"num_experts": NUM_EXPERTS, "every": 1, "ep_size": ep_size},
            }
        )
        states.append(build_model(config, seed=4).state_dict())
    return states


def everything() -> dict[str, Any]:
    """Both of the above: starting two ranks takes longer than what they do."""
    torch.set_num_threads(1)
    return {"layers": outputs_and_gradients(), "states": initial_states([1, 2])}
