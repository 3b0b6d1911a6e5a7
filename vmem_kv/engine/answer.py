"""What a sequence has said so far, and whether that ends it.

Guarantees: texts of all updates, joined, are the answer; the stop text and what follows it are not part of it (unless
asked for), and no character is ever split.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from vmem_kv.engine.detokenizer import Detokenizer, StopFinder
from vmem_kv.engine.request import FinishReason, Sequence, SequenceUpdate
from vmem_kv.engine.sampler import Sampled


class Answer:
    """Turns one sequence's tokens into updates.

    Args:
        sequence: Whose.
        tokenizer: The model's; None gives updates without text.
        end_token_ids: Tokens that end every answer but those that ignore them.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: PreTrainedTokenizerBase | None, end_token_ids: frozenset[int]
    ) -> None:
        params = sequence.params
        self._sequence = sequence
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_token_ids)
        self._stops = StopFinder(params.stop, params.include_stop)
        self._text = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, sequence.request.prompt_token_ids, params.skip_special_tokens)
        )

    def add(self, token_id: int, sampled: Sampled) -> SequenceUpdate:
        """Append a token to the sequence, and say what is new and whether that was all."""
        sequence = self._sequence
        sequence.token_ids.append(token_id)
        update = SequenceUpdate(sequence.request.request_id, sequence.index, token_ids=[token_id])
        if sampled.logprobs is not None:
            update.logprobs.append(sampled.logprobs)
        if token_id in self._ends and sequence.n_generated > sequence.params.min_tokens:
            update.finish_reason, update.stop_reason = FinishReason.STOP, token_id
            update.text = self._rest()
            return update
        if self._text is not None:
            update.text, stop = self._text.add(token_id), None
            if sequence.n_generated >= sequence.params.min_tokens:
                update.text, stop = self._stops.add(update.text)
            if stop is not None:
                update.finish_reason, update.stop_reason = FinishReason.STOP, stop
                return update
        if len(sequence.token_ids) >= sequence.max_length:
            update.finish_reason = FinishReason.LENGTH
            update.text += self._rest()
        return update

    def _rest(self) -> str:
        """Text that waited for more, at the end. It can complete a stop text, which ends it then."""
        if self._text is None:
            return ""
        text, stop = self._stops.add(self._text.flush())
        return text if stop is not None else text + self._stops.flush()
