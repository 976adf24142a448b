"""Translations from an encoder-decoder: greedy, by beam search, or drawn.

Letters: B sentences that are not done, W beam, R = B * W hypotheses, S source tokens, L tokens of a
hypothesis so far, V vocab_size.

A hypothesis of n tokens, the end among them, scores log p / n^length_penalty, as in fairseq
(sequence_generator.py, finalize_hypos); GNMT's penalty is ((5 + n) / 6)^alpha (arXiv 1609.08144,
eq. 14). Of the 2W likeliest continuations those among the first W that end are finished, and the
first W of the others go on, as there. Two things differ:

- The path that greedy decoding takes keeps a place in the beam until it ends, the last place if
  it has earned none. So the answer never scores below that of greedy decoding, which a beam alone
  does not promise: greedy's path can leave it early and turn out best.
- A sentence is done when W hypotheses and greedy's have ended, or before that when none that goes
  on can win: log p only falls, so that one of at most N tokens ends with log p / N^length_penalty
  at the most.
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
        score: log p / n^length_penalty of the n tokens, the end among them; p without
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

    The encoder runs once. No MoE layer drops a token, and padding is seen by nobody: what a
    sentence becomes does not depend on those beside it, but for the rounding of sums.

    Args:
        model: its experts may be spread over ranks, see any_rank.
        source: (B, S) int64.
        source_padding: (B, S) bool, True at padding; None: there is none.
        eos_id: ends a translation, and is what the decoder starts from.
        max_len: (B,) int64, tokens that a translation may have, the end among them: after the
            last but one it must end. At most the decoder's positions.
        beam: W, hypotheses that are followed; 1 where tokens are drawn.
        length_penalty: 0 or more; 0 compares plain log probabilities, which favours short ones.
        allowed: (V,) bool, False for tokens that must not be chosen; None: all may. The others'
            probabilities are not raised for it.
        sampling: draw each token in place of the search.
        sample_ids: (B,) int64, what a sentence's draws are a function of, beside the seed; None:
            its row.
        any_rank: whether any rank passes True. Each rank translates its own batch, but all of
            them must call the model equally often; None: this rank alone.
        cached: False computes every position at every step anew, for comparison.
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
    """MoE layers without a capacity, which would let the sentences of a batch compete."""
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
        """(R, L) int64, the start among them -> (R, V) float32, of the token after them."""
        unseen, memory = tokens, self.memory
        if self.cache is not None and self.cache.length:
            unseen = tokens[:, -1:]
        found = self.decoder(
            unseen, memory=memory, memory_padding=self.padding, cache=self.cache
        ).logits[:, -1]
        log_probs = found.float().log_softmax(-1)
        return log_probs if self.banned is None else log_probs.masked_fill(self.banned, NEVER)

    def select(self, rows: Tensor, same_sources: bool = False) -> None:
        """Go on with these rows (R',) of the hypotheses; same_sources: each row keeps its own."""
        if self.cache is not None:
            self.cache.select(rows, own_only=same_sources)
        if not same_sources:
            self.memory = self.memory.index_select(0, rows)
            self.padding = None if self.padding is None else self.padding.index_select(0, rows)

    def idle(self) -> None:
        """Call the decoder for the sake of the other ranks, whose tokens its experts may get."""
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
        """Hypotheses that have ended.

        Args:
            index: (B,) int64, the sentences.
            tokens: (B, L - 1) int64, without start and end.
            log_probs: (B,) float32, of all tokens and the end; -inf: nothing has ended.
        """
        length = tokens.size(1)
        scores = log_probs / (length + 1) ** self.length_penalty
        better = scores > self.scores[index]
        self.scores[index] = torch.where(better, scores, self.scores[index])
        self.lengths[index] = torch.where(better, length, self.lengths[index])
        kept = self.tokens[index, :length]
        self.tokens[index, :length] = torch.where(better.unsqueeze(1), tokens, kept)

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
        # There is one hypothesis at first, the empty one; the others' copies of it never win.
        self.scores = limits.new_full((num_sentences, beam), NEVER, dtype=torch.float32)
        self.scores[:, 0] = 0.0
        self.greedy = torch.zeros_like(limits)  # (B,), its place in the beam, -1: has ended
        self.num_ended = torch.zeros_like(limits)  # (B,)

    def advance(self, steps: _Steps) -> bool:
        """Every hypothesis by one token; whether any sentence goes on."""
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

        # Each hypothesis ends in one way, so that W of the 2W do not.
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
        # All hypotheses are still the same: the encoder's output meets the decoder once.
        log_probs = steps.log_probs(steps.start)
        rows = torch.arange(log_probs.size(0), device=log_probs.device)
        rows = rows.repeat_interleave(self.beam, output_size=log_probs.size(0) * self.beam)
        if self.beam > 1:
            steps.select(rows)
        return log_probs.index_select(0, rows)

    def _totals(self, log_probs: Tensor) -> Tensor:
        """(R, V) -> (B, W, V), of the hypothesis and the token; at the limit only the end may."""
        totals = self.scores.unsqueeze(-1) + log_probs.unflatten(0, self.scores.shape)
        is_last = (self.limits == self.length).view(-1, 1, 1)
        is_other = torch.arange(totals.size(-1), device=totals.device) != self.eos_id
        return totals.masked_fill(is_last & is_other, NEVER)

    def _tokens_of(self, beams: Tensor) -> Tensor:
        """(B, n) -> (B, n, L)."""
        return self.tokens.gather(1, beams.unsqueeze(-1).expand(-1, -1, self.tokens.size(-1)))

    def _greedy_continuation(self, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy's next step: its place among (W * V), its score, whether it ends now: (B,)."""
        beam, vocab_size = self.greedy.clamp_min(0), totals.size(-1)
        own = totals.gather(1, beam.view(-1, 1, 1).expand(-1, 1, vocab_size)).squeeze(1)
        score, token = own.max(1)
        return beam * vocab_size + token, score, (token == self.eos_id) & (self.greedy >= 0)

    def _with_greedy(
        self, chosen: Tensor, scores: Tensor, path: Tensor, path_score: Tensor, path_ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The beam (B, W) and its scores, greedy's path in the last place if it has no other."""
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
        """Leave the sentences that are done; whether there are others."""
        cannot_win = self.best.scores[self.index] >= self.scores.amax(1) / self.bounds
        has_enough = (self.num_ended >= self.beam) & (self.greedy < 0)
        is_over = cannot_win | has_enough | (self.limits <= self.length)
        left = (~is_over).nonzero().squeeze(1)
        if not left.numel():
            return False
        nobody_left = left.numel() == is_over.numel()
        if not nobody_left:
            for name in (
                *("index", "limits", "bounds", "tokens", "scores", "greedy", "num_ended"),
            ):
                setattr(self, name, getattr(self, name).index_select(0, left))
        if not (nobody_left and self.beam == 1):
            rows = (left * self.beam).unsqueeze(1) + beams.index_select(0, left)
            steps.select(rows.flatten(), same_sources=nobody_left)
        return True


class _Draws(_Search):
    """One hypothesis a sentence, every token drawn."""

    def __init__(
        self, limits: Tensor, length_penalty: float, eos_id: int, sampling: Sampling, keys: Tensor
    ) -> None:
        super().__init__(limits, 1, length_penalty, eos_id)
        self.sampling, self.keys = sampling, keys

    def advance(self, steps: _Steps) -> bool:
        """Every hypothesis by one token; whether any sentence goes on."""
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
    """A token of each row, by the Gumbel-max trick: the largest log p - log(-log u).

    Rounding, which is another in another batch, changes a draw only where the two largest are that
    close. Where u is compared with sums of probabilities, each token has a border that it may move.

    Args:
        log_probs: (B, V) float32. Where they leave one token, that one is drawn.
        numbers: u, (B, V) from (0, 1).
        sampling: how.

    Returns:
        (B, 1) int64.
    """
    logits = (log_probs.double() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        falling = logits.exp().sort(descending=True).values
        # Keep a token if those before it have not yet reached top_p: the first always stays.
        kept = falling.cumsum(-1) - falling < sampling.top_p
        least = falling.masked_fill(~kept, 1.0).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits.exp() < least, -torch.inf)
    return (logits - (-numbers.double().log()).log()).argmax(-1, keepdim=True)
