"""What the step benchmark compares: whole models, each with the loop that trains it.

Letters: B sequences of a micro-batch, T tokens, A micro-batches of a step.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers import import_torchscale, integer_histograms, need
from magnetar.data.errors import UserError
from magnetar.engine.build import build_engine
from magnetar.engine.cluster.signals import Requests
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.engine.guards import Guards
from magnetar.engine.optim.adam import fuse_torchs_adam
from magnetar.engine.train_step import MicroBatch, loss_weights, train_step
from magnetar.models.config import ModelConfig
from magnetar.models.cost import flops_per_token
from magnetar.models.layers.feed_forward import FeedForward
from magnetar.models.layers.norms import NORM_STYLES, Depths
from magnetar.models.losses import IGNORE_INDEX
from magnetar.models.transformer import build_model

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")  # nothing is logged


def checked(values: dict[str, Any], ranks: int = 1) -> RunConfig:
    """The config of a dict, for a number of ranks.

    Raises:
        UserError: if the config is wrong; it lists all problems.
    """
    config, problems = check_config(values, world_size=ranks)
    if config is None:
        raise UserError("\n  ".join(["this cannot be measured:", *(text for _, text in problems)]))
    return config


def sparse_config(config: RunConfig, num_experts: int, **model: Any) -> RunConfig:
    """The run with so many experts a layer, all on one rank, none of whose tokens is dropped.

    Args:
        config: config of any number of ranks.
        num_experts: number of experts of each MoE layer.
        model: other keys of the model to set.

    Raises:
        UserError: if the model has no MoE layers, or cannot have so many experts.
    """
    values = config.to_dict()
    moe = values["magnetar"]["model"]["moe"]
    if moe is None:
        raise UserError(
            "the config's model is dense: name one that has magnetar.model.moe, such as "
            "--config ds_configs/lm_xmoe.json"
        )
    moe |= {"num_experts": num_experts, "ep_size": 1, "d_router": None, "dispatch": "dropless"}
    for key in ("capacity_factor", "capacity_order", "capacity_scope"):
        del moe[key]
    values["magnetar"]["model"] |= model
    for monitor in MONITORS:
        values.pop(monitor, None)
    return checked(values)


def dense_config(config: RunConfig, ranks: int = 1) -> RunConfig:
    """The dense run with the useful FLOPs of a sparse one, of as many ranks.

    A MoE layer's tokens pass through top_k networks of width d_ff. A dense model of this project
    has one width, so all layers share that work out evenly.
    """
    model = config.model
    assert model.moe is not None
    layers, sparse = model.num_layers, model.num_moe_layers
    values = config.to_dict()
    d_ff = model.d_ff * (layers + (model.moe.top_k - 1) * sparse) // layers
    values["magnetar"]["model"] |= {"moe": None, "d_ff": d_ff}
    return checked(values, ranks)


class ClipTimer:
    """Times what clips the gradients of a ZeRO optimizer of stage 1 or 2: norm and scaling.

    SparseClip scales in the pass that makes gradients float32, which is timed as well.
    """

    NAMES = (
        "scaled_global_norm",
        "_get_preflattened_grad_partition",
        "unscale_and_clip_grads",
    )

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        """Take an optimizer in which SparseClip is installed."""
        self.optimizer, self.device = optimizer, device
        self.installed = {name: vars(optimizer)[name] for name in self.NAMES}
        self.spans: list[tuple[Any, Any]] = []

    def use(self, sparse_clip: bool) -> None:
        """Clip by SparseClip, or as DeepSpeed does, from now on."""
        for name in self.NAMES:
            own = getattr(type(self.optimizer), name).__get__(self.optimizer)
            setattr(self.optimizer, name, self._timed(self.installed[name] if sparse_clip else own))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            begin = self._now()
            result = function(*arguments, **keywords)
            self.spans.append((begin, self._now()))
            return result

        return run

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_milliseconds(self) -> float:
        """Spent since this was last asked; the device must have finished."""
        spans, self.spans = self.spans, []
        if self.device.type != "cuda":
            return sum(1000 * (end - begin) for begin, end in spans)
        return sum(begin.elapsed_time(end) for begin, end in spans)


@dataclass(frozen=True)
class Trainee:
    """A model ready to be trained.

    Attributes:
        step: the A micro-batches and the number of a step (from 1) -> the loss of the last.
        num_parameters: number of parameters of the whole model.
        flops_per_token: useful FLOPs, forward and backward.
        note: remark for a reader, or "".
        clip: timer of the clipping; None if the clipping is not this project's.
    """

    step: Callable[[Sequence[MicroBatch], int], Tensor]
    num_parameters: int
    flops_per_token: float
    note: str = ""
    clip: ClipTimer | None = None


@dataclass(frozen=True)
class StepContender:
    """Something to measure.

    Attributes:
        label: name in tables and pictures.
        build: function of a sparse config and the device that makes the trainee; it raises
            NotInstalled if a package is missing.
        is_dense: whether the number of experts does not matter to it.
        is_ours: whether it is this project's sparse model.
        default: kinds of device on which it is measured by default.
    """

    label: str
    build: Callable[[RunConfig, torch.device], Trainee]
    is_dense: bool = False
    is_ours: bool = False
    default: Sequence[str] = ("cuda", "cpu")


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def cost(config: RunConfig) -> float:
    """Useful FLOPs of a token of a config's windows."""
    return flops_per_token(config.model, config.data.seq_len)


