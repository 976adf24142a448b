"""Programs of other people: their models, their deepspeed.initialize, none of our configuration."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THRESHOLD = 0.05


class CifarNet(nn.Module):
    """The shape of DeepSpeed's CIFAR-10 example with MoE layers, for smaller images."""

    def __init__(self, moe_layers: list[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2 = nn.Linear(16 * 2 * 2, 24), nn.Linear(24, 16)
        self.moe_layer_list = nn.ModuleList(moe_layers)
        self.fc4 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(self.pool(F.relu(self.conv1(x))))).flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        for layer in self.moe_layer_list:
            x, _, _ = layer(x)
        return self.fc4(x)


class SparseMLP(nn.Module):
    """In place of the feed-forward layer of a model of transformers, which returns one tensor."""

    def __init__(self, mlp: nn.Module, width: int, **options: Any) -> None:
        super().__init__()
        from magnetar import MoE

        self.moe = MoE(width, mlp, **options)

    def forward(self, x: Tensor) -> Tensor:
        out, self.aux_loss, _ = self.moe(x)
        return out


def llama(**options: Any) -> nn.Module:
    """A tiny Llama whose second feed-forward layer is replaced if there are options of MoE."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    if options:
        layer = model.model.layers[1]
        layer.mlp = SparseMLP(layer.mlp, 16, **options)
    return model


def built(case: dict[str, Any]) -> nn.Module:
    import magnetar

    torch.manual_seed(5)
    ep_size, num_experts = case.get("ep_size", 1), case.get("num_experts", [2, 4])
    if case.get("model") == "llama":
        return llama(num_experts=num_experts[0], ep_size=ep_size, k=2, router="linear")
    if case.get("model") == "magnetar":
        layer = magnetar.PartitionedMoE if case.get("stage") == 3 else magnetar.MoE
        expert: nn.Module = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        options: dict[str, Any] = {"router": case.get("router", "xmoe")}
    else:
        from deepspeed.moe.layer import MoE as layer

        expert, options = nn.Linear(16, 16), {"k": 1, "min_capacity": 0}
    return CifarNet(
        [layer(16, expert, num_experts=n, ep_size=ep_size, **options) for n in num_experts]
    )


def initialized(model: nn.Module, case: dict[str, Any]) -> Any:
    """The engine of the example's lines and JSON."""
    import deepspeed
    import deepspeed.runtime.engine
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    if case.get("fused"):  # its op is not compiled here; the class decides the wrapper
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW  # type: ignore[attr-defined]
    parameters = {"params": list(model.parameters()), "name": "parameters"}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": case.get("gradient_clipping", 1.0),
        "zero_optimization": {"stage": case.get("stage", 0), **case.get("zero", {})},
        **{dtype: {"enabled": True} for dtype in ("bf16", "fp16") if case.get(f"{dtype}.enabled")},
    }
    if case.get("fp16.enabled"):
        config["fp16"] |= {"initial_scale_power": 8}
    if case.get("float32_sums"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "client" in case:
        del config["optimizer"]
        client = getattr(torch.optim, case["client"])(model.parameters(), lr=1e-3)
        return deepspeed.initialize(model=model, optimizer=client, config=config)[0]
    groups = split_params_into_different_moe_groups_for_optimizer(parameters)
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def loss_of(engine: Any, case: dict[str, Any], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case.get("model") == "llama":
        tokens = torch.randint(50, (8, 6), generator=generator)
        return engine(input_ids=tokens, labels=tokens).loss
    images = torch.randn((8, 3, 12, 12), generator=generator)
    labels = torch.randint(10, (8,), generator=generator)
    if case.get("poisoned"):
        images[0] = math.nan
    dtype = next(engine.module.parameters()).dtype
    return 8 * F.cross_entropy(engine(images.to(dtype)).float(), labels)


def clipped_steps(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One step of each case: what SparseClip says, a float64 brute force, what Adam was given.

    The brute force has each rank's own gradients from autograd's hooks and E from the case, and
    nothing of DeepSpeed's.
    """
    import deepspeed
    import deepspeed.comm as dist

    from magnetar import SparseClip
    from magnetar.engine.build import without_shm_op

    without_shm_op()
    deepspeed.init_distributed("gloo")
    results = []
    for case in cases:
        engine = initialized(built(case), case)
        clip = SparseClip(THRESHOLD)
        clip.install(engine)
        raw, given = raw_gradients(engine.module), given_gradients(engine)
        scale = float(engine.optimizer.loss_scale) if case.get("fp16.enabled") else 1.0
        for micro_step in range(case.get("accumulation", 1)):
            engine.backward(loss_of(engine, case, 10 * micro_step + dist.get_rank()))
            engine.step()
        everyone: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(everyone, (raw, given))
        results.append(
            brute_force([raw for raw, _ in everyone], case, scale)
            | {
                "norm": float(clip.norm),
                "found_expert": float(clip.expert_norm),
                "coefficient": float(clip.coefficient),
                "reported": float(engine.get_global_grad_norm() or 0.0),
                "optimizer": type(engine.optimizer).__name__,
                "given": whole_norm([given for _, given in everyone], case),
                "skipped": engine.skipped_steps,
            }
        )
        engine.destroy()
    return results


def raw_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Filled during backward: name -> float64 sum of this rank's gradients."""
    raw: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        raw[name] = raw.get(name, 0.0) + gradient.double()

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: add(name, gradient))
    return raw


def given_gradients(engine: Any) -> dict[str, float]:
    """Filled during the step: squared norms of the gradients that Adam is given."""
    given = {"dense": 0.0, "expert": 0.0}
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}

    def add(adam: torch.optim.Optimizer, *_: object) -> None:
        for group in adam.param_groups:
            for parameter in group["params"]:
                is_expert = group.get("moe") or ".experts." in names.get(id(parameter), "")
                if parameter.grad is not None:
                    square = float(parameter.grad.double().square().sum())
                    given["expert" if is_expert else "dense"] += square

    engine.basic_optimizer.register_step_pre_hook(add)
    return given


def whole_norm(given: list[dict[str, float]], case: dict[str, Any]) -> float:
    """The norm over all ranks, each gradient counted once."""
    copies = 1 if case.get("stage") else len(given)  # without ZeRO every rank has whole gradients
    of_experts = 1 if case.get("stage") else len(given) / case.get("ep_size", 1)
    return math.sqrt(sum(g["dense"] / copies + g["expert"] / of_experts for g in given))


def brute_force(
    raw: list[dict[str, Tensor]], case: dict[str, Any], scale: float
) -> dict[str, float]:
    dense = expert = weighted = 0.0
    ep_size, num_experts = case.get("ep_size", 1), case.get("num_experts", [2, 4])
    for name in raw[0]:
        if ".experts." not in name:
            dense += float((sum(own[name] for own in raw) / len(raw)).square().sum())
            continue
        is_cifar = case.get("model") != "llama"
        layer = int(name.split("moe_layer_list.")[1].split(".")[0]) if is_cifar else 0
        for first in range(ep_size):  # ranks r, r + ep_size, ... hold the same experts
            held = sum(own[name] for own in raw[first::ep_size]) / len(raw)
            expert += float(held.square().sum())
            weighted += float(held.square().sum()) / num_experts[layer]
    return {
        "raw_norm": math.sqrt(dense + weighted) / scale,
        "raw_expert": math.sqrt(expert) / scale,
        "raw_plain": math.sqrt(dense + expert) / scale,
    }


def outputs_of_both_layers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DeepSpeed's layer and ours with the same weights: outputs, losses, counts, gradients."""
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    from magnetar import MoE
    from magnetar.engine.build import without_shm_op

    without_shm_op()
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    return [_both(DeepSpeedMoE, MoE, dict(case), rank) for case in cases]


def _both(theirs_class: Any, ours_class: Any, case: dict[str, Any], rank: int) -> dict[str, Any]:
    expert = {
        "grouped": nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)),
        "looped": nn.Sequential(nn.Linear(16, 16), nn.Tanh()),
    }[case.pop("expert")]
    is_training, has_unused = case.pop("training", True), case.pop("has_unused", False)
    torch.manual_seed(3)
    options = {"top2_2nd_expert_sampling": False, "use_rts": False, "min_capacity": 0} | case
    theirs = theirs_class(16, expert, num_experts=4, **options).train(is_training)
    ours = ours_class(16, expert, num_experts=4, router="linear", **options).train(is_training)
    for layer in (theirs, ours):
        layer.set_deepspeed_parallelism()
    ours.deepspeed_moe.gate.load_state_dict(theirs.deepspeed_moe.gate.state_dict())
    if case.get("use_residual"):
        ours.coefficient.load_state_dict(theirs.coefficient.state_dict())
    with torch.no_grad():  # experts that differ
        for local, module in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            factor = 1 + rank % case.get("ep_size", 1) + 0.5 * local
            for parameter in module.parameters():
                parameter.mul_(factor)
            for parameter in ours.deepspeed_moe.experts.parameters():
                if "Looped" not in type(ours.deepspeed_moe.experts).__name__:
                    parameter[local] *= factor
        if "Looped" in type(ours.deepspeed_moe.experts).__name__:
            ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn((2, 12, 16), generator=generator)
    used = (torch.rand(24, generator=generator) > 0.3).long() if has_unused else None
    found = {"experts": type(ours.deepspeed_moe.experts).__name__}
    for name, layer in (("theirs", theirs), ("ours", ours)):
        inputs = x.clone().requires_grad_()
        output, aux_loss, counts = layer(inputs, used)
        if has_unused:  # DeepSpeed's balance loss then counts tokens that no expert gets
            aux_loss = torch.zeros(())
        ((output * torch.arange(16)).square().mean() + aux_loss).backward()
        gate_grad = layer.deepspeed_moe.gate.wg.weight.grad
        found[name] = (output, aux_loss, counts.float(), inputs.grad, gate_grad)
        found[name] = [tensor.detach() for tensor in found[name]]
    return found
