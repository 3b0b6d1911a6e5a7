"""`vmem-kv generate`: write text with a model, and show what its KV cache took."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vmem_kv.config import CacheConfig
from vmem_kv.errors import ConfigError
from vmem_kv.units import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vmem_kv.cli.comparison import Job
    from vmem_kv.cli.memory_trace import Trace


class Dtype(StrEnum):
    """Number formats of weights and cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Attention(StrEnum):
    """Attention functions that need no other package."""

    VMEM_KV = "vmem_kv"
    SDPA = "sdpa"
    EAGER = "eager"


def generate(
    model_name: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a GGUF file, or a name on the Hugging Face hub.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.", exists=True, dir_okay=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run transformers' DynamicCache and StaticCache as well.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory over time for the three caches (PNG, SVG or PDF).")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of weights and cache.")] = Dtype.FLOAT32,
    attention: Annotated[
        Attention | None,
        typer.Option(
            help="Attention function, the same for all caches.",
            show_default="vmem_kv, or eager for a model that needs what vmem_kv lacks",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where model and cache live: cpu, cuda or cuda:N; see `vmem-kv doctor`.")
    ] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that torch computes with.", show_default="torch's choice")
    ] = None,
    page_bytes: Annotated[
        str | None, typer.Option(help="Unit of physical memory, such as 64k.", show_default="by the layout")
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, per_head, per_layer, group:N or token_major.")] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(help="Budget of physical memory for the cache, such as 2g.", show_default="90 % of what is free"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write text with a language model whose KV cache lives in demand-mapped memory.

    The prompt comes from --prompt, from --file or from standard input. The text is streamed; then a table says how
    fast it came and what memory the cache took: addresses reserved, physical memory at its peak, and the bytes that
    the tokens needed in the end.

    Try one of these:

    - `vmem-kv generate --prompt "Why is the sky blue?"`

    - `vmem-kv generate --prompt "Why is the sky blue?" --compare --plot memory.png`

    - `vmem-kv generate --file notes.txt --dtype bfloat16 --max-new-tokens 500`

    - `echo "Once upon a time" | vmem-kv generate --raw --temperature 0.8 --seed 7`

    - `vmem-kv generate ./my-model --prompt "Hello" --page-bytes 64k --max-memory 1g`
    """
    out, err = Console(), Console(file=sys.stderr)
    text = _read_prompt(prompt, file)
    if plot:
        _check_plot(plot)
    cache_options: dict[str, Any] = {"layout": layout}
    if page_bytes:
        cache_options["page_bytes"] = parse_bytes(page_bytes)
    if max_memory:
        cache_options["max_bytes"] = parse_bytes(max_memory)
    CacheConfig(**cache_options)  # refuses before a model is loaded what no model can make right

    model, tokenizer = load_with_bar(
        err, model_name, dtype.value, (attention or Attention.VMEM_KV).value, device, threads
    )
    from vmem_kv.cli import comparison, report  # they need torch, which took its time in load_with_bar

    inputs = {name: tensor.to(model.device) for name, tensor in _encode(tokenizer, text, raw).items()}
    n_prompt = inputs["input_ids"].shape[1]
    n_max = _max_new_tokens(model, n_prompt, max_new_tokens)
    job = comparison.Job(
        model=model,
        inputs=inputs,
        seed=seed,
        cache_options={**cache_options, "expected_tokens": n_prompt + n_max},
        generate_options=_generate_options(n_max, temperature),
    )
    follower = None if as_json else report.console_streamer(out, tokenizer)
    job.check_model()
    used_attention = _warm_up(err, job, attention)
    traces = [job.run_vmem(follower)]
    skipped: list[str] = []
    if compare or plot:
        traces += _run_others(err, job, traces[0], skipped)
    facts = {
        "model": model_name or "SmolLM2-135M-Instruct",
        "dtype": dtype.value,
        "attention": used_attention.value,
        "n_prompt_tokens": n_prompt,
    }
    if as_json:
        out.print_json(data=report.as_data(traces, skipped, facts, tokenizer))
    else:
        report.print_report(out, traces, skipped, facts)
    if plot:
        from vmem_kv.cli.plot import draw_memory

        draw_memory(plot, traces, n_prompt)
        err.print(f"Memory over time is drawn in {plot}", highlight=False)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ConfigError("give --prompt or --file, not both")
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()):
        raise ConfigError("there is no prompt: give --prompt TEXT or --file FILE, or pipe it in")
    try:
        text = prompt if prompt is not None else file.read_text("utf-8") if file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompt: {error}") from error
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot is {path}; its name must end with .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot is {path}; there is no folder {path.absolute().parent}")
    # Only the attempt tells: what access(2) says of a folder such as /proc is not what open(2) does.
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--plot is {path}; it cannot be written: {error.strerror}") from error


def load_with_bar(
    err: Console, name: str | None, dtype: str, attention: str, device: str, threads: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load torch, transformers and the model, with a bar that knows the phases of a conversion."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("Loading torch and transformers", total=None)
        import torch

        from vmem_kv import models

        if threads:
            torch.set_num_threads(threads)
        place = _check_device(device)

        def report(phase: int) -> None:
            n_phases = len(models.CONVERSION_PHASES)
            what = models.CONVERSION_PHASES[phase] if phase < n_phases else "Loading the model"
            text = f"{what} (once; the result is kept)" if phase < n_phases else what
            progress.update(task, description=text, completed=phase, total=n_phases)
            if not err.is_terminal:
                err.print(text, highlight=False)

        progress.update(task, description="Loading the model")
        return models.load(name, dtype=dtype, attention=attention, device=place, report=report)


def _check_device(name: str) -> str:
    """Refuse, before a model is loaded, a device that no cache can be on; return its full name."""
    import torch

    from vmem_kv.devices import open_driver

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}; choose cpu, cuda or cuda:N") from error
    driver = open_driver(device, CacheConfig())
    driver.close()
    return driver.info.device


def _warm_up(err: Console, job: Job, attention: Attention | None) -> Attention:
    """Run the model once; return the attention function that it runs with.

    Where none was asked for and ours lacks what the model needs, that is transformers' `eager`, which has it all.
    """
    try:
        job.warm_up()
    except ConfigError as error:
        if attention is not None:
            raise
        reason = str(error).partition(";")[0]
        err.print(f"note: {reason}; using --attention eager", highlight=False, markup=False, soft_wrap=True)
        job.model.set_attn_implementation(Attention.EAGER.value)
        job.warm_up()
        return Attention.EAGER
    return attention or Attention.VMEM_KV


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool) -> dict[str, Any]:
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _max_new_tokens(model: PreTrainedModel, n_prompt: int, wanted: int) -> int:
    """Cut `wanted` such that the model's own context holds everything."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not context:
        return wanted
    if n_prompt >= context:
        raise ConfigError(f"the prompt has {n_prompt:,} tokens; the model's context is {context:,}")
    return min(wanted, int(context) - n_prompt)


def _generate_options(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    if temperature > 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature}
    # Sampling parameters of a model's own configuration would be complained about.
    sampling = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
    return {"max_new_tokens": max_new_tokens, "do_sample": False, **sampling}


def _run_others(err: Console, job: Job, ours: Trace, skipped: list[str]) -> list[Trace]:
    """Run the stock caches behind a bar; say in `skipped` why one was left out."""
    from vmem_kv.cli.report import ProgressStreamer

    kinds = job.other_kinds(ours, skipped)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    traces = []
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        for kind in kinds:
            task = progress.add_task(f"The same with {kind.name}", total=len(ours.token_ids))
            traces.append(job.run(kind, ProgressStreamer(progress, task)))
    return traces
