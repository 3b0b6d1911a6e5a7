"""The routes that save sessions to the operator's folder, and load them from there.

Guarantees: only what `SessionFolder` says of names and owners is read or written. A client's session is saved for its
own key and salt, and loaded for them. No message says a path, or what is wrong inside a file: the log does.
Costs: one file at a time is written or read. While it is read, the engine does nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from vmem_kv.errors import (
    CapacityError,
    FileError,
    FileRefused,
    OutOfDiskSpace,
    UsageError,
    VmemError,
)
from vmem_kv.server.body import read_model
from vmem_kv.server.errors import SERVER, ApiError, from_pydantic
from vmem_kv.server.log import note
from vmem_kv.server.schemas import ListAsk, LoadAsk, SaveAsk, SavedAsk
from vmem_kv.server.service import Record, Service
from vmem_kv.server.session_folder import Owner, SessionFolder
from vmem_kv.server.sessions import outcome


async def save(service: Service, http: Request) -> dict[str, Any]:
    """Write a session that waits to a file of the client's.

    Raises:
        ApiError: 400, 404 where there is no such session, 409 where a request uses it or there are too many files, 503,
            504, 507 where the disk is full.
        ClientGone: Nobody waits for the answer.
    """
    record: Record = http.state.record
    folder = _folder(service)
    ask = await read_model(http, SaveAsk, service.limits)
    try:
        with folder.saving(_owner(service, record, ask), ask.name) as file:

            async def saving() -> None:
                domain = ask.sharing_domain(record.domain)
                begun = await asyncio.wrap_future(service.engine.beginning_to_save(ask.session_id, file, domain))
                await asyncio.to_thread(begun.result)

            await outcome(service, record, saving, folder.turn)
            n_bytes = file.stat().st_size
    except FileRefused as error:  # what it had on disk was damaged
        raise _not_there() from error
    except (OSError, VmemError) as error:
        raise _unsaved(record, error) from error
    return {"id": ask.name, "object": "saved_session", "session_id": ask.session_id, "bytes": n_bytes}


async def load(service: Service, http: Request) -> dict[str, Any]:
    """Begin a session with what a file of the client's holds.

    Raises:
        ApiError: 400, 404 where there is no such file, 409 where there is such a session, or the file cannot be used
            here, 503, 504.
        ClientGone: Nobody waits for the answer.
    """
    record: Record = http.state.record
    folder = _folder(service)
    ask = await read_model(http, LoadAsk, service.limits)
    service.check_session_ttl(ask.session_ttl)
    with _reaching(record, "load"):
        file = folder.existing(_owner(service, record, ask), ask.name)

    def loading() -> asyncio.Future[None]:
        domain = ask.sharing_domain(record.domain)
        return asyncio.wrap_future(service.engine.loading_session(ask.session_id, file, domain, ttl_s=ask.session_ttl))

    try:
        await outcome(service, record, loading, folder.turn)
    except VmemError as error:
        raise _unloaded(record, error) from error
    return {"id": ask.session_id, "object": "session", "loaded": True}


async def show(service: Service, http: Request) -> dict[str, Any]:
    """List what the client has saved, under one salt.

    Raises:
        ApiError: 400, 404, 500 where the folder cannot be read.
    """
    record: Record = http.state.record
    folder = _folder(service)
    try:
        ask = ListAsk.model_validate(dict(http.query_params))
    except ValidationError as error:
        raise from_pydantic(error) from None
    with _reaching(record, "list"):
        found = folder.find(_owner(service, record, ask))
    data = [{"id": s.name, "object": "saved_session", "bytes": s.n_bytes, "created": s.saved_s} for s in found]
    return {"object": "list", "data": data}


async def delete(service: Service, http: Request, name: str) -> dict[str, Any]:
    """Delete a file of the client's. Sessions that were loaded from it stay.

    Raises:
        ApiError: 400, 404 where there is none, 500 where the system does not let go of it.
    """
    record: Record = http.state.record
    folder = _folder(service)
    try:
        ask = SavedAsk.model_validate({**http.query_params, "name": name})
    except ValidationError as error:
        raise from_pydantic(error) from None
    with _reaching(record, "delete"):
        folder.existing(_owner(service, record, ask), ask.name).unlink()
    return {"id": ask.name, "object": "saved_session.deleted", "deleted": True}


def _folder(service: Service) -> SessionFolder:
    if service.folder is None:
        text = "Sessions are not saved here: the server was started without --session-folder."
        raise ApiError(404, text, code="not_enabled")
    return service.folder


def _owner(service: Service, record: Record, ask: ListAsk) -> Owner:
    return Owner(service.keys.digest_of(record.domain), ask.cache_salt)


@contextmanager
def _reaching(record: Record, what: str) -> Iterator[None]:
    """Say what the system's errors mean to a client that wants something of its files."""
    try:
        yield
    except FileNotFoundError:
        text = "There is no saved session of this name."
        raise ApiError(404, text, param="name", code="saved_session_not_found") from None
    except OSError as error:
        _note(record, f"no saved session to {what}", error)
        raise ApiError(500, f"The server could not {what} this client's saved sessions.", kind=SERVER) from error


def _not_there() -> ApiError:
    text = "There is no such session; it expired, or never was."
    return ApiError(404, text, param="session_id", code="session_not_found")


def _unsaved(record: Record, error: OSError | VmemError) -> ApiError:
    """Say why a session was not saved."""
    if isinstance(error, OutOfDiskSpace):
        return ApiError(507, "There is no room on the server's disk.", kind=SERVER, code="disk_full")
    if isinstance(error, CapacityError):
        return _no_room()
    _note(record, "a session was not saved", error)
    return ApiError(500, "The server could not save this session.", kind=SERVER)


def _unloaded(record: Record, error: VmemError) -> ApiError:
    """Say why a session was not loaded."""
    if isinstance(error, UsageError):
        text = "There is a session of this name; delete it first, or use another name."
        return ApiError(409, text, param="session_id", code="session_exists")
    if isinstance(error, CapacityError):
        return _no_room()
    _note(record, "a saved session was not loaded", error)
    if isinstance(error, FileRefused):
        text = "The saved session cannot be used here: it was damaged, or another model wrote it."
        return ApiError(409, text, param="name", code="saved_session_refused")
    return ApiError(500, "The server could not load this session.", kind=SERVER)


def _no_room() -> ApiError:
    text = "There is no room for this session now; try again later."
    return ApiError(503, text, kind=SERVER, code="no_room", headers={"Retry-After": "5"})


def _note(record: Record, what: str, error: OSError | VmemError) -> None:
    """Log a reason, which has what the client made up in it only where our words quote the path: leave that out."""
    cause = error.__cause__ if isinstance(error, FileError) and error.__cause__ is not None else error
    reason = cause.strerror if isinstance(cause, OSError) else str(cause)
    note(what, logging.WARNING, request_id=record.request_id, kind=type(error).__name__, reason=reason)
