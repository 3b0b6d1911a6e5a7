"""The routes.

Guarantees: what stands in a path as a name is taken whole, whatever characters it has. (Starlette's `path` knows no
line ends, and drops a last one.)
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import vmem_kv
from vmem_kv.errors import RequestError
from vmem_kv.server.answering import encoded
from vmem_kv.server.body import ClientGone, read_model
from vmem_kv.server.chat import chat
from vmem_kv.server.completions import complete
from vmem_kv.server.dashboard import History, dashboard_data, dashboard_page
from vmem_kv.server.errors import ApiError, failure, from_engine
from vmem_kv.server.gate import Gate
from vmem_kv.server.readiness import readiness
from vmem_kv.server.saved_sessions import delete, load, save, show
from vmem_kv.server.schemas import ChatAsk, CompletionAsk, DetokenizeAsk, LoadAsk, SaveAsk, TokenizeAsk
from vmem_kv.server.service import Service
from vmem_kv.server.sessions import forget

_SALTED = {"parameters": [{"name": "cache_salt", "in": "query", "schema": {"type": "string"}}]}
_BODIES: tuple[type[BaseModel], ...] = (ChatAsk, CompletionAsk, DetokenizeAsk, LoadAsk, SaveAsk, TokenizeAsk)


class _Whole(Convertor[str]):
    """All that is left of a path."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        """Return it as it is."""
        return value

    def to_string(self, value: str) -> str:
        """Return it as it is."""
        return value


register_url_convertor("whole", _Whole())


def build_app(service: Service, history: History) -> ASGIApp:
    """Return the ASGI application that serves a model.

    Args:
        service: What it serves, and by which rules.
        history: What the dashboard shows of the past.
    """
    app = FastAPI(
        title="vmem_kv",
        version=vmem_kv.__version__,
        openapi_url=None,  # a route of ours, below
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_generation(app, service)
    _add_saved_sessions(app, service)
    _add_operation(app, service, history)
    _add_errors(app)
    _add_document(app)
    return Gate(app, service)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", openapi_extra=_takes(CompletionAsk))
    async def completions(request: Request) -> Response:
        """Continue prompts. With `stream`, as server-sent events."""
        return await complete(service, request)

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatAsk))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation. With `stream`, as server-sent events."""
        return await chat(service, request)

    @app.delete("/v1/sessions/{session_id:whole}", openapi_extra=_SALTED)
    async def forget_session(request: Request, session_id: str) -> dict[str, Any]:
        """End a session that waits, before its time."""
        return await forget(service, request, session_id)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:whole}")
    async def model(name: str) -> dict[str, Any]:
        """Describe a model."""
        service.check_model(name)
        return _model(service)

    @app.post("/tokenize", openapi_extra=_takes(TokenizeAsk))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Return the tokens of a prompt or of messages."""
        ask = await read_model(request, TokenizeAsk, service.limits)
        service.check_model(ask.model)
        codec = service.codec
        with service.turn_to_encode():
            if ask.messages is not None:
                work = codec.encode_chat(ask.messages)
            else:
                work = codec.encode(ask.prompt or "", add_special_tokens=ask.add_special_tokens)
            tokens = await encoded(work, request, service.limits)
        return {"tokens": list(tokens), "count": len(tokens), "max_model_len": service.codec.max_model_len}

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeAsk))
    async def detokenize(request: Request) -> dict[str, Any]:
        """Return the text of tokens."""
        ask = await read_model(request, DetokenizeAsk, service.limits)
        service.check_model(ask.model)
        with service.turn_to_encode():
            return {"prompt": await encoded(service.codec.decode(ask.tokens), request, service.limits)}


def _add_saved_sessions(app: FastAPI, service: Service) -> None:
    @app.get("/v1/saved_sessions", openapi_extra=_SALTED)
    async def saved_sessions(request: Request) -> dict[str, Any]:
        """List what this client has saved, under one salt."""
        return await show(service, request)

    @app.post("/v1/saved_sessions", openapi_extra=_takes(SaveAsk))
    async def save_session(request: Request) -> dict[str, Any]:
        """Save a session that waits to a file on the server."""
        return await save(service, request)

    @app.post("/v1/saved_sessions/load", openapi_extra=_takes(LoadAsk))
    async def load_session(request: Request) -> dict[str, Any]:
        """Begin a session with one that was saved."""
        return await load(service, request)

    @app.delete("/v1/saved_sessions/{name:whole}", openapi_extra=_SALTED)
    async def delete_saved_session(request: Request, name: str) -> dict[str, Any]:
        """Delete a saved session's file."""
        return await delete(service, request, name)


def _add_operation(app: FastAPI, service: Service, history: History) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine's thread lives."""
        is_alive = service.engine.health().is_alive
        return JSONResponse({"status": "ok" if is_alive else "dead"}, 200 if is_alive else 503)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether new requests are taken on and computed."""
        state = readiness(service.engine, service.limits.silent_s)
        return JSONResponse(state.as_data(), 200 if state.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        text = await asyncio.to_thread(service.metrics.render)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/dashboard")
    async def dashboard() -> Response:
        """Show the slots and their memory, live."""
        return dashboard_page()

    @app.get("/dashboard/data")
    async def data() -> JSONResponse:
        """Return what the dashboard shows."""
        return JSONResponse(await asyncio.to_thread(dashboard_data, service, history))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestError)
    async def on_refusal(_: Request, error: RequestError) -> JSONResponse:
        return from_engine(error, "prompt").response()

    @app.exception_handler(ClientGone)
    async def on_client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)  # for the log: nobody reads it

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> JSONResponse:
        return failure().response()

    @app.exception_handler(HTTPException)
    async def on_no_route(request: Request, error: HTTPException) -> JSONResponse:
        path = "".join(c if c.isascii() and c.isprintable() else "?" for c in request.url.path[:100])
        method = "".join(c for c in request.method[:16] if c.isalpha())
        if error.status_code == 405:
            text, code = f"Invalid method for URL ({method} {path})", "method_not_supported"
            return ApiError(405, text, code=code, headers=error.headers).response()
        return ApiError(error.status_code, f"Invalid URL ({method} {path})").response()


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "vmem_kv",
        "max_model_len": service.codec.max_model_len,
    }


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a body that the route reads itself, by its own strict rules."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_document(app: FastAPI) -> None:
    @cache
    def document() -> Response:
        """Describe the routes, and the bodies that they read by themselves."""
        described = app.openapi()
        _, bodies = models_json_schema(
            [(kind, "validation") for kind in _BODIES], ref_template="#/components/schemas/{model}"
        )
        described.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        return JSONResponse(described)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        """Return what each route takes."""
        return document()
