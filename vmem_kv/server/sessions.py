"""The route that ends a session before its time, and what the engine's answers about sessions mean to clients.

Guarantees: a client reaches sessions of its own key and salt only; a name of another one's is as unknown as any.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from vmem_kv.errors import EngineDead, SessionInUse, UnknownSession, VmemError
from vmem_kv.server.errors import SERVER, ApiError, from_engine, from_pydantic
from vmem_kv.server.schemas import SessionAsk
from vmem_kv.server.service import Record, Service

T = TypeVar("T")


async def forget(service: Service, http: Request, session_id: str) -> dict[str, Any]:
    """End a session that waits, wherever it is.

    Args:
        service: Whose.
        http: The request; its query may have the `cache_salt` that the session was begun with.
        session_id: The session's name.

    Raises:
        ApiError: 400, 404 where there is none, 409 where a request uses it, 503, 504.
    """
    record: Record = http.state.record
    try:
        ask = SessionAsk.model_validate({**http.query_params, "session_id": session_id})
    except ValidationError as error:
        raise from_pydantic(error) from None
    domain = ask.sharing_domain(record.domain)
    try:
        await outcome(
            service, record, lambda: asyncio.wrap_future(service.engine.ending_session(ask.session_id, domain))
        )
    except VmemError as error:
        raise from_engine(error, "session_id") from error
    return {"id": ask.session_id, "object": "session.deleted", "deleted": True}


async def outcome(
    service: Service,
    record: Record,
    begin: Callable[[], Awaitable[T]],
    turn: AbstractAsyncContextManager[Any] | None = None,
) -> T:
    """Wait for what the engine's thread does with a session.

    Args:
        service: Whose.
        record: Of the request.
        begin: Asks the engine.
        turn: Held meanwhile.

    Raises:
        ApiError: 404 where there is no such session, 409 where a request uses it, 503 where the engine has ended, 504.
        VmemError: Whatever else it ended with.
    """
    try:
        async with asyncio.timeout(service.limits.request_timeout_s), turn or nullcontext():
            return await begin()
    except UnknownSession:
        text = "There is no such session; it expired, or never was."
        raise ApiError(404, text, param="session_id", code="session_not_found") from None
    except SessionInUse:
        text = "A request uses this session; try again when that one has ended."
        raise ApiError(409, text, param="session_id", code="session_in_use") from None
    except EngineDead as error:
        raise from_engine(error, "session_id") from error
    except TimeoutError:
        record.ended_early = "timeout"
        raise ApiError(504, "It took too long, and may still happen.", kind=SERVER, code="timeout") from None
