"""The route that ends a session before its time.

Guarantees: a client reaches sessions of its own key and salt only; a name of another one's is as unknown as any.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from vmem_kv.errors import SessionInUse, UnknownSession, VmemError
from vmem_kv.server.errors import SERVER, ApiError, from_engine, from_pydantic
from vmem_kv.server.schemas import SessionAsk
from vmem_kv.server.service import Record, Service


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
    try:
        ending = service.engine.ending_session(ask.session_id, ask.sharing_domain(record.domain))
        async with asyncio.timeout(service.limits.request_timeout_s):
            await asyncio.wrap_future(ending)
    except UnknownSession:
        text = "There is no such session; it expired, or never was."
        raise ApiError(404, text, param="session_id", code="session_not_found") from None
    except SessionInUse:
        text = "A request uses this session; forget it when that one has ended."
        raise ApiError(409, text, param="session_id", code="session_in_use") from None
    except TimeoutError:
        record.ended_early = "timeout"
        raise ApiError(504, "It took too long, and may still happen.", kind=SERVER, code="timeout") from None
    except VmemError as error:
        raise from_engine(error, "session_id") from error
    return {"id": ask.session_id, "object": "session.deleted", "deleted": True}
