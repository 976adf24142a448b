"""Translations from an encoder-decoder: greedy, by beam search, or drawn.

Letters: B unfinished sentences, W beam, R = B * W hypotheses, S source tokens, L tokens of a
hypothesis so far, V vocab_size.

A hypothesis of n tokens, the end token included, scores log p / n^length_penalty, as in fairseq
(sequence_generator.py, finalize_hypos). GNMT's penalty is ((5 + n) / 6)^alpha (arXiv 1609.08144,
eq. 14). As in fairseq, each step takes the 2W likeliest continuations. Those among the first W that
end are finished, and the first W of the others go on. Two things differ:

- The path of greedy decoding keeps a place in the beam until it ends: its own, or the last place.
  So the answer never scores below that of greedy decoding. A plain beam does not promise this,
  since the greedy path can leave it early and still turn out best.
- A sentence is done when W hypotheses and the greedy one have ended, or earlier if no open
  hypothesis can win. log p only falls, so a hypothesis of up to N tokens scores no more than
  log p / N^length_penalty.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from magnetar.models.layers.attention import Cache
from magnetar.models.moe.layer import SparseFeedForward
from magnetar.models.moe.noise import splitmix64, uniform
from magnetar.models.transformer import EncoderDecoder

NEVER = float("-inf")


class Translation(NamedTuple):
    """The translation of one source.

    Attributes:
        tokens: token ids without the end token.
        score: log p / n^length_penalty of the n tokens, the end token included; p is without
            temperature and top_p.
    """

    tokens: list[int]
    score: float


class Sampling(NamedTuple):
    """The distribution from which tokens are drawn.

    Attributes:
        temperature: divisor of the logits, above 0.
        top_p: probability mass to draw from: the fewest tokens that sum to at least this, and
            those as likely as the last of them.
        seed: seed of the draw.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def default_max_len(source_len: int) -> int:
    """Largest number of tokens of a translation, the end token included."""
    return 2 * source_len + 20


@torch.no_grad()
def translate(
    model: EncoderDecoder,
    source: Tensor,
    source_padding: Tensor | None,
    eos_id: int,
    *,
    max_len: Tensor,
    beam: int = 4,
    length_penalty: float = 1.0,
    allowed: Tensor | None = None,
    sampling: Sampling | None = None,
    sample_ids: Tensor | None = None,
    any_rank: Callable[[bool], bool] | None = None,
    cached: bool = True,
) -> list[Translation]:
    """The best translation of each source that the search finds; beam 1 is greedy decoding.

    The encoder runs once. No MoE layer drops a token and no token attends to padding, so a
    translation depends on the other sentences of its batch only through the rounding of sums.

    Args:
        model: encoder-decoder; its experts may be on several ranks, see any_rank.
        source: (B, S) int64.
        source_padding: (B, S) bool, True at padding; None without padding.
        eos_id: id of the end token, which is also the decoder's first input.
        max_len: (B,) int64, largest number of tokens of each translation, the end token included,
            up to the decoder's positions.
        beam: W, number of hypotheses per sentence; 1 with sampling.
        length_penalty: exponent, 0 or more; 0 compares plain log probabilities, which favours
            short translations.
        allowed: (V,) bool, False for tokens that must not be chosen; None allows all. The
            probabilities of the others are not raised.
        sampling: distribution from which each token is drawn; None searches.
        sample_ids: (B,) int64, keys of the sentences' draws beside the seed; None: their rows.
        any_rank: function that returns whether any rank passes True. Each rank translates its own
            batch, but all of them must call the model equally often. None: this rank alone.
        cached: whether keys and values are cached; False is for comparison.
    """
    was_training = model.training
    model.eval()
    with _nothing_dropped(model):
        steps = _Steps(model, source, source_padding, eos_id, allowed, cached)
        limits = max_len.to(source.device).clamp_max(model.decoder.max_len)
        if sampling is None:
            search = _Search(limits, beam, length_penalty, eos_id)
        else:
            ids = torch.arange(source.size(0)) if sample_ids is None else sample_ids
            keys = splitmix64(splitmix64(torch.tensor(sampling.seed)) + ids).to(source.device)
            search = _Draws(limits, length_penalty, eos_id, sampling, keys)
        is_active = True
        while any_rank(is_active) if any_rank else is_active:
            if is_active:
                is_active = search.advance(steps)
            else:
                steps.idle()
    model.train(was_training)
    return search.best.translations()


