"""Which requests an engine takes on: every value is checked before anything is kept for it.

Guarantees: nothing changes, and any thread may call.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.request import MAX_SESSION_CHARACTERS, Request, is_session_id
from vmem_kv.errors import InvalidRequest, RequestTooLong
from vmem_kv.units import count


class Admission:
    """The bounds on a request.

    Args:
        config: The engine's.
        vocabulary: How many tokens there are.
        max_model_len: The most tokens of a sequence, by the model.
        max_tokens_alone: The same by the model and by the memory.
        has_tokenizer: Whether stop texts can be told.
    """

    def __init__(
        self, config: EngineConfig, *, vocabulary: int, max_model_len: int, max_tokens_alone: int, has_tokenizer: bool
    ) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._max_model_len = max_model_len
        self._max_tokens_alone = max_tokens_alone
        self._has_tokenizer = has_tokenizer

    def check(self, request: Request) -> None:
        """Check a request against the model and the budget.

        Raises:
            InvalidRequest: A value is wrong; `param` names it.
            RequestTooLong: It can never fit.
        """
        params = request.params
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
        n_prompt, n_fit = len(prompt), self._max_tokens_alone
        if n_prompt >= n_fit:
            raise RequestTooLong(
                f"{self._what_fits()}; the prompt has {count(n_prompt, 'token')}, and an answer needs one more",
                "prompt",
            )
        self._check_token_ids(prompt, "prompt")
        self._check_token_ids(params.stop_token_ids, "stop_token_ids")
        self._check_token_ids(params.logit_bias, "logit_bias")
        max_n = min(self._config.max_n, self._config.max_queued + self._config.max_num_seqs)
        if params.n > max_n:
            raise InvalidRequest(f"n is {params.n}; at most {count(max_n, 'answer')} can be given", "n")
        name = request.session_id
        if name is not None and not is_session_id(name):
            raise InvalidRequest(f"session_id must be a text of 1 to {MAX_SESSION_CHARACTERS} characters", "session_id")
        self._check_session_ttl(request)
        if params.stop and not self._has_tokenizer:
            raise InvalidRequest("stop texts need a tokenizer, and this engine has none", "stop")
        if params.max_tokens is not None and n_prompt + params.max_tokens > n_fit:
            raise RequestTooLong(
                f"{self._what_fits()}; the prompt has {count(n_prompt, 'token')}, and max_tokens asks for "
                f"{params.max_tokens} more",
                "max_tokens",
            )
        n_left = self.max_length(request) - n_prompt
        if params.min_tokens > n_left:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}; the answer can have at most {count(n_left, 'token')}", "min_tokens"
            )

    def max_length(self, request: Request) -> int:
        """The most tokens that a sequence of this request may come to; without max_tokens, what fits."""
        if request.params.max_tokens is None:
            return self._max_tokens_alone
        return len(request.prompt_token_ids) + request.params.max_tokens

    def _what_fits(self) -> str:
        """Say what bounds a sequence, as OpenAI's clients expect to read it."""
        if self._max_tokens_alone < self._max_model_len:
            return f"the memory budget holds at most {self._max_tokens_alone} tokens of one sequence"
        return f"This model's maximum context length is {self._max_model_len} tokens"

    def _check_session_ttl(self, request: Request) -> None:
        ttl_s, longest_s = request.session_ttl_s, self._config.longest_session_ttl_s
        if ttl_s is None:
            return
        if request.session_id is None:
            raise InvalidRequest("session_ttl_s is set without session_id; name the session", "session_ttl_s")
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 <= ttl_s <= longest_s:
            raise InvalidRequest(
                f"session_ttl_s is {ttl_s!r:.40}; sessions keep their slot for 0 to {longest_s:g} seconds here",
                "session_ttl_s",
            )

    def _check_token_ids(self, token_ids: Iterable[int], param: str) -> None:
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self._vocabulary:
                raise InvalidRequest(
                    f"{param} holds {token_id!r:.40}; tokens are whole numbers from 0 to {self._vocabulary - 1}", param
                )
