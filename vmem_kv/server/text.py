"""From text to tokens, in a thread of its own, such that neither the event loop nor the engine waits for it.

Guarantees: text is never longer here than what could fit the model. What users write in a conversation cannot forge a
turn (`engine.conversation`). Templates come from the model's folder only, and run in transformers' sandbox. Work whose
caller is cancelled before it began is not done.
Assumes: encoding happens in the one thread below only, because a tokenizer's settings change while it encodes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vmem_kv.engine.conversation import ChatWriter
from vmem_kv.engine.detokenizer import Detokenizer
from vmem_kv.server.errors import ApiError, invalid
from vmem_kv.server.schemas import Message

T = TypeVar("T")
MAX_CHARACTERS_PER_TOKEN = 16
"""Of a text that is worth encoding at all: ordinary text has 3 to 6."""


def _letters_of_bytes() -> dict[str, int]:
    """Return which byte each letter stands for, as byte-level tokenizers write their tokens.

    A byte that Latin-1 prints is its own letter; all others have letters from 256 on, in order.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()


class TextCodec:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: The model's.
        max_model_len: The most tokens of a sequence that the engine takes: of the model's length what the memory
            budget holds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._max_characters = max_model_len * MAX_CHARACTERS_PER_TOKEN
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vmem_kv-text")
        self._writer = ChatWriter(tokenizer)
        # How a token is written can depend on the one before it: at a text's beginning, some write no space.
        self._context: list[int] = list(tokenizer("a", add_special_tokens=False).input_ids)
        self._context_text = str(tokenizer.decode(self._context))

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return a prompt's tokens. Special tokens in it are special tokens.

        Raises:
            ApiError: The text is too long.
        """
        self._check_length(len(text), "prompt")
        return await self._do("prompt", lambda: self._encode(text, add_special_tokens))

    async def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens of a conversation, written as the model's template says, up to where its answer begins.

        Raises:
            ApiError: It is too long, there is no template, or the template refuses it.
        """
        self._check_length(sum(len(m.text) + len(m.name or "") for m in messages), "messages")
        if not self._tokenizer.chat_template:
            text = "This model has no chat template; use /v1/completions."
            raise invalid(text, "model", "unsupported_value")
        return await self._do("messages", lambda: self._encode_chat(messages))

    async def decode(self, token_ids: Sequence[int], param: str = "tokens") -> str:
        """Return the text of tokens, which a client sent as `param`. Those that do not exist are refused.

        Raises:
            ApiError: A token does not exist.
        """
        n_tokens = len(self._tokenizer)
        if any(not 0 <= t < n_tokens for t in token_ids):
            raise invalid(f"Invalid '{param}': tokens are integers from 0 to {n_tokens - 1}.", param)
        return await self._do(param, lambda: str(self._tokenizer.decode(list(token_ids))))

    def token_text(self, token_id: int) -> str:
        """Return what one token adds to a text, spaces included; part of a character is U+FFFD."""
        text = str(self._tokenizer.decode([*self._context, token_id]))
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return str(self._tokenizer.decode([token_id]))

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """Return what makes an answer's text of its tokens, as the engine does."""
        return Detokenizer(self._tokenizer, prompt_token_ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return what one token adds to the text, also where it is part of a character; None where nobody knows."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        written = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", written):
            return bytes([int(byte[1], 16)])
        values = [_BYTE_OF_LETTER.get(letter) for letter in written]
        return None if None in values else bytes(value for value in values if value is not None)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def _encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns = [
            {
                "role": "system" if m.role == "developer" else m.role,
                "content": m.text,
                **({} if m.name is None else {"name": m.name}),
            }
            for m in messages
        ]
        token_ids: list[int] = []
        for piece in self._writer.pieces(turns):
            token_ids += self._encode(piece, False) if isinstance(piece, str) else piece
            if len(token_ids) > self.max_model_len:  # which many short pieces are seen to be long before their end
                raise invalid(
                    f"This model's maximum context length is {self.max_model_len} tokens, and the messages have more.",
                    "messages",
                    "context_length_exceeded",
                )
        return tuple(token_ids)

    def _check_length(self, n_characters: int, param: str) -> None:
        if n_characters > self._max_characters:
            raise invalid(
                f"This model's maximum context length is {self.max_model_len} tokens, and {n_characters} characters "
                f"cannot fit; at most {self._max_characters} are accepted.",
                param,
                "context_length_exceeded",
            )

    async def _do(self, param: str, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TemplateError:
            text = f"Invalid '{param}': the model's chat template does not accept this conversation."
            raise invalid(text, param) from None
        except ApiError:
            raise
        except Exception as error:  # whatever a tokenizer raises is the input's fault, and no reason to end
            text = f"Invalid '{param}': the tokenizer refuses it ({type(error).__name__})."
            raise invalid(text, param) from None
