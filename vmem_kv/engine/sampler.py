"""From logits to tokens, for all sequences of a step at once.

Guarantees
  * A step in which every sequence just takes the likeliest token costs one `max` and nothing else.
  * A sequence's token depends on its own logits, parameters and random numbers alone: no row of a batch changes what
    another one gets, and the same seed draws the same tokens where logits differ by rounding only.
  * Logits that are no numbers give no token (`None`), and harm nobody else.

What top-k, top-p and min-p leave out is cut off by a threshold on the logits; tokens as likely as the last one kept are
kept too. Then a token is drawn by a race: each arrives after a random time, exponential with its probability as the
rate, and the first one wins (the Gumbel-max trick). Another batch shape means other rounding errors, and that changes
the winner only where two arrive at the same moment. To invert the distribution would be cheaper, but there every token
moves by the errors of all that stand before it, by more than the width of an unlikely one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from vmem_kv.engine.request import Sequence, TokenLogprob, TokenLogprobs

_PREFIX_TOKENS = 512
"""Top-p looks at so many of the likeliest tokens before it sorts the whole vocabulary."""


class Sampled(NamedTuple):
    """A sequence's next token."""

    token_id: int | None  # None: the logits are no numbers
    logprobs: TokenLogprobs | None = None


class Penalties:
    """What was said in one sequence, as the penalties need it: `[vocabulary]` each."""

    def __init__(self, sequence: Sequence, vocabulary: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocabulary, device=device)
        self.is_said = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.is_said[torch.tensor(sequence.token_ids, device=device)] = True

    def add(self, token_id: int) -> None:
        """Take note of a token of the answer."""
        self.counts[token_id] += 1
        self.is_said[token_id] = True


