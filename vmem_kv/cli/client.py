"""How the commands that talk to a running server reach it, and what its refusals look like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmem_kv.errors import ConfigError

if TYPE_CHECKING:
    import httpx

CONNECT_S = 5.0
SILENT_S = 120.0
"""The longest that a server may say nothing; it sends comments meanwhile."""

Url = Annotated[str, typer.Option("--url", help="Where the server listens.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="VMEM_KV_API_KEY", show_envvar=True, show_default=False, help="The server's key."),
]
DEFAULT_URL = "http://127.0.0.1:8000"


@contextmanager
def connect(url: str, api_key: str | None) -> Iterator[httpx.Client]:
    """Yield a client of the server.

    Raises:
        ConfigError: It cannot be reached, or it answers with an error.
    """
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(SILENT_S, connect=CONNECT_S)
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False) as client:
            yield client
    except httpx.HTTPStatusError as error:
        raise ConfigError(_message(error.response)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"cannot talk to a server at {url}: {error}; start one with `vmem-kv serve`, or set --url"
        ) from error


def get(client: httpx.Client, path: str) -> dict[str, Any]:
    """Return what a route says.

    Raises:
        httpx.HTTPError: See `connect`.
    """
    response = client.get(path)
    response.raise_for_status()
    data: dict[str, Any] = response.json()
    return data


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a stream's events.

    Raises:
        ConfigError: The server refused it, or ended the answer by an error. It goes on.
        httpx.HTTPError: See `connect`.
    """
    with client.stream("POST", path, json=body) as response:
        if response.is_error:
            response.read()
            raise ConfigError(_message(response))
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ConfigError(f"the server says: {event['error']['message']}")
            yield event


def _message(response: httpx.Response) -> str:
    try:
        text = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = f"status {response.status_code}"
    return f"the server says: {text}"
