"""Sampling from a causal language model.

Letters: B batch, T tokens of the prompt, V vocab_size.
"""

import torch
from torch import Tensor

from magnetar.data.errors import UserError
from magnetar.models.layers.attention import Cache
from magnetar.models.transformer import Transformer


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Tensor,
    num_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Tensor:
    """Continue prompts of one length by sampling.

    Keys and values are cached until the model's positions are used up. From then on the window of
    the last max_seq_len tokens moves, every position changes and each step computes all of them.

    Args:
        model: decoder; its experts may be on several ranks if every rank calls this alike.
        prompt: (B, T) int64, T at least 1.
        num_tokens: number of tokens to add to each prompt.
        temperature: divisor of the logits; 0 takes the most probable token.
        top_p: probability mass to sample from: the fewest tokens that sum to at least this.
        seed: seed of the draw; the same seed gives the same text.

    Returns:
        (B, T + num_tokens) int64. The model sees the last max_seq_len tokens.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens, unseen = prompt, prompt
    cache: Cache | None = Cache(len(model.blocks))
    for _ in range(num_tokens):
        if cache is not None and cache.length + unseen.size(1) > model.max_len:
            cache = None
        if cache is None:
            unseen = tokens[:, -model.max_len :]
        logits = model(unseen, cache=cache).logits[:, -1].float()  # (B, V)
        if not logits.amax(-1).isfinite().all():
            raise UserError("the model's logits are NaN or infinite: use an earlier checkpoint")
        unseen = _draw(logits, temperature, top_p, generator)
        tokens = torch.cat([tokens, unseen], dim=1)
    model.train(was_training)
    return tokens


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """(B, V) float32 -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # In float64 and below 0, so that no temperature divides to infinity or by float32's zero.
    logits = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
    probs, order = logits.softmax(-1).sort(descending=True, stable=True)
    # Keep a token if those before it have not yet reached top_p: the first always stays.
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill((before > 0) & (before >= top_p), 0.0)
    return order.gather(-1, probs.multinomial(1, generator=generator))
