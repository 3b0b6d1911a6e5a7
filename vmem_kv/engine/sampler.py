"""From logits to tokens, for all sequences of a step at once.

Guarantees
  * A step in which every sequence just takes the likeliest token costs one `argmax` and nothing else.
  * A sequence's token depends on its own logits, parameters and random numbers alone: no row of a batch changes what
    another one gets, and the same seed draws the same tokens where logits differ by rounding only.
  * Logits that are no numbers give no token (`None`), and harm nobody else.

What top-k, top-p and min-p leave out is cut off by a threshold on the probabilities; tokens as likely as the last one
kept are kept too. Then a token is drawn by two races: one between blocks of tokens, and one within the block that won.
In a race each arrives after a random time, exponential with its probability as the rate, and the first one wins (the
Gumbel-max trick); by blocks, a few hundred random numbers decide instead of one for every token. Another batch shape
means other rounding errors, and that changes the winner only where two arrive at the same moment. To invert the
distribution would be cheaper, but there every token moves by the errors of all that stand before it, by more than the
width of an unlikely one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from vmem_kv.engine.request import Sequence, TokenLogprob, TokenLogprobs

_BLOCK_TOKENS = 64
_CPU_ROWS = 8
"""Rows that are drawn for at a time on a CPU: what is computed of them stays in its caches, and in memory that the
allocator keeps, where larger tensors would be given back and cleared again by the system at every step."""
_PREFIXES = (128, 512, 2_048, 8_192)
"""Top-k looks for so many of the likeliest tokens, as few as will do; top-p for the first number."""
_LEAST_TEMPERATURE = 1e-30
"""As greedy as it gets; less is zero in the precision of logits."""


class Sampled(NamedTuple):
    """A sequence's next token."""

    token_id: int | None  # None: the logits are no numbers
    logprobs: TokenLogprobs | None = None


class Said:
    """What was said in one sequence, as the penalties need it. In host memory: a step changes one entry.

    Attributes:
        counts: How often each token is in the answer, `[vocabulary]`.
    """

    def __init__(self, sequence: Sequence, vocabulary: int) -> None:
        self.counts = torch.zeros(vocabulary)
        self._is_said = torch.zeros(vocabulary, dtype=torch.bool)
        self._is_said[torch.tensor(sequence.token_ids)] = True
        self._token_ids = self._is_said.nonzero()[:, 0]
        self._n = len(self._token_ids)

    @property
    def token_ids(self) -> torch.Tensor:
        """Every token of prompt and answer, once."""
        return self._token_ids[: self._n]

    def add(self, token_id: int) -> None:
        """Take note of a token of the answer."""
        self.counts[token_id] += 1
        if self._is_said[token_id]:
            return
        self._is_said[token_id] = True
        if self._n == len(self._token_ids):
            self._token_ids = torch.cat([self._token_ids, torch.empty(self._n, dtype=torch.long)])
        self._token_ids[self._n] = token_id
        self._n += 1