def build_magnetar(
    config: RunConfig, device: torch.device, *, dense: bool = False, compiled: bool = False
) -> Trainee:
    """This project's model in the engine of `magnetar train`, its blocks under torch.compile."""
    if dense:
        config = dense_config(config)
    if compiled:
        values = config.to_dict()
        values["magnetar"]["training"]["compile"] = True
        config = checked(values)
    engine, sparse_clip = build_engine(config, device)
    guards = Guards(engine, sparse_clip, config.guards, Requests())
    num_parameters = count(engine.module)
    weights, seed = loss_weights(config.model.moe, config.training), config.training.seed

    def step(batch: Sequence[MicroBatch], number: int) -> Tensor:
        done = train_step(engine, batch, weights, seed, number, before_update=guards.watch)
        return done.loss

    has_hooks = all(name in vars(engine.optimizer) for name in ClipTimer.NAMES)
    clip = ClipTimer(engine.optimizer, device) if has_hooks else None
    note = f"d_ff {config.model.d_ff} in every layer" if dense else ""
    return Trainee(step, num_parameters, cost(config), note, clip)


class StockMoE(nn.Module):
    """`deepspeed.moe.layer.MoE` in the place of a dense network."""

    def __init__(self, model: ModelConfig, num_experts: int, top_k: int) -> None:
        """Build it of experts like the dense network of the model."""
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        super().__init__()
        style = NORM_STYLES[model.norm]
        gain = style.gain(Depths(model.encoder_depth, model.decoder_depth, in_encoder=False))
        sizes = (model.d_model, model.d_ff, model.activation, "ffn" in style.inner, gain)
        self.layer = DeepSpeedMoE(
            model.d_model,
            FeedForward(*sizes),
            num_experts,
            k=top_k,
            capacity_factor=1.0,
            top2_2nd_expert_sampling=False,
        )
        for parameter in self.layer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter, gain)
        self.aux_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out, self.aux_loss, _ = self.layer(x)
        return out


