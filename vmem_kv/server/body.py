"""A request's body: bounded bytes, then strict JSON.

Guarantees: never more than `max_body_bytes` and one chunk are held; what comes out is an object of finite numbers.
Of a repeated key the last one counts, as everywhere in Python, and is validated like any other.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from vmem_kv.server.errors import ApiError, from_pydantic, invalid
from vmem_kv.server.limits import Limits

M = TypeVar("M", bound=BaseModel)
MAX_DIGITS = 40
_NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The API expects a JSON payload, but what was sent was not valid JSON.)"
)


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


async def read_model(request: Request, kind: type[M], limits: Limits) -> M:
    """Read and validate a request's body.

    Raises:
        ApiError: 408, 413, 415 or 400.
        ClientGone: The connection closed before the body was complete.
    """
    # It must be there: any web page can send a body of no type, but of this one only where we told its browser so.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "Unsupported content type. This API method only accepts 'application/json' requests.")
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, "The request's body did not arrive in time.", headers={"Connection": "close"}) from None
    data = parse(body)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise from_pydantic(error) from None


def parse(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds.

    Raises:
        ApiError: It is no JSON, it is no object, its numbers are not finite, or its texts cannot be encoded.
    """
    try:
        data = json.loads(body.decode(), parse_constant=_no_constant, parse_int=_int, parse_float=_float)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise invalid(_NOT_JSON, None, None) from None
    if _has_lone_surrogate(body, data):
        raise invalid("The body holds a lone surrogate, which is no character.", None)
    if not isinstance(data, dict):
        raise invalid("The JSON body of the request must be an object.", None, None)
    return data


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def too_large(max_bytes: int) -> ApiError:
    """Return the answer to a body that is too long; the rest of it is not read."""
    text = f"The request's body is too large. At most {max_bytes} bytes are accepted."
    return ApiError(413, text, headers={"Connection": "close"})


def _has_lone_surrogate(body: bytes, data: object) -> bool:
    """Only an escape can make one; most bodies have none, and nothing to be encoded for a look."""
    if b"\\ud" not in body.lower():
        return False
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("an integer is too long")
    return int(digits)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
