"""What tests/models/moe/test_all_to_all.py runs on several ranks; see tests.ranks."""

from typing import Any

import torch

PROGRAM = "tests.models.all_to_all_programs:everything"
D, F, NUM_EXPERTS = 16, 32, 8
# With the linear router of these cases no token wants the experts of UNWANTED.
UNWANTED: dict[str, list[int]] = {
    "experts without tokens": [1, 4, 6],
    "no token for rank 0": [0, 1, 2, 3],
}
CASES: dict[str, dict[str, Any]] = {
    "top 2": {},
    "top 1, no norm": {"top_k": 1, "gate": "sigmoid"},
    "experts without tokens": {"router": "linear"},
    "no token for rank 0": {"router": "linear"},
    "rank 0 is padding": {},
    "capacity": {"dispatch": "capacity", "capacity_factor": 0.6},
}


def result(case: str, device: torch.device, dtype: str) -> dict[str, torch.Tensor]:
    """Outputs, statistics and gradients of this rank's tokens through a layer of all ranks."""
    from magnetar.models.moe.config import MoELayerConfig
    from magnetar.models.moe.deepspeed import ReplicatedMoE
    from tests.models.brute_force import randomize

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    keys: dict[str, Any] = {"num_experts": NUM_EXPERTS, "ep_size": world_size} | CASES[case]
    moe = MoELayerConfig(**keys)
    layer = ReplicatedMoE(D, F, moe, "gelu", "no norm" not in case, 1.0)
    randomize(layer)
    first = rank * layer.num_local_experts
    for name, parameter in layer.named_parameters():
        if ".experts." in name:  # as many numbers on every rank, but others
            parameter.data.add_(0.01 * first)
    if case in UNWANTED:
        layer.deepspeed_moe.gate.wg.weight.data[:, 0] = 20.0
        layer.deepspeed_moe.gate.wg.weight.data[UNWANTED[case], 0] = -20.0
    layer = layer.to(device, getattr(torch, dtype))
    layer.set_deepspeed_parallelism()
    generator = torch.Generator().manual_seed(rank)
    x, upstream = torch.randn(2, 2, 9 + rank % 2 * ("capacity" not in case), D, generator=generator)
    x[..., 0] = 1.0
    padding = None
    if "padding" in case:
        padding = torch.rand(x.shape[:2], generator=generator) < (1.0 if rank == 0 else 0.3)
        padding = padding.to(device)
    upstream = upstream.to(device)
    x = x.to(device, getattr(torch, dtype)).requires_grad_()
    out, stats = layer(x, padding)
    ((out * upstream).sum() + stats.aux_loss + stats.z_loss).backward()
    assert x.grad is not None
    results = {"out": out.detach(), "x": x.grad} | {
        name: parameter.grad for name, parameter in layer.named_parameters()
    }
    results |= {name: value.detach() for name, value in stats._asdict().items()}
    return {name: value.cpu() for name, value in results.items()}


def everything(cases: list[str], dtype: str = "float32") -> dict:
    """Case -> its results with kernels, twice; (case, "plain") -> those without."""
    torch.set_num_threads(1)
    import magnetar.models.kernels
    from magnetar.engine.build import start_distributed

    device = start_distributed()
    usable = magnetar.models.kernels.usable
    if device.type == "cpu":  # Triton's interpreter
        usable = lambda x: x.element_size() <= 4  # noqa: E731
    results: dict = {}
    for case in cases:
        magnetar.models.kernels.usable = usable
        results[case] = [result(case, device, dtype) for _ in range(2)]
        magnetar.models.kernels.usable = lambda _: False
        results[case, "plain"] = result(case, device, dtype)
    return results