def build_deepspeed(config: RunConfig, device: torch.device) -> Trainee:
    """This project's model with stock MoE layers, in DeepSpeed as it comes."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    moe = config.model.moe
    assert moe is not None
    dense = config.model.model_copy(update={"moe": None})
    layers: list[StockMoE] = []
    with torch.device(device):
        model: Any = build_model(dense, config.training.seed)
        for index in range(dense.num_layers):
            if config.model.is_moe_layer(index):
                layer = StockMoE(dense, moe.expert_counts[0], moe.top_k)
                model.blocks[index].ffn = layer
                layers.append(layer)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "dense"}
    )
    sections = copy.deepcopy(config.deepspeed) | {"steps_per_print": 2**62}
    fuse_torchs_adam(sections)  # as in every other contender
    engine, _, _, _ = deepspeed.initialize(
        model=model, config=sections, model_parameters=groups, dist_init_required=False
    )

    def step(batch: Sequence[MicroBatch], number: int) -> Tensor:
        for inputs, targets in batch:
            losses, _ = engine(*inputs, targets=targets)
            loss = losses.total / losses.num_tokens
            loss = loss + moe.aux_loss_weight * torch.stack([one.aux_loss for one in layers]).mean()
            engine.backward(loss)
            engine.step()
        return losses.cross_entropy.detach() / losses.num_tokens

    note = "capacity factor 1.0: drops tokens where routing is uneven; linear router"
    return Trainee(step, count(model), cost(config), note)


def build_torchscale(config: RunConfig, device: torch.device) -> Trainee:
    """TorchScale's Decoder with X-MoE, and torch's AdamW on weights of the config's type."""
    need("torchscale")
    configs, decoders, embeddings = import_torchscale(
        "architecture.config", "architecture.decoder", "component.embedding"
    )
    model, moe = config.model, config.model.moe
    assert moe is not None
    assert model.vocab_size is not None
    if moe.top_k > 2:
        raise ValueError(f"at most 2 experts a token, not {moe.top_k}")
    args = configs.DecoderConfig(
        decoder_embed_dim=model.d_model,
        decoder_attention_heads=model.num_heads,
        decoder_ffn_embed_dim=model.d_ff,
        decoder_layers=model.num_layers,
        activation_fn=model.activation,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        activation_dropout=model.activation_dropout,
        subln=model.norm == "subln",
        moe_freq=moe.every,
        moe_expert_count=moe.expert_counts[0],
        moe_top1_expert=moe.top_k == 1,
        use_xmoe=True,
        share_decoder_input_output_embed=model.tie_embeddings,
        vocab_size=model.vocab_size,
    )
    with torch.device(device):
        tokens = embeddings.TextEmbedding(model.vocab_size, model.d_model)
        positions = embeddings.PositionalEmbedding(model.max_seq_len + 2, model.d_model)
        decoder = decoders.Decoder(args, tokens, positions)
    # Orthogonal weights are drawn, which bf16 cannot be.
    decoder.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype])
    parameters = list(decoder.parameters())
    given = config.deepspeed["optimizer"]["params"]
    keys = {key: given[key] for key in ("lr", "betas", "eps", "weight_decay") if key in given}
    optimizer = torch.optim.AdamW(parameters, **keys, fused=True)
    threshold = config.gradient_clipping or float("inf")

    def step(batch: Sequence[MicroBatch], number: int) -> Tensor:
        optimizer.zero_grad()
        for inputs, targets in batch:
            with integer_histograms(device):
                logits, extra = decoder(*inputs)
            loss = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
            )
            aux_loss = torch.stack([each for each in extra["l_aux"] if each is not None]).mean()
            ((loss + moe.aux_loss_weight * aux_loss) / len(batch)).backward()
        nn.utils.clip_grad_norm_(parameters, threshold)
        optimizer.step()
        return loss.detach()

    note = (
        "AdamW of torch, without float32 copies of weights; capacity factor 1.0: drops tokens "
        "where routing is uneven; second expert used at random"
    )
    return Trainee(step, count(decoder), cost(config), note)


CONTENDERS = {
    "dense_compiled": StepContender(
        "dense of equal useful FLOPs, its blocks under torch.compile",
        partial(build_magnetar, dense=True, compiled=True),
        is_dense=True,
        default=("cuda",),
    ),
    "dense": StepContender(
        "dense of equal useful FLOPs", partial(build_magnetar, dense=True), is_dense=True
    ),
    "ours": StepContender("Magnetar, X-MoE", build_magnetar, is_ours=True),
    "ours_compiled": StepContender(
        "Magnetar, X-MoE, its dense parts under torch.compile",
        partial(build_magnetar, compiled=True),
        is_ours=True,
        default=("cuda",),
    ),
    "deepspeed": StepContender("the same model with deepspeed.moe", build_deepspeed),
    "torchscale": StepContender("torchscale Decoder with X-MoE", build_torchscale),
}
