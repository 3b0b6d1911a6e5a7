"""`vmem-kv serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vmem_kv.cli.generate import Dtype, load_with_bar
from vmem_kv.errors import ConfigError

_MODEL = "Model"
_ENGINE = "Engine and memory"
_HTTP = "HTTP, access and limits"


def serve(
    model_name: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a GGUF file, or a name on the Hugging Face hub.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What clients call the model.",
                     show_default="the last part of MODEL", rich_help_panel=_MODEL),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of weights and cache.", rich_help_panel=_MODEL)
    ] = Dtype.FLOAT32,
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="Where model and cache live: cpu, cuda or cuda:N; see `vmem-kv doctor`.",
                     rich_help_panel=_MODEL),
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads that torch computes with.", show_default="torch's choice",
                     rich_help_panel=_MODEL),
    ] = None,
    max_seqs: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Sequences that compute together; each has a slot.",
                     rich_help_panel=_ENGINE)
    ] = 32,
    max_len: Annotated[
        int | None,
        typer.Option(metavar="N", min=2,
                     help="Tokens of a sequence, prompt and answer. It costs addresses, not memory.",
                     show_default="what the model was made for", rich_help_panel=_ENGINE),
    ] = None,
    max_batch_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1,
                     help="Tokens of one step. Longer prompts are computed in chunks beside the others' tokens.",
                     rich_help_panel=_ENGINE),
    ] = 512,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Budget of physical memory for the cache, such as 2g.",
                     show_default="90 % of what is free", rich_help_panel=_ENGINE),
    ] = None,
    page_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Unit of physical memory, such as 64k.", show_default="by the layout",
                     rich_help_panel=_ENGINE),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option("--prefix-cache/--no-prefix-cache", rich_help_panel=_ENGINE,
                     help="Begin a prompt with what the same client's requests have computed of it."),
    ] = True,
    prefix_policy: Annotated[
        str,
        typer.Option(metavar="NAME",
                     help="Which cached prefix goes first when room is needed: lru, or cost (of computing it again).",
                     rich_help_panel=_ENGINE),
    ] = "lru",
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE",
                     help="Host memory for what running sequences lose when pages run short, and for sessions, such as "
                     "4g; without it there are no sessions.", show_default="none", rich_help_panel=_ENGINE),
    ] = None,
    disk_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Room on disk for sessions that leave host memory, such as 50g.",
                     show_default="none",
                     rich_help_panel=_ENGINE),
    ] = None,
    disk_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where that is: a folder on a local disk, not in memory.", file_okay=False,
                     show_default="none", rich_help_panel=_ENGINE),
    ] = None,
    session_ttl: Annotated[
        float,
        typer.Option(metavar="S", min=0.0,
                     help="Seconds that a session keeps its slot while nobody asks; then ten times as long in "
                     "host memory, and sixty times on disk.", rich_help_panel=_ENGINE),
    ] = 60.0,
    max_session_ttl: Annotated[
        float | None,
        typer.Option(metavar="S", min=0.0, help="The longest that a request may ask for in its stead (session_ttl).",
                     show_default="--session-ttl", rich_help_panel=_ENGINE),
    ] = None,
    load_session: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A saved session to begin with, and its name. Needs --host-memory.",
                     rich_help_panel=_ENGINE),
    ] = None,
    load_prompt: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE",
                     help="A saved session that every client's requests may begin with, such as a system prompt. It "
                     "stays in host memory. Needs --host-memory.", rich_help_panel=_ENGINE),
    ] = None,
    session_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where clients may save sessions; they choose names, never paths. Needs "
                     "--host-memory.", file_okay=False, show_default="nowhere", rich_help_panel=_HTTP),
    ] = None,
    max_saved: Annotated[
        int, typer.Option(metavar="N", min=1, help="Saved sessions of one API key.", rich_help_panel=_HTTP)
    ] = 64,
    layout: Annotated[
        str,
        typer.Option(metavar="NAME", help="auto, per_head, per_layer, group:N or token_major.",
                     rich_help_panel=_ENGINE)
    ] = "auto",
    host: Annotated[
        str,
        typer.Option(metavar="HOST", help="Address to listen on. One that other machines reach needs an API key.",
                     rich_help_panel=_HTTP),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="PORT", min=0, max=65_535, help="Port to listen on; 0 takes any that is free.",
                     rich_help_panel=_HTTP)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="VMEM_KV_API_KEY", show_envvar=True, show_default=False,
                     help="A key that clients must send. Prefer the variable: other users see your command line.",
                     rich_help_panel=_HTTP),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, rich_help_panel=_HTTP,
                     help="Keys, one a line. Clients of different keys never get each other's pages unscrubbed."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST",
                     help="A further name by which clients may call a server on loopback (against DNS rebinding).",
                     rich_help_panel=_HTTP),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Answers that may wait for a slot; more get 429.",
                     rich_help_panel=_HTTP)
    ] = 256,
    max_n: Annotated[int, typer.Option(metavar="N", min=1, help="Answers in one request.", rich_help_panel=_HTTP)] = 8,
    request_timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds for one request, waiting included.",
                     rich_help_panel=_HTTP)
    ] = 600.0,
    send_timeout: Annotated[
        float,
        typer.Option(metavar="S", min=0.1, help="Seconds that a client may stop reading before it is cut off.",
                     rich_help_panel=_HTTP),
    ] = 30.0,
    max_silence: Annotated[
        float,
        typer.Option(metavar="S", min=0.5, help="Seconds without a sign of life from the engine until /ready says 503. "
                     "Above the longest step.", rich_help_panel=_HTTP),
    ] = 10.0,
    grace: Annotated[
        float,
        typer.Option(metavar="S", min=0.1,
                     help="Seconds for unfinished answers after SIGTERM or Ctrl-C; a second one ends at once.",
                     rich_help_panel=_HTTP),
    ] = 30.0,
    log_level: Annotated[
        str,
        typer.Option(metavar="NAME", help="debug, info, warning or error. Logs are JSON on standard error.",
                     rich_help_panel=_HTTP)
    ] = "info",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:  # fmt: skip
    """Serve a model to OpenAI's clients, many requests at once, over demand-mapped memory.

    **Start and ask**

    - `vmem-kv serve`

    - `curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
      -d '{"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "Hello"}]}'`

    - `vmem-kv chat` talks to it; `vmem-kv top` and http://127.0.0.1:8000/dashboard show its memory, live.

    **Endpoints**

    `/v1/chat/completions`, `/v1/completions` (both stream), `/v1/models`, `/v1/sessions`, `/v1/saved_sessions`,
    `/tokenize`, `/detokenize`, `/openapi.json`; `/health` (the process lives), `/ready` (requests are computed),
    `/metrics` (Prometheus), `/dashboard`.

    **Memory**

    Every sequence has a slot: a contiguous range of addresses for --max-len tokens. Physical pages are mapped under it
    as tokens arrive. So --max-len and --max-seqs cost addresses only; --max-memory is what is really spent. Where it
    does not suffice, requests wait, and the youngest ones are computed again later; with --host-memory they are parked
    there instead, and go on where they were.

    **Sessions**

    With --host-memory, requests may name a conversation: `"session_id": "..."`, up to 256 characters, in the body of
    both endpoints. The next request of that name computes only what is new. The name is good for one API key and one
    `cache_salt`. A session that waits blocks nobody: it leaves the device after --session-ttl, or when pages run short,
    for host memory, and that for --disk-folder. `"session_ttl": S` has one leave it earlier, at 0 at once, or up to
    --max-session-ttl later.

    **Saved sessions**

    With --session-folder, `POST /v1/saved_sessions` with `{"name": ..., "session_id": ...}` saves a session there, and
    `POST /v1/saved_sessions/load` with the same fields begins one with it, in a later server too. --load-session does
    that at the start, and --load-prompt lets every request that begins as a saved session begin with its rows.

    **Ending**

    SIGTERM or Ctrl-C: /ready says 503, nothing new is taken on, unfinished answers have --grace seconds. A second
    signal ends at once. The exit status is 0 then, and 1 where the engine itself failed.

    **Examples**

    - `vmem-kv serve ./my-model --dtype bfloat16 --max-memory 4g`

    - `vmem-kv serve --host-memory 8g --disk-memory 50g --disk-folder /var/tmp --session-ttl 120`

    - `VMEM_KV_API_KEY=... vmem-kv serve --host 0.0.0.0 --port 80`
    """
    from vmem_kv.server.auth import Hosts, Keys
    from vmem_kv.server.limits import Limits
    from vmem_kv.server.log import check_level, lossy_stderr
    from vmem_kv.server.preload import Preload
    from vmem_kv.server.run import bind, check_exposure
    from vmem_kv.server.session_folder import SessionFolder

    check_level(log_level)
    keys = Keys(_read_keys(api_key, api_key_file))
    check_exposure(host, bool(keys))
    preload = Preload.of(load_session or (), load_prompt or ())
    preload.check(keys)
    folder = None if session_folder is None else SessionFolder(session_folder, max_saved)
    limits = Limits(request_timeout_s=request_timeout, send_timeout_s=send_timeout, silent_s=max_silence, grace_s=grace)
    listener = bind(host, port)
    engine_options: dict[str, Any] = {
        "max_num_seqs": max_seqs,
        "max_model_len": max_len,
        "max_batch_tokens": max(max_batch_tokens, max_seqs),
        "max_queued": max_queue,
        "max_n": max_n,
        "max_bytes": max_memory,
        "layout": layout,
        "prefix_caching": prefix_cache,
        "prefix_policy": prefix_policy,
        "host_bytes": host_memory,
        "disk_bytes": disk_memory,
        "disk_folder": None if disk_folder is None else str(disk_folder),
        "session_ttl_s": session_ttl,
        "max_session_ttl_s": max_session_ttl,
        **({"page_bytes": _bytes(page_bytes)} if page_bytes else {}),
    }
    name = served_name or (_name_of(model_name) if model_name else "SmolLM2-135M-Instruct")
    with lossy_stderr(), closing(listener):
        from vmem_kv.engine.llm import make_config

        err = Console(file=sys.stderr)
        config = make_config(**{k: v for k, v in engine_options.items() if v is not None})
        model, tokenizer = load_with_bar(err, model_name, dtype.value, "vmem_kv", device, threads)
        from vmem_kv.server.serving import serve_model

        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

        def on_started() -> None:
            err.print(
                f"[bold]{name}[/] is served at {url}/v1; its memory is shown at {url}/dashboard",
                highlight=False,
                soft_wrap=True,
            )

        code = serve_model(
            model, tokenizer, config,
            name=name, limits=limits, keys=keys, hosts=Hosts(host, allowed_host or ()), listener=listener,
            log_level=log_level, folder=folder, preload=preload, on_started=on_started,
        )  # fmt: skip
    raise typer.Exit(code)


def _name_of(model: str) -> str:
    """Return the last part of a folder's, a file's or a hub's name, whole: versions have dots."""
    return os.path.basename(os.path.abspath(model)).removesuffix(".gguf")


def _read_keys(api_key: str | None, file: Path | None) -> list[str]:
    keys = [api_key] if api_key else []
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{file} is no UTF-8 text; write one API key a line") from None
        keys += [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise ConfigError(f"{file} holds no API key; write one a line")
    return keys


def _bytes(text: str) -> int:
    from vmem_kv.units import parse_bytes

    return parse_bytes(text)