@contextmanager
def _nothing_dropped(model: EncoderDecoder) -> Iterator[None]:
    """MoE layers without a capacity, for which the sentences of a batch would compete."""
    layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    before = [layer.moe for layer in layers]
    for layer in layers:
        layer.moe = layer.moe.model_copy(update={"eval_capacity_fraction": None})
    try:
        yield
    finally:
        for layer, moe in zip(layers, before, strict=True):
            layer.moe = moe


class _Steps:
    """The decoder, one token at a time."""

    def __init__(
        self,
        model: EncoderDecoder,
        source: Tensor,
        padding: Tensor | None,
        eos_id: int,
        allowed: Tensor | None,
        cached: bool,
    ) -> None:
        self.decoder = model.decoder
        self.padding = padding
        self.memory: Tensor = model.encoder(source, padding).logits  # (B, S, D)
        self.cache = Cache(len(self.decoder.blocks)) if cached else None
        self.start = source.new_full((source.size(0), 1), eos_id)
        self.banned = None if allowed is None else ~allowed.to(source.device)
        self._spare = self.memory[:1], None if padding is None else padding[:1]

    def log_probs(self, tokens: Tensor) -> Tensor:
        """(R, L) int64, the start token included -> (R, V) float32, of the next token."""
        unseen, memory = tokens, self.memory
        if self.cache is not None and self.cache.length:
            unseen = tokens[:, -1:]
        logits = self.decoder(
            unseen, memory=memory, memory_padding=self.padding, cache=self.cache
        ).logits[:, -1]  # (R, V)
        log_probs = logits.float().log_softmax(-1)
        return log_probs if self.banned is None else log_probs.masked_fill(self.banned, NEVER)

    def select(self, rows: Tensor, same_sources: bool = False) -> None:
        """Go on with these rows (R',) of the hypotheses; same_sources: each keeps its source."""
        if self.cache is not None:
            self.cache.select(rows, own_only=same_sources)
        if not same_sources:
            self.memory = self.memory.index_select(0, rows)
            self.padding = None if self.padding is None else self.padding.index_select(0, rows)

    def idle(self) -> None:
        """Call the decoder so that this rank's experts serve the tokens of the other ranks."""
        memory, padding = self._spare
        self.decoder(self.start[:1], memory=memory, memory_padding=padding)


class _Best:
    """The best finished hypothesis of every sentence of the batch."""

    def __init__(self, limits: Tensor, length_penalty: float) -> None:
        self.length_penalty = length_penalty
        self.scores = limits.new_full(limits.shape, NEVER, dtype=torch.float32)
        self.tokens = limits.new_zeros(limits.size(0), int(limits.max()))
        self.lengths = torch.zeros_like(limits)

    def update(self, index: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        """Keep the ended hypotheses that score best.

        Args:
            index: (B,) int64, places of the sentences in the batch.
            tokens: (B, L - 1) int64, tokens without start and end.
            log_probs: (B,) float32, sum over tokens and end; -inf if none has ended.
        """
        length = tokens.size(1)
        scores = log_probs / (length + 1) ** self.length_penalty
        better = scores > self.scores[index]
        self.scores[index] = torch.where(better, scores, self.scores[index])
        self.lengths[index] = torch.where(better, length, self.lengths[index])
        before = self.tokens[index, :length]
        self.tokens[index, :length] = torch.where(better.unsqueeze(1), tokens, before)

    def translations(self) -> list[Translation]:
        """One for each sentence."""
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), self.scores.tolist(), strict=True)
        return [Translation(tokens[:length], score) for tokens, length, score in rows]


