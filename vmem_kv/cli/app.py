"""The application: which commands there are, and how an error looks to who typed one."""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

import vmem_kv
from vmem_kv.cli.chat import chat
from vmem_kv.cli.doctor import doctor
from vmem_kv.cli.frag import frag
from vmem_kv.cli.generate import generate
from vmem_kv.cli.replay import replay
from vmem_kv.cli.serve import serve
from vmem_kv.cli.stress import stress
from vmem_kv.cli.top import top
from vmem_kv.errors import VmemError

P = ParamSpec("P")

EXTRA_OF_PACKAGE = {
    "accelerate": "hf",
    "fastapi": "serve",
    "gguf": "hf",
    "httpx": "serve",
    "matplotlib": "cli",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "safetensors": "hf",
    "transformers": "hf",
    "uvicorn": "serve",
}

OPTION_OF_SETTING = (
    (r"\bmax_bytes\b", "--max-memory"),
    (r"\bpage_bytes\b", "--page-bytes"),
    (r"\bmax_model_len\b", "--max-len"),
    (r"\bhost_bytes\b", "--host-memory"),
    (r"\bdisk_bytes\b", "--disk-memory"),
    (r"\bdisk_folder\b", "--disk-folder"),
    (r"\bsession_ttl_s\b", "--session-ttl"),
    (r"\bmax_session_ttl_s\b", "--max-session-ttl"),
    (r"\battn_implementation=['\"](\w+)['\"]", r"--attention \1"),
)
"""How settings are called in Python, as patterns, and by those who type a command."""

app = typer.Typer(
    name="vmem-kv",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "KV caches that are contiguous in virtual memory, with physical pages mapped as the tokens arrive.\n\n"
        "Start with `vmem-kv generate --prompt 'Why is the sky blue?' --compare`, and ask "
        "`vmem-kv doctor` what this machine offers. `vmem-kv serve` serves a model to OpenAI's clients."
    ),
)


def explain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with one line instead of a traceback, unless its option `debug` is set.

    Our own errors name the remedy. Of any other the line gives the type, and how to see where it comes from.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            is_broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE  # typer knows how to end then
            if kwargs.get("debug") or is_broken_pipe:
                raise
            Console(stderr=True).print(
                f"[bold red]error:[/] {escape(_one_line(error))}", highlight=False, soft_wrap=True
            )
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 1) from None

    return run


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRA_OF_PACKAGE.get(error.name or "", "cli,hf")
        return f"{error}; run pip install 'vmem_kv[{extra}]'"
    text = " ".join(str(error).split())
    if isinstance(error, VmemError):
        for setting, option in OPTION_OF_SETTING:
            text = re.sub(setting, option, text)
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().print(f"vmem_kv {vmem_kv.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself; the help text is the application's."""


app.command()(explain_errors(generate))
app.command()(explain_errors(serve))
app.command()(explain_errors(chat))
app.command()(explain_errors(top))
app.command()(explain_errors(doctor))
app.command()(explain_errors(replay))
app.command()(explain_errors(frag))
app.command()(explain_errors(stress))