class Sampler:
    """Samples for sequences of one model. Keeps what penalties need until `drop`.

    Args:
        end_token_ids: Tokens that end every answer but those that ignore them.
    """

    def __init__(self, end_token_ids: frozenset[int]) -> None:
        self._end_token_ids = end_token_ids
        self._generator = torch.Generator()
        self._said: dict[Sequence, Said] = {}

    def sample(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> list[Sampled]:
        """Choose the next token of each sequence.

        Args:
            sequences: Whose.
            logits: `[n, vocabulary]`, a row for each; not changed.
        """
        with torch.inference_mode():
            is_number = torch.isfinite(logits.amax(1)).tolist()
            logprobs = self._logprobs(sequences, logits)
            changed = self._change(sequences, logits)
            token_ids = self._choose(sequences, changed)
            return [
                self._sampled(row, sequence, token_ids[row], logprobs) if is_number[row] else Sampled(None)
                for row, sequence in enumerate(sequences)
            ]

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self._said.pop(sequence, None)

    def _sampled(self, row: int, sequence: Sequence, token_id: int, logprobs: dict[int, _Logprobs]) -> Sampled:
        if sequence in self._said:
            self._said[sequence].add(token_id)
        return Sampled(token_id, logprobs[row].of(token_id) if row in logprobs else None)

    def _change(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """Return the logits after penalties, biases and forbidden ends; the same tensor if nobody has any."""
        penalised = [i for i, s in enumerate(sequences) if s.params.has_penalties]
        biases = [(i, t, b) for i, s in enumerate(sequences) for t, b in s.params.logit_bias.items()]
        ends = [
            (i, t)
            for i, s in enumerate(sequences)
            if s.n_generated < s.params.min_tokens
            for t in (*s.params.stop_token_ids, *(() if s.params.ignore_eos else self._end_token_ids))
        ]
        if not (penalised or biases or ends):
            return logits
        changed = logits.to(torch.float32, copy=True)
        if penalised:
            self._penalise(penalised, [sequences[i] for i in penalised], changed)
        if biases:
            row, token, bias = zip(*biases, strict=True)
            where = (_index(row, logits.device), _index(token, logits.device))
            changed.index_put_(where, torch.tensor(bias, device=logits.device), accumulate=True)
        if ends:
            row, token = zip(*ends, strict=True)
            changed[_index(row, logits.device), _index(token, logits.device)] = -torch.inf
        return changed

    def _penalise(self, rows: list[int], sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Change the logits of tokens that were said, in place."""
        for sequence in sequences:
            if sequence not in self._said:
                self._said[sequence] = Said(sequence, logits.shape[1])
        said = [self._said[s] for s in sequences]
        n_each = torch.tensor([len(one.token_ids) for one in said])
        device = logits.device
        row = torch.tensor(rows).repeat_interleave(n_each).to(device)
        token = torch.cat([one.token_ids for one in said]).to(device)
        counts = torch.cat([one.counts[one.token_ids] for one in said]).to(device)
        penalties = torch.tensor(
            [(s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty) for s in sequences]
        )
        repetition, presence, frequency = penalties.repeat_interleave(n_each, 0).to(device).unbind(1)
        scores = logits[row, token]
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        logits[row, token] = scores - counts * frequency - (counts > 0) * presence

    def _choose(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> list[int]:
        """Return each row's token: the likeliest one, or one that is drawn."""
        greedy = [i for i, s in enumerate(sequences) if s.params.is_greedy]
        drawing = [i for i, s in enumerate(sequences) if not s.params.is_greedy]
        token_ids = [0] * len(sequences)
        if greedy:
            for row, token_id in zip(greedy, _rows(logits, greedy).argmax(1).tolist(), strict=True):
                token_ids[row] = token_id
        n_together = _CPU_ROWS if logits.device.type == "cpu" else max(1, len(drawing))
        for first in range(0, len(drawing), n_together):
            rows = drawing[first : first + n_together]
            drawn = self._draw([sequences[i] for i in rows], _rows(logits, rows)).tolist()
            for row, token_id in zip(rows, drawn, strict=True):
                token_ids[row] = token_id
        return token_ids

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """Return a token for each row, `[n]`."""
        params = [s.params for s in sequences]
        logits = logits.float()
        scores = logits - logits.amax(1, keepdim=True)  # so that no temperature makes an infinity
        scores /= _column([max(p.temperature, _LEAST_TEMPERATURE) for p in params], scores)
        weights = scores.softmax(1)
        least = _least_kept(weights, [p.top_k for p in params], [p.top_p for p in params])
        if any(p.min_p for p in params):
            of_best = weights.amax(1, keepdim=True) * _column([p.min_p for p in params], weights)
            least = of_best if least is None else torch.maximum(least, of_best)
        if least is not None:
            weights *= weights >= least
        return self._race(sequences, weights)

    def _race(self, sequences: list[Sequence], weights: torch.Tensor) -> torch.Tensor:
        """Return a token for each row with the probability of its weight, `[n]`."""
        n_missing = -weights.shape[1] % _BLOCK_TOKENS
        if n_missing:
            weights = torch.nn.functional.pad(weights, (0, n_missing))
        blocks = weights.view(len(sequences), -1, _BLOCK_TOKENS)
        arrival = self._arrivals(sequences, blocks.shape[1] + _BLOCK_TOKENS).to(weights.device)
        winner = (blocks.sum(2) / arrival[:, _BLOCK_TOKENS:]).argmax(1)
        within = blocks[torch.arange(len(sequences), device=weights.device), winner]
        return winner * _BLOCK_TOKENS + (within / arrival[:, :_BLOCK_TOKENS]).argmax(1)

    def _arrivals(self, sequences: list[Sequence], n_times: int) -> torch.Tensor:
        """Draw exponential times, `[n, n_times]`; each row by its own sequence's numbers."""
        uniform = torch.empty(len(sequences), n_times, dtype=torch.float64)
        for row, sequence in zip(uniform, sequences, strict=True):
            row.uniform_(generator=self._generator.manual_seed(sequence.rng.getrandbits(63)))
        return uniform.log_().neg_()

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


def _least_kept(weights: torch.Tensor, top_k: SequenceOf[int], top_p: SequenceOf[float]) -> torch.Tensor | None:
    """Return the weight of the unlikeliest token that top-k and then top-p keep, `[n, 1]`; None if nobody has any.

    Args:
        weights: Probabilities, `[n, vocabulary]`.
        top_k: For each row; 0 for all.
        top_p: For each row.
    """
    n_tokens = weights.shape[1]
    sizes = [*(n for n in _PREFIXES if n < n_tokens), n_tokens]
    by_size: dict[int, list[int]] = defaultdict(list)
    by_mass: list[int] = []
    for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)):
        if 0 < k < n_tokens:
            by_size[next(n for n in sizes if n >= k)].append(row)
        elif p < 1.0:
            by_mass.append(row)
    if not (by_size or by_mass):
        return None
    least = weights.new_zeros(len(top_k), 1)
    for n_best, rows in by_size.items():
        best = _rows(weights, rows).topk(n_best, 1).values
        mass = best.cumsum(1)
        n_kept = _index([top_k[i] for i in rows], best.device).unsqueeze(1)
        wanted = _column([top_p[i] for i in rows], best)
        n_needed = 1 + (mass < wanted * mass.gather(1, n_kept - 1)).sum(1, keepdim=True)
        n_kept = torch.where(wanted < 1.0, n_needed.minimum(n_kept), n_kept)
        least[_index(rows, best.device)] = best.gather(1, n_kept - 1)
    if by_mass:
        best = _rows(weights, by_mass).topk(sizes[0], 1).values
        n_needed = 1 + (best.cumsum(1) < _column([top_p[i] for i in by_mass], best)).sum(1, keepdim=True)
        least[_index(by_mass, best.device)] = best.gather(1, n_needed.clamp(max=sizes[0]) - 1)
        for row, n in zip(by_mass, n_needed[:, 0].tolist(), strict=True):
            if n > sizes[0]:
                least[row] = _least_of_mass(weights[row], top_p[row])
    return least


def _least_of_mass(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the weight of the last of the likeliest tokens that have a probability together, of many.

    Instead of sorting all of them, sums those of about equal weight: where the upper half of its bits is the same. Only
    those among which the last one lies are sorted.
    """
    keys = weights.view(torch.int32) >> 16  # weights are positive, so their bits are in the order of their values
    mass = keys.bincount(weights).flip(0).cumsum(0)
    wanted = top_p * mass[-1]
    n_above = int((mass < wanted).sum())
    above = mass[n_above - 1] if n_above else torch.zeros_like(wanted)
    members = weights[keys == len(mass) - 1 - n_above].sort(descending=True).values
    n_needed = 1 + int((above + members.cumsum(0, dtype=torch.float64) < wanted).sum())
    return members[min(n_needed, len(members)) - 1]


def _rows(values: torch.Tensor, rows: SequenceOf[int]) -> torch.Tensor:
    """Return some rows, in their order; without a copy where these are all."""
    return values if len(rows) == len(values) else values[_index(rows, values.device)]


def _column(values: SequenceOf[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _index(values: SequenceOf[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)