class _Search:
    """Beam search: see the module."""

    def __init__(self, limits: Tensor, beam: int, length_penalty: float, eos_id: int) -> None:
        num_sentences = limits.size(0)
        self.beam, self.eos_id = beam, eos_id
        self.best = _Best(limits, length_penalty)
        self.length = 0  # of the hypotheses
        self.index = torch.arange(num_sentences, device=limits.device)  # (B,)
        self.limits = limits  # (B,)
        self.bounds = limits.float() ** length_penalty  # (B,)
        self.tokens = limits.new_zeros(num_sentences, beam, 0)  # (B, W, L)
        # At first there is one hypothesis, the empty one. Its copies score -inf and never win.
        self.scores = limits.new_full((num_sentences, beam), NEVER, dtype=torch.float32)
        self.scores[:, 0] = 0.0
        self.greedy = torch.zeros_like(limits)  # (B,), place of the greedy path; -1: has ended
        self.num_ended = torch.zeros_like(limits)  # (B,)

    def advance(self, steps: _Steps) -> bool:
        """Extend every hypothesis by one token; return whether any sentence goes on."""
        log_probs = self._log_probs(steps)  # (R, V)
        self.length += 1
        totals = self._totals(log_probs)  # (B, W, V)
        vocab_size = totals.size(-1)
        flat = totals.flatten(1)
        scores, chosen = flat.topk(2 * self.beam)  # (B, 2W)
        ends = chosen % vocab_size == self.eos_id
        path, path_score, path_ends = self._greedy_continuation(totals)

        finished = torch.cat([chosen[:, : self.beam], path.unsqueeze(1)], dim=1)  # (B, W + 1)
        finished_scores = torch.cat(
            [
                scores[:, : self.beam].masked_fill(~ends[:, : self.beam], NEVER),
                path_score.masked_fill(~path_ends, NEVER).unsqueeze(1),
            ],
            dim=1,
        )
        score, which = finished_scores.max(1)
        beams = finished.gather(1, which.unsqueeze(1)) // vocab_size  # (B, 1)
        self.best.update(self.index, self._tokens_of(beams).squeeze(1), score)
        counted = finished_scores[:, :-1] > NEVER
        is_new = path_ends & ~((finished[:, :-1] == path.unsqueeze(1)) & counted).any(1)
        self.num_ended += counted.sum(1) + is_new

        # A hypothesis has one continuation that ends, so at least W of the 2W go on.
        order = ends.int().argsort(dim=1, stable=True)[:, : self.beam]
        chosen, scores = chosen.gather(1, order), scores.gather(1, order)
        chosen, self.scores = self._with_greedy(chosen, scores, path, path_score, path_ends)
        beams = chosen // vocab_size  # (B, W)
        self.tokens = torch.cat(
            [self._tokens_of(beams), (chosen % vocab_size).unsqueeze(-1)], dim=-1
        )
        return self._go_on(steps, beams)

    def _log_probs(self, steps: _Steps) -> Tensor:
        if self.length:
            tokens = self.tokens.flatten(0, 1)
            start = steps.start[:1].expand(tokens.size(0), 1)
            return steps.log_probs(torch.cat([start, tokens], dim=1))
        # All hypotheses are still the same, so the first step runs once for each sentence.
        log_probs = steps.log_probs(steps.start)
        rows = torch.arange(log_probs.size(0), device=log_probs.device)
        rows = rows.repeat_interleave(self.beam, output_size=log_probs.size(0) * self.beam)
        if self.beam > 1:
            steps.select(rows)
        return log_probs.index_select(0, rows)

    def _totals(self, log_probs: Tensor) -> Tensor:
        """(R, V) -> (B, W, V), log p of hypothesis and token; at the limit only the end token."""
        totals = self.scores.unsqueeze(-1) + log_probs.unflatten(0, self.scores.shape)
        is_last = (self.limits == self.length).view(-1, 1, 1)
        is_other = torch.arange(totals.size(-1), device=totals.device) != self.eos_id
        return totals.masked_fill(is_last & is_other, NEVER)

    def _tokens_of(self, beams: Tensor) -> Tensor:
        """(B, n) -> (B, n, L)."""
        return self.tokens.gather(1, beams.unsqueeze(-1).expand(-1, -1, self.tokens.size(-1)))

    def _greedy_continuation(self, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The greedy path's next token: index in W * V, score, whether it ends; (B,) each."""
        beam, vocab_size = self.greedy.clamp_min(0), totals.size(-1)
        own = totals.gather(1, beam.view(-1, 1, 1).expand(-1, 1, vocab_size)).squeeze(1)
        score, token = own.max(1)
        return beam * vocab_size + token, score, (token == self.eos_id) & (self.greedy >= 0)

    def _with_greedy(
        self, chosen: Tensor, scores: Tensor, path: Tensor, path_score: Tensor, path_ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The beam (B, W) and its scores, with the greedy path in the last place if it has none."""
        goes_on = (self.greedy >= 0) & ~path_ends
        is_path = chosen == path.unsqueeze(1)
        place = torch.where(is_path.any(1), is_path.int().argmax(1), self.beam - 1)
        places = torch.arange(self.beam, device=chosen.device)
        here = goes_on.unsqueeze(1) & (places == place.unsqueeze(1))
        self.greedy = torch.where(goes_on, place, -1)
        return (
            torch.where(here, path.unsqueeze(1), chosen),
            torch.where(here, path_score.unsqueeze(1), scores),
        )

    def _go_on(self, steps: _Steps, beams: Tensor) -> bool:
        """Drop the sentences that are done; return whether any are left."""
        cannot_win = self.best.scores[self.index] >= self.scores.amax(1) / self.bounds
        has_enough = (self.num_ended >= self.beam) & (self.greedy < 0)
        is_over = cannot_win | has_enough | (self.limits <= self.length)
        left = (~is_over).nonzero().squeeze(1)
        if not left.numel():
            return False
        all_go_on = left.numel() == is_over.numel()
        if not all_go_on:
            for name in ["index", "limits", "bounds", "tokens", "scores", "greedy", "num_ended"]:
                setattr(self, name, getattr(self, name).index_select(0, left))
        if not (all_go_on and self.beam == 1):
            rows = (left * self.beam).unsqueeze(1) + beams.index_select(0, left)
            steps.select(rows.flatten(), same_sources=all_go_on)
        return True


class _Draws(_Search):
    """One hypothesis for each sentence, with drawn tokens."""

    def __init__(
        self, limits: Tensor, length_penalty: float, eos_id: int, sampling: Sampling, keys: Tensor
    ) -> None:
        super().__init__(limits, 1, length_penalty, eos_id)
        self.sampling, self.keys = sampling, keys

    def advance(self, steps: _Steps) -> bool:
        """Extend every hypothesis by one token; return whether any sentence goes on."""
        log_probs = self._log_probs(steps)
        self.length += 1
        totals = self._totals(log_probs).squeeze(1)  # (B, V)
        numbers = uniform(self.keys[self.index], totals.size(1), self.length)
        token = drawn(totals - self.scores, numbers, self.sampling)  # (B, 1)
        score = totals.gather(1, token)
        ends = token == self.eos_id
        score_of_ended = score.masked_fill(~ends, NEVER).squeeze(1)
        self.best.update(self.index, self.tokens.squeeze(1), score_of_ended)
        self.scores = score.masked_fill(ends, NEVER)
        self.tokens = torch.cat([self.tokens, token.unsqueeze(-1)], dim=-1)
        return self._go_on(steps, torch.zeros_like(token))


def drawn(log_probs: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """A token for each row, by the Gumbel-max trick: the largest log p - log(-log u).

    Rounding depends on the batch, and changes a draw only if the two largest values nearly tie. If
    u were compared to cumulative probabilities, it could move the border of every token.

    Args:
        log_probs: (B, V) float32; a row with one finite entry draws that token.
        numbers: (B, V), u from (0, 1).
        sampling: temperature and top_p.

    Returns:
        (B, 1) int64.
    """
    # Below 0, so that no temperature divides all of them to infinity.
    below = log_probs.double() - log_probs.amax(-1, keepdim=True)
    logits = (below / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        falling = logits.exp().sort(descending=True).values
        # Keep a token if those before it have not yet reached top_p: the first always stays.
        kept = falling.cumsum(-1) - falling < sampling.top_p
        least = falling.masked_fill(~kept, 1.0).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits.exp() < least, -torch.inf)
    return (logits - (-numbers.double().log()).log()).argmax(-1, keepdim=True)
