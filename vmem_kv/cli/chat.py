"""`vmem-kv chat`: a conversation with a running server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vmem_kv.cli.client import DEFAULT_URL, ApiKey, Url, connect, get, stream
from vmem_kv.errors import ConfigError

if TYPE_CHECKING:
    import httpx

_HELP = "/clear forgets the conversation, /quit or Ctrl-D ends it; Ctrl-C ends an answer."


def chat(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one question, and end.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="The most tokens of an answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.", show_default="none")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Talk to the model that `vmem-kv serve` serves.

    - `vmem-kv chat`

    - `vmem-kv chat --system "Answer in one sentence." --temperature 0`

    - `vmem-kv chat -p "What is the capital of France?"`
    """
    out = Console()
    with connect(url, api_key) as client:
        model = get(client, "/v1/models")["data"][0]["id"]
        options = {"model": model, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        first = [] if system is None else [{"role": "system", "content": system}]
        if prompt is not None:
            _answer(out, client, options, [*first, {"role": "user", "content": prompt}])
            return
        out.print(f"[bold]{model}[/] at {url}. {_HELP}", highlight=False)
        _talk(out, client, options, first)


def _talk(out: Console, client: httpx.Client, options: dict[str, Any], first: list[dict[str, str]]) -> None:
    messages = list(first)
    while True:
        try:
            text = out.input("[bold cyan]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if text == "/quit":
            return
        if text == "/clear":
            messages = list(first)
        elif text.startswith("/"):
            out.print(_HELP, highlight=False)
        elif text:
            asked = {"role": "user", "content": text}
            try:
                if said := _answer(out, client, options, [*messages, asked]):
                    messages = [*messages, asked, *said]
            except ConfigError as error:  # it may have grown too long, and /clear helps
                out.print(f"\n[bold red]{escape(str(error))}[/]", highlight=False)


def _answer(
    out: Console, client: httpx.Client, options: dict[str, Any], messages: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Print an answer as it comes; return it as a turn. Ctrl-C ends it, and what was said so far counts."""
    text, n_tokens, start_s, first_s = "", 0, time.monotonic(), 0.0
    body = {**options, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    try:
        for event in stream(client, "/v1/chat/completions", body):
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                first_s = first_s or (time.monotonic() - start_s if piece else 0.0)
                text += piece
                out.print(piece, end="", markup=False, highlight=False, emoji=False, soft_wrap=True)
            n_tokens = event["usage"]["completion_tokens"] if event["usage"] else n_tokens
    except KeyboardInterrupt:
        out.print(" [dim](ended)[/]", end="", highlight=False)
    out.print()
    passed_s = time.monotonic() - start_s
    if n_tokens and out.is_terminal:
        speed = f"{n_tokens / passed_s:.1f} tokens/s, the first after {first_s:.2f} s"
        out.print(f"[dim]{n_tokens} tokens, {speed}[/]", highlight=False)
    return [{"role": "assistant", "content": text}] if text else []
