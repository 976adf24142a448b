"""Decoder, encoder and encoder-decoder from one set of blocks.

Letters: B batch, T tokens, S keys, D d_model, H num_heads, V vocab_size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magnetar.models.block import Block, Context
from magnetar.models.config import ModelConfig
from magnetar.models.layers.attention import Cache, attention_mask
from magnetar.models.layers.embedding import Embedding
from magnetar.models.layers.init import RandomSource
from magnetar.models.layers.multiway import per_modality
from magnetar.models.layers.norms import NORM_STYLES, Depths, layer_norm
from magnetar.models.layers.positions import (
    FrequencyScaling,
    RelativeBias,
    Rotary,
    fairseq_sinusoidal_table,
    sinusoidal_table,
)
from magnetar.models.losses import Output, TokenLosses
from magnetar.models.moe.layer import MoE, RoutingStats

MAX_VERSIONS = 64  # compiled versions of a block: dense or sparse, first or last, other sizes


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself, in training: attention, norms, residuals, dense networks.

    Blocks of a kind share one compiled version; the first call of the first of them compiles it.
    MoE layers are not compiled: they have kernels of their own, and the routing changes their sizes
    in every step.
    """
    torch._dynamo.config.recompile_limit = MAX_VERSIONS
    for block in model.modules():
        if isinstance(block, Block):
            if isinstance(block.ffn, MoE):
                vars(block.ffn)["forward"] = torch.compiler.disable(block.ffn.forward)
            vars(block)["forward"] = _compiled_in_training(block)


def _compiled_in_training(block: Block) -> Callable[..., Any]:
    plain, compiled = block.forward, torch.compile(block.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else plain)(*args, **kwargs)

    return forward


# GPT-2's value. The papers leave it open. With TorchScale's 1/sqrt(D) the loss of a small model
# starts well above ln V.
EMBEDDING_STD = 0.02


class ModelOutput(NamedTuple):
    """Logits and one RoutingStats for each MoE layer, first layer first.

    Attributes:
        logits: (B, T, V), in the model's dtype; in a model without an output projection the
            features (B, T, D).
        routing: one entry for each MoE layer, the encoder's before the decoder's.
    """

    logits: Tensor
    routing: list[RoutingStats]


class ModelLosses(NamedTuple):
    """The losses of the logits, which a model returns in place of ModelOutput if it gets targets.

    Attributes:
        losses: sums over the targets that count.
        routing: one entry for each MoE layer, the encoder's before the decoder's.
    """

    losses: TokenLosses
    routing: list[RoutingStats]


