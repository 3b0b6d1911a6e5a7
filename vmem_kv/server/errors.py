"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}.

Guarantees: messages are made of our own words and of short, printable parts of the client's values: no addresses, no
paths, no tracebacks, no keys, no prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from vmem_kv.errors import (
    EngineDead,
    InvalidRequest,
    QueueFull,
    ReaderTooSlow,
    RequestTooLong,
    ShuttingDown,
    VmemError,
)

INVALID = "invalid_request_error"
SERVER = "server_error"
TAGS = frozenset(
    {"<string>", "<array>", "<array of strings>", "<array of tokens>", "<array of token arrays>", "<other>"}
)
"""The names of unions' branches in schemas.py: they are no part of a parameter's name."""

UNSUPPORTED = frozenset(
    {
        "audio", "best_of", "chat_template", "chat_template_kwargs", "echo", "function_call", "functions",
        "guided_choice", "guided_grammar", "guided_json", "guided_regex", "logit_processors", "modalities",
        "parallel_tool_calls", "prediction", "priority", "prompt_cache_key", "prompt_logprobs", "reasoning_effort",
        "safety_identifier", "service_tier", "store", "structured_outputs", "suffix", "tool_choice", "tools",
        "use_beam_search", "verbosity", "web_search_options",
    }
)  # fmt: skip
"""Parameters that others know and that are not offered (here, or at this endpoint): named so that the error says it."""


class ApiError(ValueError):
    """A request ends with this status and body. A ValueError, because only these pass through pydantic's validators.

    Attributes:
        status: The HTTP status.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the response's body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the whole response."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def failure() -> ApiError:
    """Return what a client learns of a bug of ours: that there is one."""
    return ApiError(500, "The server failed to handle this request.", kind=SERVER)


def from_engine(error: VmemError, param: str) -> ApiError:
    """Return what an engine's refusal means to a client.

    Args:
        error: What the engine raised, or reported of an answer.
        param: What this endpoint calls its prompt.
    """
    if isinstance(error, RequestTooLong):
        return invalid(str(error), param if error.param == "prompt" else error.param, "context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return invalid(str(error), param if error.param == "prompt" else error.param)
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), kind="requests", code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), kind=SERVER, headers={"Retry-After": "5"})
    if isinstance(error, EngineDead):
        return ApiError(503, "The engine has ended and the server is going down.", kind=SERVER)
    if isinstance(error, ReaderTooSlow):
        return ApiError(408, str(error), code="reader_too_slow")
    return ApiError(500, "The server failed to compute this answer.", kind=SERVER)


def from_pydantic(error: ValidationError) -> ApiError:
    """Return the first thing that is wrong with a request's fields."""
    # A wrong kind of thing, then what is not offered, explain more than a wrong value beside them.
    first = ("literal_error", "extra_forbidden")
    found = min(error.errors(include_url=False), key=lambda e: first.index(e["type"]) if e["type"] in first else 2)
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    if isinstance(cause := context.get("error"), ApiError):
        return cause
    param = _param(found["loc"])
    if kind == "extra_forbidden":
        if param in UNSUPPORTED:
            return invalid(f"Unsupported parameter: '{param}' is not supported here.", param, "unsupported_parameter")
        return invalid(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if kind == "missing":
        if param == "model":
            return invalid("you must provide a model parameter", None, None)
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind in _EXPECTED:
        text = f"Invalid type for '{param}': expected {_EXPECTED[kind]}, but got {_name(value)} instead."
        return invalid(text, param, "invalid_type")
    if kind == "union_tag_invalid":
        text = f"Invalid type for '{param}': expected one of {_tags(context)}, but got {_name(value)} instead."
        return invalid(text, param, "invalid_type")
    return _out_of_range(kind, param, value, context)


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _out_of_range(kind: str, param: str, value: object, context: Mapping[str, Any]) -> ApiError:
    if kind in ("greater_than_equal", "greater_than"):
        number, bound = _bound(context)
        sign = ">=" if kind == "greater_than_equal" else ">"
        text = f"{number} below minimum value. Expected a value {sign} {bound}, but got {value} instead."
        return invalid(f"Invalid '{param}': {text}", param, f"{number}_below_min_value")
    if kind == "less_than_equal":
        number, bound = _bound(context)
        text = f"{number} above maximum value. Expected a value <= {bound}, but got {value} instead."
        return invalid(f"Invalid '{param}': {text}", param, f"{number}_above_max_value")
    if kind == "too_short":
        text = "empty array. Expected an array with minimum length 1, but got an empty array instead."
        return invalid(f"Invalid '{param}': {text}", param, "empty_array")
    if kind == "too_long":
        most, length = context["max_length"], len(value) if isinstance(value, (list, dict)) else "more"
        text = f"array too long. Expected an array with maximum length {most}, but got an array with length {length}"
        return invalid(f"Invalid '{param}': {text} instead.", param, "array_above_max_length")
    if kind == "string_too_long":
        most, length = context["max_length"], len(value) if isinstance(value, str) else "more"
        text = f"string too long. Expected a string with maximum length {most}, but got a string with length {length}"
        return invalid(f"Invalid '{param}': {text} instead.", param, "string_above_max_length")
    if kind == "string_too_short":
        return invalid(f"Invalid '{param}': empty string.", param)
    if kind == "literal_error":
        return invalid(f"Invalid value: {_shown(value)}. Supported values are: {context['expected']}.", param)
    return invalid(f"Invalid '{param}'.", param)


def _param(location: Sequence[int | str]) -> str:
    """("messages", "<object>", 0, "role") is messages[0].role."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in TAGS:
            name += f".{_printable(part)}" if name else _printable(part)
    return name


def _bound(context: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of number that a bound is for, and the bound. It is written in its field's type."""
    bound = next(context[name] for name in ("ge", "gt", "le") if name in context)
    return ("integer", str(bound)) if isinstance(bound, int) else ("decimal", f"{bound:g}")


def _tags(context: Mapping[str, Any]) -> str:
    return str(context["expected_tags"]).replace("<", "").replace(">", "").replace("'", "")


def _name(value: object) -> str:
    if value is None:
        return "null"
    names = ((bool, "a boolean"), (int, "an integer"), (float, "a decimal"), (str, "a string"), (list, "an array"))
    return next((name for kind, name in names if isinstance(value, kind)), "an object")


def _shown(value: object) -> str:
    return repr(_printable(value) if isinstance(value, str) else value)[:60]


def _printable(text: str) -> str:
    """Return the beginning of a client's text, fit for a message and a log line."""
    return "".join(c if c.isprintable() else "?" for c in text[:64])
