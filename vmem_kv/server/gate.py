"""The way in and out, around all routes: size, host and key are checked here; whatever happens ends in one log line.

Guarantees: no route but /health and /ready runs without a valid key where keys are set; a body that says that it is
too long is refused unread.
"""

from __future__ import annotations

import logging
from time import monotonic

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmem_kv.server.body import too_large
from vmem_kv.server.errors import ApiError, failure
from vmem_kv.server.log import LOGGER, note
from vmem_kv.server.service import Record, Service


class Gate:
    """An ASGI application around another one.

    Args:
        app: What it guards.
        service: The rules.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        record = Record()
        statuses: list[int] = []

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        metrics = self._service.metrics
        metrics.n_open += 1
        try:
            try:
                record.domain = self._check(scope)
                scope.setdefault("state", {})["record"] = record
                await self._app(scope, receive, send_noted)
            except ApiError as error:
                await error.response()(scope, receive, send_noted)
            except Exception:  # our bug: the client learns that, the log says where
                LOGGER.exception("request %s failed", record.request_id)
                if not statuses:
                    await failure().response()(scope, receive, send_noted)
        finally:
            metrics.n_open -= 1
            self._note(scope, record, statuses[0] if statuses else 0)

    def _check(self, scope: Scope) -> str:
        """Return the client's domain, or refuse the request."""
        headers, limits = Headers(scope=scope), self._service.limits
        if len(headers.raw) > limits.max_headers:
            raise ApiError(431, f"The request has too many headers. At most {limits.max_headers} are accepted.")
        n_bytes = sum(len(name) + len(value) + 4 for name, value in headers.raw) + len(scope.get("raw_path", b""))
        if n_bytes > limits.max_header_bytes:
            text = f"The request's head is too large. At most {limits.max_header_bytes} bytes are accepted."
            raise ApiError(431, text, headers={"Connection": "close"})
        if "transfer-encoding" in headers and "content-length" in headers:  # which a proxy may read otherwise
            text = "A request has either Content-Length or Transfer-Encoding."
            raise ApiError(400, text, headers={"Connection": "close"})
        if "host" in headers or scope["http_version"] != "1.0":  # which knows none; every browser sends one
            self._service.hosts.check(headers.get("host", ""))
        domain = self._service.keys.domain(scope["path"], headers.getlist("authorization"))
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "Encoded request bodies are not accepted.", headers={"Connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > limits.max_body_bytes:
            raise too_large(limits.max_body_bytes)
        return domain

    def _note(self, scope: Scope, record: Record, status: int) -> None:
        """Write the request's line, and count it. The route's own path, never what the client wrote."""
        route = getattr(scope.get("route"), "path", "other")
        duration_s = monotonic() - record.arrived_s
        metrics = self._service.metrics
        metrics.responses.labels(route, str(status)).inc()
        if record.n_prompt_tokens:
            metrics.request_s.observe(duration_s)
        if record.ended_early:
            metrics.ended_early.labels(record.ended_early).inc()
        note(
            "request",
            logging.WARNING if status >= 500 else logging.INFO,
            request_id=record.request_id,
            method=scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "DELETE") else "other",
            route=route,
            status=status,
            duration_s=round(duration_s, 4),
            n_prompt_tokens=record.n_prompt_tokens,
            n_cached_tokens=record.n_cached_tokens,
            n_generated_tokens=record.n_generated_tokens,
            ended_early=record.ended_early,
        )
