"""What the tests of this folder run on several ranks; see tests.ranks."""

import copy
import math
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BASE: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_clipping": 0.05,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-3, "betas": [0.9, 0.98], "weight_decay": 0.01},
    },
    "zero_optimization": {"stage": 0},
    "magnetar": {
        "model": {
            "vocab_size": 97,
            "num_layers": 2,
            "d_model": 32,
            "d_ff": 64,
            "num_heads": 2,
            "max_seq_len": 16,
            "moe": {"num_experts": 4, "every": 2, "top_k": 2, "ep_size": 1},
        },
        "data": {"path": "unused", "seq_len": 16},
        "training": {
            "run_dir": "unused",
            "num_steps": 20,
            "lr_schedule": {"type": "constant", "warmup_steps": 0},
        },
    },
}


# What a checkpoint names of the data.
UNPREPARED: Any = SimpleNamespace(
    manifest=SimpleNamespace(tokenizer_fingerprint="a"), fingerprint="b"
)


def with_keys(base: dict, changes: dict[str, Any]) -> dict:
    """A copy of a JSON object with dotted keys set."""
    result = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = result
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    return result


def start(changes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Engine, SparseClip and resolved config of BASE with dotted keys set."""
    import deepspeed.comm as dist

    from magnetar.engine.build import build_engine, start_distributed
    from magnetar.engine.config.schema import check_config

    device = start_distributed()
    config, problems = check_config(with_keys(BASE, changes), dist.get_world_size())
    assert config is not None, problems
    engine, sparse_clip = build_engine(config, device)
    return engine, sparse_clip, config


# Tokens of the samples of a padded batch, step after step. In the first, the upper half is all
# padding, so half the ranks have no token; in the third nobody has one.
LENGTHS = [[16, 9, 1, 12, 0, 0, 0, 0], [3, 16, 7, 5, 11, 0, 2, 16], [0] * 8]


def batches(
    engine: Any, step: int, config: Any, is_padded: bool = False
) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """This rank's micro-batches of a global batch that depends on the step alone."""
    import deepspeed.comm as dist

    from magnetar.data.loader import objective
    from magnetar.data.text.packed_lm import Rows
    from magnetar.engine.prepare_run import data_options

    generator = torch.Generator().manual_seed(step)
    # Something to learn: small ones are frequent, every other one follows from the one before it.
    uniform = torch.rand((engine.train_batch_size(), 17), generator=generator)
    tokens = (97 * uniform**3).long()
    tokens[:, 1::2] = (tokens[:, 0:-1:2] * 3 + 1) % 97
    micro, ranks = engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
    lengths = np.array(LENGTHS[step % 3]) if is_padded else np.full(len(tokens), 16)
    rows = Rows(tokens.numpy(), lengths, np.arange(len(tokens)) + step * len(tokens))
    places = np.arange(len(tokens)).reshape(-1, ranks, micro)[:, dist.get_rank()]
    options = data_options(config)
    asked_about = objective(options.architecture, options.masking, 97)
    asked = [asked_about(Rows(*(values[place] for values in rows)), 1) for place in places]
    return [
        (
            tuple(torch.from_numpy(array).to(engine.device) for array in batch.inputs),
            torch.from_numpy(batch.targets).to(engine.device),
        )
        for batch in asked
    ]


def take_step(engine: Any, config: Any, step: int, is_padded: bool = False) -> Any:
    """The result of an optimizer step on the batch of that number."""
    from magnetar.engine.train_step import loss_weights, train_step

    weights = loss_weights(config.model.moe, config.training)
    return train_step(engine, batches(engine, step, config, is_padded), weights, 1, step)


def losses_and_norms(
    cases: list[dict[str, Any]], num_steps: int, padded: Collection[int] = ()
) -> list[dict[str, list[float]]]:
    """Train each case; the whole batch's losses, the clipping norms and the coefficients.

    Before every fifth step the model is asked outside training: `valid`.

    Args:
        cases: dotted keys over BASE.
        num_steps: optimizer steps.
        padded: indices of the cases whose batches hold padding.
    """
    from magnetar.engine.metrics import reduce_over_ranks

    results = []
    for index, changes in enumerate(cases):
        engine, clip, config = start(changes)
        curve: dict[str, list[float]] = {"norm": [], "coefficient": []}
        for step in range(num_steps):
            if step % 5 == 0:
                batch = batches(engine, step, config, index in padded)
                curve.setdefault("valid", []).append(evaluated(engine, batch))
            losses, _ = reduce_over_ranks(take_step(engine, config, step, index in padded))
            for name, value in losses.items():
                curve.setdefault(name, []).append(value)
            curve["norm"].append(float(clip.norm))
            curve["coefficient"].append(float(clip.coefficient))
        results.append(curve)
        engine.destroy()
    return results


@torch.no_grad()
def evaluated(engine: Any, batch: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]) -> float:
    """The cross entropy of a batch of all ranks, in evaluation mode."""
    import deepspeed.comm as dist

    model = engine.module.eval()
    sums = [model(*inputs, targets=targets).losses for inputs, targets in batch]
    model.train()
    totals = torch.stack([sum(s.cross_entropy for s in sums), sum(s.num_tokens for s in sums)])
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


