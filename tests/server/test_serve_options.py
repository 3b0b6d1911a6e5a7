"""What `vmem-kv serve` makes of its arguments, and how it explains them."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from vmem_kv.cli.app import app
from vmem_kv.cli.serve import _name_of

from .test_commands import run


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("./Tiny-1.7B-Instruct", "Tiny-1.7B-Instruct"),
        ("models/v1.2/", "v1.2"),
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("models/tiny-1.7b.Q4_K_M.gguf", "tiny-1.7b.Q4_K_M"),
        (".", "here-0.5B"),
        ("..", "above"),
        ("./link-1.0", "link-1.0"),
    ],
)
def test_a_model_is_called_by_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    here = tmp_path / "above" / "here-0.5B"
    here.mkdir(parents=True)
    (here / "link-1.0").symlink_to("Tiny")
    monkeypatch.chdir(here)
    assert _name_of(model) == name


def test_no_options_name_is_cut_in_a_narrow_terminal() -> None:
    # Typer takes the width for rich from the environment that its module found.
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    names = [name for option in command.params for name in (*option.opts, *option.secondary_opts) if name[:2] == "--"]
    assert len(names) > 20
    assert [name for name in names if f"{name} " not in text] == []


def test_a_key_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xff\xfebad")
    result = run("serve", "./nowhere", "--api-key-file", str(tmp_path / "keys"))
    assert result.exit_code == 1
    assert "is no UTF-8 text" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "4k", "--page-bytes", "64k"], "less than one page of 64.00 KiB"),
        (["--max-len", "1000"], "--max-len is 1000"),
    ],
)
def test_a_reason_is_told_once_in_the_options_words(
    tiny_model_folder: Path, arguments: list[str], message: str
) -> None:
    result = run("serve", str(tiny_model_folder), "--port", "0", *arguments)
    assert result.exit_code == 1
    assert result.stderr.count(message) == 1