class Transformer(nn.Module):
    """One stack: embedding, blocks, final norm and output projection.

    A decoder, an encoder, or one of the two stacks of an encoder-decoder.
    """

    sinusoids: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        depths: Depths,
        *,
        has_output: bool = True,
        embedding: Embedding | None = None,
        moe_class: type[MoE] = MoE,
    ) -> None:
        """Build a stack of a resolved config (vocab_size not None) without drawing its weights.

        Args:
            config: config of the whole model.
            depths: depths of both stacks, and which of them this is.
            has_output: whether an output projection follows.
            embedding: embedding of the other stack, to share; None builds one.
            moe_class: class of the MoE layers.
        """
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.is_causal = not depths.in_encoder
        is_second = self.is_causal and not depths.is_alone
        has_own_len = is_second and config.max_target_len
        self._max_len_key = "max_target_len" if has_own_len else "max_seq_len"
        self.max_len: int = getattr(config, self._max_len_key)
        self.checkpoint: Callable[..., Any] | None = None
        d_model = config.d_model
        self.embedding = embedding or Embedding(config.vocab_size, d_model)
        self.owns_embedding = embedding is None
        norm = partial(layer_norm, d_model, config.norm_eps, config.norm_type, config.bias)
        self.token_norm = norm() if config.stable_embedding else None
        self._build_positions(is_second)
        self.embedding_norm = norm(multiway=config.multiway) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, depths, index, moe_class) for index in range(depths.own)
        )
        ends_with_norm = NORM_STYLES[config.norm].before
        self.final_norm = norm(multiway=config.multiway) if ends_with_norm else None
        self.output: Output | None = None
        if has_output and config.output_projection:
            self.output = Output(d_model, config.vocab_size, bias=False)
            if config.tie_embeddings:
                self.output.weight = self.embedding.weight

    def _build_positions(self, is_second: bool) -> None:
        config = self.config
        kind, shape = config.absolute_positions, (self.max_len, config.d_model)
        self.positions = Embedding(*shape) if kind == "learned" else None
        tables = {"sinusoidal": sinusoidal_table, "sinusoidal_fairseq": fairseq_sinusoidal_table}
        table = tables[kind](*shape) if kind in tables else None
        # Not persistent, since the table follows from the config.
        self.register_buffer("sinusoids", table, persistent=False)
        self.rotary: Rotary | None = None
        if config.is_rotary:
            base = None if config.attention_positions == "rotary" else config.xpos_scale_base
            given, scaling = config.rope_scaling, None
            if given is not None:
                turns = (given.low_freq_factor, given.high_freq_factor)
                scaling = FrequencyScaling(given.factor, given.original_max_seq_len, *turns)
            self.rotary = Rotary(config.head_width, self.max_len, base, config.rope_theta, scaling)
        self.relative_bias: RelativeBias | None = None
        self.cross_relative_bias: RelativeBias | None = None
        if config.is_relative:
            sizes = (config.relative_buckets, config.num_heads, config.relative_max_distance)
            both = config.relative_bidirectional or not self.is_causal
            self.relative_bias = RelativeBias(*sizes, both)
            if is_second:
                self.cross_relative_bias = RelativeBias(*sizes, both=True)

    def init_weights(self, source: RandomSource) -> None:
        """Draw embeddings and an untied output from N(0, 0.02^2), so that logits start near 0.

        A stable embedding is Xavier-uniform (arXiv 2110.02861, sec. 2.3).
        """
        if self.owns_embedding:
            if self.config.stable_embedding:
                source.xavier_uniform_(self.embedding.weight.data, "embedding.weight")
            else:
                source.normal_(self.embedding.weight.data, "embedding.weight", EMBEDDING_STD)
        if self.positions is not None:
            source.normal_(self.positions.weight.data, "positions.weight", EMBEDDING_STD)
        if self.output is not None and not self.config.tie_embeddings:
            source.normal_(self.output.weight.data, "output.weight", EMBEDDING_STD)

    def forward(
        self,
        tokens: Tensor | None,
        padding: Tensor | None = None,
        *,
        token_embeddings: Tensor | None = None,
        split_position: int | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        sample_keys: Tensor | None = None,
        cache: Cache | None = None,
        targets: Tensor | None = None,
        z_weight: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> ModelOutput | ModelLosses:
        """Logits at every position, or with targets their losses.

        Args:
            tokens: (B, T) int64; None if token_embeddings are given.
            padding: (B, S) bool, True at padding, where S counts the cached positions too. No token
                attends to padding, and no expert gets it.
            token_embeddings: (B, T, D) in place of the embedding's rows, for other modalities.
            split_position: number of tokens of the first modality in a multiway encoder; None: all.
            memory: (B, S', D), output of the encoder.
            memory_padding: (B, S') bool, True at the encoder's padding.
            sample_keys: (B,) int64, keys of the routers' noise in training, another one for each
                sample of each step; None draws them from torch's generator.
            cache: keys and values of the positions before these; it grows by T.
            targets: (B, T) int64, see `models.losses.token_losses`; None returns logits.
            z_weight: weight of the z-loss in the total.
            label_smoothing: see `models.losses.token_losses`.

        Raises:
            ValueError: if the positions exceed the model's maximum.
        """
        first = cache.length if cache is not None else 0
        x = self.embed(tokens, token_embeddings, first, split_position)  # (B, T, D)
        if padding is not None and not self.is_causal:
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        num_queries, last = x.size(1), first + x.size(1)
        is_causal = self.is_causal and num_queries > 1
        shape = (num_queries, last)
        mask = attention_mask(self.relative_bias, padding, is_causal, first, shape, x)
        memory_mask = None
        source_len = cache.source_len if cache is not None else None
        if memory is not None:
            source_len = memory.size(1)
        if source_len is not None:
            shape = (num_queries, source_len)
            memory_mask = attention_mask(
                self.cross_relative_bias, memory_padding, False, first, shape, x
            )
        context = Context(
            mask=mask,
            is_causal=is_causal and mask is None,
            rotary=self.rotary,
            first_position=first,
            split_position=split_position,
            padding=None if padding is None else padding[:, first:],
            memory=memory,
            memory_mask=memory_mask,
            sample_keys=sample_keys,
        )
        recomputes = self.training and torch.is_grad_enabled() and cache is None
        routing = []
        for index, block in enumerate(self.blocks):
            if self.checkpoint is not None and recomputes:
                x, stats = _checkpointed(self.checkpoint, block, x, context)  # (B, T, D)
            else:
                x, stats = block(x, context, cache.layers[index] if cache is not None else None)
            if stats is not None:
                routing.append(stats)
        if cache is not None:
            cache.length = last
        if self.final_norm is not None:
            x = per_modality(self.final_norm, x, split_position)
        if targets is not None:
            assert self.output is not None, "features without an output have no losses"
            return ModelLosses(self.output(x, targets, z_weight, label_smoothing), routing)
        return ModelOutput(x if self.output is None else self.output(x), routing)

    def embed(
        self,
        tokens: Tensor | None,
        token_embeddings: Tensor | None = None,
        first_position: int = 0,
        split_position: int | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D), the residual stream before the first block."""
        if token_embeddings is None:
            assert tokens is not None
            x = self.embedding(tokens)
        else:
            x = token_embeddings
        last = first_position + x.size(1)
        if last > self.max_len:
            raise ValueError(
                f"a sequence of {last} tokens exceeds the model's {self._max_len_key}="
                f"{self.max_len}: shorten it, or use a model with more positions"
            )
        if self.token_norm is not None:
            x = self.token_norm(x)
        if self.config.scale_embedding:
            x = x * math.sqrt(x.size(-1))
        if self.positions is not None:
            # Called, not indexed: sharded weights are collected when their module is called.
            x = x + self.positions(torch.arange(first_position, last, device=x.device))
        elif self.sinusoids is not None:
            x = x + self.sinusoids[first_position:last].to(x.dtype)
        if self.embedding_norm is not None:
            x = per_modality(self.embedding_norm, x, split_position)
        return self.dropout(x)


def _checkpointed(
    checkpoint: Callable[..., Any], block: nn.Module, x: Tensor, context: Context
) -> tuple[Tensor, RoutingStats | None]:
    """A block whose activations are computed again in the backward pass.

    A checkpointing function passes only tensors on, and only gradients of its arguments. So the
    tensors of the context become arguments, and are put back into a context inside.
    """
    tensors = [value for value in context if isinstance(value, Tensor)]

    def run(x: Tensor, *passed_on: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(passed_on)
        fields = [next(remaining) if isinstance(value, Tensor) else value for value in context]
        x, stats = block(x, Context(*fields))  # type: ignore[arg-type]
        return (x, *(stats or ()))

    outputs = checkpoint(run, x, *tensors)
    x, *stats = outputs if isinstance(outputs, tuple) else (outputs,)
    return x, RoutingStats(*stats) if stats else None


class EncoderDecoder(nn.Module):
    """A bidirectional encoder and a causal decoder that attends to its output."""

    def __init__(self, config: ModelConfig, moe_class: type[MoE] = MoE) -> None:
        """Build the model of a resolved config (vocab_size not None), weights not yet drawn."""
        super().__init__()
        self.config = config
        sizes = (config.encoder_depth, config.decoder_depth)
        self.decoder = Transformer(config, Depths(*sizes, in_encoder=False), moe_class=moe_class)
        shared = self.decoder.embedding if config.share_embeddings else None
        self.encoder = Transformer(
            config,
            Depths(*sizes, in_encoder=True),
            has_output=False,
            embedding=shared,
            moe_class=moe_class,
        )

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
        *,
        sample_keys: Tensor | None = None,
        **losses: Any,
    ) -> ModelOutput | ModelLosses:
        """Logits of the token after each target position, or with targets their losses.

        Source (B, S) and target (B, T), the tokens so far, are int64; paddings are bool of their
        shapes, True at padding. Transformer.forward has sample_keys, and the losses' targets,
        z_weight and label_smoothing.
        """
        memory, routing = self.encoder(source, source_padding, sample_keys=sample_keys)
        output = self.decoder(
            target,
            target_padding,
            memory=memory,
            memory_padding=source_padding,
            sample_keys=sample_keys,
            **losses,
        )
        return output._replace(routing=routing + output.routing)


def build_model(
    config: ModelConfig | dict[str, Any],
    seed: int,
    moe_class: type[MoE] = MoE,
    drawn_on: torch.device | None = None,
) -> Transformer | EncoderDecoder:
    """The model of a resolved config with its initial weights, on the default device.

    The weights depend on the seed, on the parameters' names and, for experts, on their global
    indices; not on the number of ranks.

    Args:
        config: resolved config, or its keys; vocab_size is not None.
        seed: seed of the weights.
        moe_class: class of the MoE layers; models.moe.deepspeed has those that DeepSpeed trains.
        drawn_on: device whose generator draws the weights; None: the default device.
    """
    model = empty_model(ModelConfig.model_validate(config), moe_class)
    for name, module in model.named_modules():
        if hasattr(module, "init_weights"):
            # The MoE layer draws its Experts, since it knows their global indices.
            if name.endswith("deepspeed_moe.experts"):
                continue
            module.init_weights(RandomSource(seed, name, drawn_on))
    return model


def empty_model(config: ModelConfig, moe_class: type[MoE] = MoE) -> Transformer | EncoderDecoder:
    """The model of a resolved config with uninitialised weights, for loading."""
    if config.architecture == "encoder_decoder":
        return EncoderDecoder(config, moe_class)
    depths = Depths(config.encoder_depth, config.decoder_depth, config.architecture == "encoder")
    return Transformer(config, depths, moe_class=moe_class)


def set_checkpointing(model: nn.Module, checkpoint: Callable[..., Any] | None) -> None:
    """Run every block through `checkpoint(function, *tensors)` in training; None turns it off."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpoint = checkpoint