def clipping_against_every_gradient(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of one step of each case: what SparseClip says, and what every rank's raw gradients say.

    The brute force takes each rank's own gradients from autograd's hooks, before DeepSpeed has
    reduced anything, gathers all of them, averages over the ranks and sums squares in float64.
    `seen_*` are the gradients that the wrapped Adam was handed.
    """
    import deepspeed.comm as dist

    results = []
    for changes in cases:
        engine, clip, config = start(changes)
        raw = record_raw_gradients(engine.module)
        seen = record_gradients_of_adam(engine.basic_optimizer)
        moe = config.model.moe
        scale = float(getattr(engine.optimizer, "loss_scale", 1.0)) if config.dtype == "fp16" else 1
        take_step(engine, config, 0)
        everyone: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(everyone, (raw, seen))
        raw_dense, raw_expert, raw_weighted = brute_force_norms(
            [r for r, _ in everyone], moe.ep_size
        )
        replicas = 1 if config.zero_stage else 2  # ZeRO hands Adam a part on each rank
        of_experts = 1 if moe.ep_size == 2 else replicas
        names = ("norm", "dense_norm", "expert_norm", "coefficient")
        results.append(
            {name: float(getattr(clip, name)) for name in names}
            | {
                "optimizer": type(engine.optimizer).__name__,
                "raw_dense": raw_dense / scale,
                "raw_expert": raw_expert / scale,
                "raw_weighted": raw_weighted / scale,
                "seen_dense": norm_over_ranks([s for _, s in everyone], "dense", replicas),
                "seen_expert": norm_over_ranks([s for _, s in everyone], "expert", of_experts),
            }
        )
        engine.destroy()
    return results


def clipped_beside_unclipped(cases: list[dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """Of each case, how a step and several steps differ from the same ones without clipping.

    Returns:
        coefficient: that of the first step.
        moments: state -> the largest error of the state after the first step from the unclipped
            one times the coefficient (its square for exp_avg_sq), as a share of the largest number.
        update: the same of the first update.
        difference: largest difference of a weight after all steps.
    """
    results = []
    for changes in cases:
        runs = []
        for threshold in (changes["gradient_clipping"], 1e30):
            engine, clip, config = start(changes | {"gradient_clipping": threshold})
            found = [states_of(engine)]
            coefficients = []
            for step in range(num_steps):
                take_step(engine, config, step)
                coefficients.append(float(clip.coefficient))
                found.append(states_of(engine))
            runs.append((coefficients, found))
            engine.destroy()
        (coefficients, clipped), (ones, unclipped) = runs
        assert set(ones) == {1.0}
        first = coefficients[0]
        factors = {"exp_avg": first, "exp_avg_sq": first**2, "update": first}
        errors = {}
        for state, factor in factors.items():
            one, other = (
                run[1]["weight"] - run[0]["weight"] if state == "update" else run[1].get(state)
                for run in (clipped, unclipped)
            )
            if one is not None:
                errors[state] = float((one - factor * other).abs().max() / one.abs().max())
        last = clipped[-1]["weight"] - unclipped[-1]["weight"]
        results.append(
            {
                "coefficient": first,
                "update": errors.pop("update"),
                "moments": errors,
                "difference": float(last.abs().max()),
            }
        )
    return results


def states_of(engine: Any) -> dict[str, torch.Tensor]:
    """All that this rank keeps of each state, float64, one parameter behind the other."""
    from magnetar.engine.zero import shares

    found: dict[str, list[torch.Tensor]] = {}
    for share in shares(engine):
        for state, values in share.values.items():
            found.setdefault(state, []).append(values.double().clone())
    return {state: torch.cat(values) for state, values in found.items()}


def record_raw_gradients(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Filled during backward: name -> (E, 0 if dense; float64 sum of this rank's gradients)."""
    raw: dict[str, tuple[int, torch.Tensor]] = {}

    def keep(name: str, num_experts: int) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            before = raw[name][1] if name in raw else 0.0
            raw[name] = (num_experts, before + gradient.detach().double().cpu())

        return hook

    for name, parameter in model.named_parameters():
        parameter.register_hook(keep(name, getattr(parameter, "num_experts", 0)))
    return raw


def record_gradients_of_adam(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Filled during the step: squared norms of what Adam sees on this rank."""
    seen = {"dense": 0.0, "expert": 0.0}

    def before_step(adam: torch.optim.Optimizer, *_arguments: object) -> None:
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = "expert" if group.get("moe") else "dense"
                    seen[kind] += float(parameter.grad.double().square().sum())

    optimizer.register_step_pre_hook(before_step)
    return seen


def brute_force_norms(
    raw_of_ranks: list[dict[str, tuple[int, torch.Tensor]]], ep_size: int
) -> tuple[float, float, float]:
    """Norms of the dense and the expert gradients, and that of eq. 1 (kappa by the layer's E).

    Gradients are averaged over the ranks, and each counts once.
    """
    dense = expert = weighted = 0.0
    world_size = len(raw_of_ranks)
    for name, (num_experts, _) in raw_of_ranks[0].items():
        of_ranks = [raw[name][1] for raw in raw_of_ranks]
        if not num_experts:
            dense += float((sum(of_ranks) / world_size).square().sum())
        else:
            # Ranks r, r + ep_size, ... hold the same experts.
            for first in range(ep_size):
                square = float((sum(of_ranks[first::ep_size]) / world_size).square().sum())
                expert += square
                weighted += square / num_experts
    return math.sqrt(dense), math.sqrt(expert), math.sqrt(dense + weighted)


def norm_over_ranks(seen_by_ranks: list[dict[str, float]], kind: str, replicas: int) -> float:
    """The norm over all ranks, where each gradient lies on `replicas` of them."""
    return math.sqrt(sum(seen[kind] for seen in seen_by_ranks) / replicas)


def weights_under_decay(
    independent: bool, num_steps: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """One matrix before and after each step, its gradients as Adam saw them, the lr's factors."""
    engine, _, config = start(
        {
            "magnetar.training.independent_weight_decay": independent,
            "magnetar.training.lr_schedule": {"type": "polynomial", "warmup_steps": 4},
            "optimizer.params.weight_decay": 0.1,
            "magnetar.model.moe": None,
        }
    )
    weight = engine.module.get_parameter("blocks.1.ffn.w1.weight")
    gradients: list[torch.Tensor] = []
    engine.basic_optimizer.register_step_pre_hook(
        lambda *_: gradients.append(weight.grad.detach().clone())
    )
    found, factors = [weight.detach().clone()], []
    for step in range(num_steps):
        factors.append(take_step(engine, config, step).lr / 3e-3)
        found.append(weight.detach().clone())
    return found, gradients, factors


def losses_and_checkpointed_blocks(cases: list[dict[str, Any]], num_steps: int) -> list[dict]:
    """`losses_and_norms` of each case, and how often DeepSpeed's checkpointing ran in it."""
    from deepspeed.runtime.activation_checkpointing.checkpointing import CheckpointFunction

    calls = []
    forward = CheckpointFunction.forward

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments)

    CheckpointFunction.forward = staticmethod(counted)
    results = []
    for changes in cases:
        calls.clear()
        (curve,) = losses_and_norms([changes], num_steps)
        results.append(curve | {"checkpointed_blocks": len(calls)})
    return results


def memory_of_engines(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Of two steps of each case: bytes that this rank's engine keeps, at their largest."""
    results = []
    for changes in cases:
        engine, _, config = start(changes)
        largest: dict[str, int] = {}
        update = engine.step

        def measured(
            engine: Any = engine, largest: dict[str, int] = largest, update: Any = update
        ) -> None:
            for name, tensors in kept_tensors(engine).items():
                largest[name] = max(largest.get(name, 0), bytes_of(tensors))
            update()

        engine.step = measured
        for step in range(2):
            take_step(engine, config, step)
        results.append(largest)
        engine.destroy()
    return results


def kept_tensors(engine: Any) -> dict[str, list[Any]]:
    """What an engine keeps between the last backward pass and the update, by purpose."""
    optimizer = engine.optimizer
    parameters = list(engine.module.parameters())
    weights = [p.data for p in parameters]
    weights += [p.ds_tensor.data for p in parameters if hasattr(p, "ds_tensor")]
    # Under ZeRO 3 and in BF16_Optimizer gradients have buffers, under ZeRO 1 and 2 lists of parts.
    gradients = [p.grad for p in parameters]
    gradients += getattr(optimizer, "fp32_groups_gradients_flat", [])
    gradients.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    for name in ("averaged_gradients", "all_grad_tensors"):
        for parts in getattr(optimizer, name, {}).values():
            gradients += parts or []
    master: list[Any] = []
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ):
        master += getattr(optimizer, name, [])
    moments = [
        states[name]
        for states in engine.basic_optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
        if name in states
    ]
    moments += getattr(engine.basic_optimizer, "ema", {}).values()
    return {"weights": weights, "gradients": gradients, "master": master, "moments": moments}


def bytes_of(tensors: list[Any]) -> int:
    """Bytes of the storages that tensors lie in, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def in_groups(max_numel: int, program: str, *arguments: Any) -> Any:
    """What a function of this module returns where optimizer groups have so many elements."""
    from magnetar.engine.optim import adam as optimizers

    optimizers._MAX_GROUP_NUMEL = max_numel
    return globals()[program](*arguments)


def peak_of_an_update(changes: dict[str, Any]) -> int:
    """Bytes that the second update takes for a while; the first one makes the states."""
    from torch.profiler import ProfilerActivity, profile

    engine, _, config = start(changes)
    update, events = engine.step, []

    def profiled() -> None:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            update()
        events[:] = recorded.profiler.kineto_results.events()

    engine.step = profiled
    for step in range(2):
        take_step(engine, config, step)
    engine.destroy()
    changed = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([nbytes for _, nbytes in sorted(changed, key=lambda c: c[0])]).max())


def newest_whole_checkpoints(runs: list[Any]) -> list[tuple[int | None, str]]:
    """Of each run the step of its newest whole checkpoint, and what was printed to stderr."""
    import contextlib
    import io

    from magnetar.engine.build import start_distributed
    from magnetar.engine.checkpoint.save_load import newest_whole_checkpoint

    start_distributed()
    answers = []
    for run in runs:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            found = newest_whole_checkpoint(run)
        answers.append((found.step if found else None, printed.getvalue()))
    return answers


def saved_at_every_step(layouts: list[dict[str, Any]], run_dir: str, first: int) -> None:
    """Train a run in one layout after another, three steps in each.

    A checkpoint is saved at every step, that of the first weights included.

    Args:
        layouts: dotted keys over BASE.
        run_dir: the run's folder.
        first: step at which the run goes on; 0: it begins.
    """
    from pathlib import Path

    from magnetar.engine.checkpoint.format import newest_checkpoint
    from magnetar.engine.checkpoint.save_load import Saver, load_checkpoint

    own = {"magnetar.training.run_dir": run_dir, "magnetar.training.keep_checkpoints": 99}
    for number, layout in enumerate(layouts):
        engine, _, config = start(layout | own)
        done = first + 3 * number
        if done:
            load_checkpoint(engine, config, newest_checkpoint(Path(run_dir)))
        saver = Saver(engine, config, UNPREPARED)
        if not done:
            saver.save(0, {})
        for step in range(done, done + 3):
            take_step(engine, config, step)
            saver.save(step + 1, {})
        saver.wait()
        engine.destroy()


def resumed(cases: list[tuple[dict[str, Any], dict[str, Any]]], folder: str) -> list[dict]:
    """Of each case, keys of two configs: the first trains 4 steps, is saved, and 4 more.

    Returns:
        `losses` of its last 4 steps and `resumed`, those of the second, which loads what was saved;
        `differing`: how many elements of this rank's moments and weights differ right after the
        loading (None: the layouts differ); `precision` of the second; `states`: (dtype, number of
        elements) of what its optimizer keeps.
    """
    from pathlib import Path

    from magnetar.engine.checkpoint.format import newest_checkpoint
    from magnetar.engine.checkpoint.save_load import Saver, load_checkpoint

    def losses(engine: Any, config: Any, steps: range) -> list[float]:
        return [float(take_step(engine, config, step).loss) for step in steps]

    found = []
    for number, (before, after) in enumerate(cases):
        own = {"magnetar.training.run_dir": str(Path(folder, str(number)))}
        engine, _, config = start(before | own)
        losses(engine, config, range(4))
        saver = Saver(engine, config, UNPREPARED)
        saver.save(4, {})
        saver.wait()
        kept = kept_values(engine)
        result: dict[str, Any] = {"losses": losses(engine, config, range(4, 8))}
        engine.destroy()
        engine, _, config = start(after | own)
        load_checkpoint(engine, config, newest_checkpoint(Path(own["magnetar.training.run_dir"])))
        again = kept_values(engine)
        is_same = [len(values) for values in kept] == [len(values) for values in again]
        pairs = zip(kept, again, strict=True) if is_same else []
        result["differing"] = sum(int((a != b).sum()) for a, b in pairs) if is_same else None
        result["resumed"] = losses(engine, config, range(4, 8))
        result["precision"] = config.dtype
        result["states"] = [
            (str(value.dtype), value.numel())
            for states in engine.basic_optimizer.state.values()
            for name, value in states.items()
            if name in ("state1", "state2", "exp_avg", "exp_avg_sq")
        ]
        found.append(result)
        engine.destroy()
    return found


def kept_values(engine: Any) -> list[torch.Tensor]:
    """Copies of all that this rank keeps of its parameters, in the model's order."""
    from magnetar.engine.optim.adam import EightBitMoment
    from magnetar.engine.zero import shares

    copies = []
    for share in shares(engine):
        for value in share.values.values():
            copy = torch.empty(value.numel())
            value.copy_to(copy) if isinstance(value, EightBitMoment) else copy.copy_(value)
            copies.append(copy)
    return copies


def optimizer_of(changes: dict[str, Any]) -> tuple[int, int, list[Any]]:
    """Elements of ZeRO's bucket and of the model, and each optimizer group's `fused`."""
    engine, _, _ = start(changes)
    numel = sum(parameter.numel() for parameter in engine.module.parameters())
    groups = engine.basic_optimizer.param_groups
    return engine.optimizer.reduce_bucket_size, numel, [group.get("fused") for group in groups]


def losses_and_traffic(cases: list[dict[str, Any]], num_steps: int) -> list[dict[str, list]]:
    """Train each case on ranks 0 and 1 of one node and the others of another: losses, GiB.

    `experts` are those that a checkpoint has this rank's weights for.
    """
    import os
    import re

    import torch.distributed as dist

    from magnetar.engine.build import start_distributed
    from magnetar.engine.metrics import (
        reduce_over_ranks,
        sparse_layers,
        take_traffic,
        traffic_record,
    )
    from magnetar.engine.zero import named_tensors

    start_distributed()
    os.environ["MAGNETAR_NODE"] = str(dist.get_rank() // 2)
    results = []
    for changes in cases:
        engine, _, config = start(changes)
        layers = sparse_layers(engine.module, config.model)
        curve: dict[str, list] = {"loss": [], "traffic": []}
        for step in range(num_steps):
            result = take_step(engine, config, step)
            traffic = traffic_record(take_traffic(layers), engine.device)
            curve["loss"].append(reduce_over_ranks(result)[0]["loss"])
            curve["traffic"].append(traffic)
        names = " ".join(
            name for _, of_one in named_tensors(engine.module) for name in of_one.names
        )
        curve["experts"] = sorted({int(n) for n in re.findall(r"deepspeed_experts\.(\d+)", names)})
        results.append(curve)
        engine.destroy()
    return results


def listening_places() -> list[tuple[str, int]]:
    """Addresses and ports at which this rank listens after a step."""
    import psutil

    engine, _, config = start({"magnetar.model.moe.ep_size": 2})
    take_step(engine, config, 0)
    found = psutil.Process().net_connections("inet")
    return [(place.laddr.ip, place.laddr.port) for place in found if place.status == "LISTEN"]