class Sampler:
    """Samples for sequences of one model. Keeps what penalties need until `drop`.

    Args:
        end_token_ids: Tokens that end every answer but those that ignore them.
    """

    def __init__(self, end_token_ids: frozenset[int]) -> None:
        self._end_token_ids = end_token_ids
        self._generator = torch.Generator()
        self._penalties: dict[Sequence, Penalties] = {}

    def sample(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> list[Sampled]:
        """Choose the next token of each sequence.

        Args:
            sequences: Whose.
            logits: `[n, vocabulary]`, a row for each; not changed.
        """
        with torch.inference_mode():
            highest, likeliest = logits.max(1)
            is_number = torch.isfinite(highest).tolist()
            if all(_is_plain(sequence) for sequence in sequences):
                return [Sampled(t if ok else None) for t, ok in zip(likeliest.tolist(), is_number, strict=True)]
            logprobs = self._logprobs(sequences, logits)
            changed = self._change(sequences, logits)
            token_ids = (likeliest if changed is logits else changed.argmax(1)).tolist()
            self._draw(sequences, changed, token_ids)
            return [
                self._sampled(row, sequence, token_ids[row], logprobs) if is_number[row] else Sampled(None)
                for row, sequence in enumerate(sequences)
            ]

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self._penalties.pop(sequence, None)

    def _sampled(self, row: int, sequence: Sequence, token_id: int, logprobs: dict[int, _Logprobs]) -> Sampled:
        if sequence in self._penalties:
            self._penalties[sequence].add(token_id)
        return Sampled(token_id, logprobs[row].of(token_id) if row in logprobs else None)

    def _change(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """Return the logits after penalties, biases and forbidden ends; the same tensor if nobody has any."""
        changed = logits
        rows = [i for i, s in enumerate(sequences) if s.params.has_penalties]
        if rows:
            changed = logits.float().clone()
            self._penalise(rows, [sequences[i] for i in rows], changed)
        biases = [(i, t, b) for i, s in enumerate(sequences) for t, b in s.params.logit_bias.items()]
        if biases:
            changed = logits.float().clone() if changed is logits else changed
            row, token, bias = zip(*biases, strict=True)
            where = (_index(row, logits.device), _index(token, logits.device))
            changed.index_put_(where, torch.tensor(bias, device=logits.device), accumulate=True)
        ends = [
            (i, t)
            for i, s in enumerate(sequences)
            if s.n_generated < s.params.min_tokens
            for t in (*s.params.stop_token_ids, *self._end_token_ids)
        ]
        if ends:
            changed = logits.clone() if changed is logits else changed
            row, token = zip(*ends, strict=True)
            changed[_index(row, logits.device), _index(token, logits.device)] = -torch.inf
        return changed

    def _penalise(self, rows: list[int], sequences: list[Sequence], logits: torch.Tensor) -> None:
        for sequence in sequences:
            if sequence not in self._penalties:
                self._penalties[sequence] = Penalties(sequence, logits.shape[1], logits.device)
        said = torch.stack([self._penalties[s].is_said for s in sequences])
        counts = torch.stack([self._penalties[s].counts for s in sequences])
        repetition, presence, frequency = torch.tensor(
            [(s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty) for s in sequences],
            device=logits.device,
        ).T.unsqueeze(2)
        index = _index(rows, logits.device)
        chosen = logits[index]
        repeated = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
        chosen = torch.where(said, repeated, chosen)
        logits[index] = chosen - counts * frequency - (counts > 0) * presence

    def _draw(self, sequences: SequenceOf[Sequence], logits: torch.Tensor, token_ids: list[int]) -> None:
        """Put drawn tokens in the place of the likeliest ones, in the rows that ask for it."""
        rows = [i for i, s in enumerate(sequences) if not s.params.is_greedy]
        if not rows:
            return
        drawing = [sequences[i] for i in rows]
        scores = logits[_index(rows, logits.device)].float()
        scores -= scores.max(1, keepdim=True).values  # so that no temperature makes an infinity
        scores /= torch.tensor([s.params.temperature for s in drawing], device=logits.device).unsqueeze(1)
        _cut(scores, [s.params.top_k for s in drawing], _off_top_k, lambda k: 0 < k < scores.shape[1])
        _cut(scores, [s.params.top_p for s in drawing], _off_top_p, lambda p: p < 1.0)
        _cut(scores, [s.params.min_p for s in drawing], _off_min_p, lambda p: p > 0.0)
        arrival = -self._uniform(drawing, scores.shape[1]).to(logits.device).log_()
        for row, token_id in zip(rows, (scores.exp_() / arrival).argmax(1).tolist(), strict=True):
            token_ids[row] = token_id

    def _uniform(self, sequences: SequenceOf[Sequence], vocabulary: int) -> torch.Tensor:
        """Draw a number in [0, 1) for every token, `[n, vocabulary]`; each row by its own sequence's numbers."""
        uniform = torch.empty(len(sequences), vocabulary)
        for row, sequence in zip(uniform, sequences, strict=True):
            row.uniform_(generator=self._generator.manual_seed(sequence.rng.getrandbits(63)))
        return uniform

    def _logprobs(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> dict[int, _Logprobs]:
        rows = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
        if not rows:
            return {}
        all_logprobs = torch.log_softmax(logits[_index(rows, logits.device)].float(), 1)
        n_tops = [sequences[i].params.logprobs or 0 for i in rows]
        values, token_ids = all_logprobs.topk(min(max(n_tops), logits.shape[1]), 1)
        tops = zip(n_tops, token_ids.tolist(), values.tolist(), strict=True)
        return {
            row: _Logprobs(all_logprobs[i], tuple(map(TokenLogprob, ids[:n], logprobs[:n])))
            for i, (row, (n, ids, logprobs)) in enumerate(zip(rows, tops, strict=True))
        }


class _Logprobs(NamedTuple):
    """One row's log probabilities."""

    row: torch.Tensor  # [vocabulary]
    top: tuple[TokenLogprob, ...]

    def of(self, token_id: int) -> TokenLogprobs:
        return TokenLogprobs(TokenLogprob(token_id, float(self.row[token_id])), self.top)


def _is_plain(sequence: Sequence) -> bool:
    params = sequence.params
    return (
        params.is_greedy
        and not params.has_penalties
        and not params.logit_bias
        and params.logprobs is None
        and sequence.n_generated >= params.min_tokens
    )


def _cut(
    scores: torch.Tensor,
    values: SequenceOf[float],
    threshold: Callable[[torch.Tensor, float], torch.Tensor],
    applies: Callable[[float], bool],
) -> None:
    """Give no chance to scores below a threshold, in the rows whose value applies; equal values share a call."""
    rows_of: dict[float, list[int]] = defaultdict(list)
    for row, value in enumerate(values):
        if applies(value):
            rows_of[value].append(row)
    for value, rows in rows_of.items():
        index = _index(rows, scores.device)
        chosen = scores[index]
        scores[index] = chosen.masked_fill(chosen < threshold(chosen, value), -torch.inf)


def _off_top_k(scores: torch.Tensor, top_k: float) -> torch.Tensor:
    return scores.topk(int(top_k), 1).values[:, -1:]


def _off_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The score of the last token that is needed to reach `top_p`."""
    total = scores.logsumexp(1, keepdim=True)
    n_tokens = scores.shape[1]
    n_prefix = min(_PREFIX_TOKENS, n_tokens)
    last, n_needed = _last_needed(scores.topk(n_prefix, 1).values, total, top_p)
    if n_prefix < n_tokens:
        for row in (n_needed[:, 0] > n_prefix).nonzero()[:, 0].tolist():  # flat distributions, which are rare
            everything = scores[row : row + 1].sort(1, descending=True).values
            last[row] = _last_needed(everything, total[row : row + 1], top_p)[0][0]
    return last


def _last_needed(best: torch.Tensor, total: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last score needed of the best ones, falling, and how many are needed: one more than all if too few."""
    n_needed = 1 + ((best - total).exp().cumsum(1) < top_p).sum(1, keepdim=True)
    return best.gather(1, n_needed.clamp(max=best.shape[1]) - 1), n_needed


def _off_min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    # The same in logits: p / p_max = exp(score - score_max).
    return scores.max(1, keepdim=True).values + math.log(min_p)


def _index(values: SequenceOf[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)
