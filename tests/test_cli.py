"""The commands, on a tiny model; once on the real one."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MambaConfig, PreTrainedConfig
from typer.testing import CliRunner, Result

import vmem_kv
from tests.core.subprocesses import output_of, run_python
from vmem_kv.cli import doctor as doctor_module
from vmem_kv.cli import memory_trace
from vmem_kv.cli.app import app
from vmem_kv.cli.comparison import Job, n_common_tokens
from vmem_kv.cli.memory_trace import Memory, Trace
from vmem_kv.errors import ConfigError, VmemError

PROMPT = "the sky is blue because"


def run(*arguments: str | Path, text: str | None = None, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text, env={"COLUMNS": "120"}, **options)


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_help_teaches_with_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "vmem-kv doctor" in result.stdout
    result = run("generate", "--help")
    assert "--compare --plot memory.png" in result.stdout
    for option in ("--prompt", "--file", "--max-memory", "--page-bytes", "--dtype", "--attention", "--json"):
        assert option in result.stdout


def test_version_is_that_of_the_package() -> None:
    assert vmem_kv.__version__ in run("--version").stdout


def test_generate_streams_the_text_and_prints_the_table(tiny_model_folder: Path) -> None:
    result = run("generate", tiny_model_folder, "--prompt", PROMPT, "--max-new-tokens", "12")
    assert result.exit_code == 0, result.output
    text, _, table = result.stdout.partition("12 new")
    assert len(text.split()) >= 12
    assert "vmem_kv" in table
    assert "DynamicCache" not in table
    assert "Layout: " in table


def test_compare_shows_the_same_tokens_and_the_memory_of_all_three(tiny_model_folder: Path) -> None:
    data = run_json("generate", tiny_model_folder, "-p", PROMPT, "-n", "40", "--compare", "--page-bytes", "4k")
    ours, dynamic, static = data["caches"]
    assert [c["cache"] for c in data["caches"]] == ["vmem_kv", "DynamicCache", "StaticCache(128)"]
    assert all(c["same_tokens"] for c in data["caches"])
    # Two layers of K and V, two heads of 8 floats; the last token is not in the cache.
    token_bytes = 2 * 2 * 2 * 8 * 4
    n_tokens = data["n_prompt_tokens"] + data["n_new_tokens"] - 1
    assert {c["live_bytes"] for c in data["caches"]} == {n_tokens * token_bytes}
    assert dynamic["peak_physical_bytes"] == n_tokens * token_bytes
    assert static["peak_physical_bytes"] == static["virtual_bytes"] == 128 * token_bytes
    assert ours["live_bytes"] <= ours["peak_physical_bytes"] <= ours["live_bytes"] + 8 * 4096
    assert ours["virtual_bytes"] > static["virtual_bytes"]


def test_sampling_repeats_with_the_same_seed_and_differs_with_another(tiny_model_folder: Path) -> None:
    def sample(seed: int) -> str:
        options = ("-p", PROMPT, "-n", "30", "--temperature", "5", "--seed", str(seed))
        return str(run_json("generate", tiny_model_folder, *options)["text"])

    assert sample(1) == sample(1) != sample(2)


def test_a_prompt_may_come_from_a_file_or_from_standard_input(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    from_file = run("generate", tiny_model_folder, "--file", tmp_path / "prompt.txt", "-n", "5", "--json")
    from_stdin = run("generate", tiny_model_folder, "-n", "5", "--json", text=PROMPT)
    assert json.loads(from_file.stdout)["text"] == json.loads(from_stdin.stdout)["text"]


def test_new_tokens_stop_at_the_models_context(tiny_model_folder: Path) -> None:
    data = run_json("generate", tiny_model_folder, "-p", PROMPT, "-n", "1000")
    assert data["n_prompt_tokens"] + data["n_new_tokens"] <= 128


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["vmem_kv", "sdpa", "eager"])
def test_every_dtype_and_attention_writes_the_tokens_of_dynamic_cache(
    tiny_model_folder: Path, dtype: str, attention: str
) -> None:
    options = ("--dtype", dtype, "--attention", attention, "--compare")
    data = run_json("generate", tiny_model_folder, "-p", PROMPT, "-n", "20", *options)
    assert data["caches"][1]["cache"] == "DynamicCache"
    assert data["caches"][1]["same_tokens"]


def test_plot_draws_all_three(tiny_model_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    result = run("generate", tiny_model_folder, "-p", PROMPT, "-n", "8", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "StaticCache" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x", "--page-bytes", "5000"], "multiple of 4096"),
        (["-p", "x", "--page-bytes", "many"], "is not a size in bytes"),
        (["-p", "x", "--layout", "diagonal"], "'diagonal'; choose auto, per_head"),
        (["-p", "x", "--max-memory", "4k"], "--max-memory"),
        (["-p", "x", "--plot", "picture.docx"], "must end with .png"),
        (["-p", "x", "--plot", "no/such/folder/picture.png"], "there is no folder"),
        (["-p", "x", "--plot", "/proc/picture.png"], "cannot be written"),
        (["-p", " "], "the prompt is empty"),
        (["-p", "sky " * 200], "the model's context is 128"),
    ],
)
def test_an_error_is_one_line_that_names_the_remedy(
    tiny_model_folder: Path, arguments: list[str], message: str
) -> None:
    result = run("generate", tiny_model_folder, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_plot_that_is_a_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    result = run("generate", "./nowhere", "-p", "x", "--plot", tmp_path / "folder.png")
    assert result.exit_code == 1
    assert "it cannot be written: Is a directory" in result.stderr


def test_checking_where_the_plot_goes_leaves_nothing(tmp_path: Path) -> None:
    result = run("generate", "./nowhere", "-p", "x", "--plot", tmp_path / "picture.png")
    assert "there is no folder nowhere" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "what"), [("gpu", "choose cpu, cuda or cuda:N"), ("meta", "there is no driver for meta")]
)
def test_a_device_that_cannot_be_is_refused_before_the_model_is_loaded(device: str, what: str) -> None:
    result = run("generate", "no-such-model", "-p", PROMPT, "--device", device)
    assert result.exit_code == 1
    assert what in " ".join(result.stderr.split())


def test_cuda_is_refused_where_torch_was_built_without_it() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch was built with CUDA")
    result = run("generate", "no-such-model", "-p", PROMPT, "--device", "cuda")
    assert result.exit_code == 1
    assert "was built without CUDA" in " ".join(result.stderr.split())


def test_a_layout_that_cannot_be_is_refused_before_the_model_is_loaded() -> None:
    result = run("generate", "./nowhere", "-p", "x", "--layout", "nonsense")
    assert result.exit_code == 1
    assert "'nonsense'" in result.stderr


def test_an_error_that_nobody_foresaw_is_one_line_as_well(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LookupError("nobody\nforesaw this")

    monkeypatch.setattr(Job, "run_vmem", fail)
    arguments = ("generate", tiny_model_folder, "-p", PROMPT)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr == "error: LookupError: nobody foresaw this (--debug shows where)\n"
    with pytest.raises(LookupError):
        run(*arguments, "--debug", catch_exceptions=False)


def test_no_standard_input_at_all_is_no_prompt(tiny_model_folder: Path) -> None:
    command = f"exec {shlex.quote(sys.executable)} -c 'from vmem_kv.cli import main; main()' generate <&-"
    done = subprocess.run(["sh", "-c", f"{command} {tiny_model_folder}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no prompt")
    assert done.stderr.count("\n") == 1


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
OTHER_MODELS: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(**SIZES, state_size=4),
    "gemma2": Gemma2Config(**SIZES, **HEADS, max_position_embeddings=128),
    "gpt_oss": GptOssConfig(
        **SIZES, **HEADS, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=128, rope_parameters=None
    ),
}


def folder_of(name: str, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A random model of this kind, the same at every run, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHER_MODELS[name]).save_pretrained(tmp_path)
    for path in tiny_model_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_model_without_keys_and_values_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    result = run("generate", folder_of("mamba", tiny_model_folder, tmp_path), "-p", PROMPT, "-n", "4")
    assert result.exit_code == 1
    assert "a model of type mamba keeps no K and V" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("name", "what"), [("gemma2", "soft capping"), ("gpt_oss", "attention sinks")])
def test_a_model_that_needs_more_than_our_attention_gets_eager(
    tiny_model_folder: Path, tmp_path: Path, name: str, what: str
) -> None:
    folder = folder_of(name, tiny_model_folder, tmp_path)
    result = run("generate", folder, "-p", PROMPT, "-n", "4", "--compare", "--json")
    assert result.exit_code == 0, result.output
    assert f"has no {what}, which this model needs; using --attention eager" in result.stderr
    data = json.loads(result.stdout)
    assert data["attention"] == "eager"
    assert data["caches"][1]["same_tokens"]
    asked = run("generate", folder, "-p", PROMPT, "-n", "4", "--attention", "vmem_kv")
    assert asked.exit_code == 1
    assert "use --attention eager" in asked.stderr
    if name == "gpt_oss":  # transformers itself refuses, in its own words
        asked = run("generate", folder, "-p", PROMPT, "-n", "4", "--attention", "sdpa")
        assert asked.exit_code == 1
        assert "--attention eager" in asked.stderr


def test_the_table_says_what_is_not_counted_of_dynamic_cache(tiny_model_folder: Path) -> None:
    arguments = ("generate", tiny_model_folder, "-p", PROMPT, "-n", "4")
    assert "Not counted" in run(*arguments, "--compare").stdout
    assert "Not counted" not in run(*arguments).stdout


def test_debug_shows_the_error_itself() -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        run("generate", "./nowhere", "-p", "x", "--debug", catch_exceptions=False)


def test_a_prompt_and_a_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    result = run("generate", "-p", "x", "-f", tmp_path / "prompt.txt")
    assert result.exit_code == 1
    assert "not both" in result.stderr


def test_a_static_cache_that_memory_does_not_hold_is_left_out(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmem_kv.cli import comparison

    class SmallMachine:
        usable_memory_bytes = 10_000

    monkeypatch.setattr(comparison, "describe_machine", SmallMachine)
    result = run("generate", tiny_model_folder, "-p", PROMPT, "-n", "8", "--compare")
    assert result.exit_code == 0, result.output
    assert "StaticCache(128) was left out" in result.stdout


def test_times_leave_out_what_sampling_and_printing_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # every reading takes a second
    monkeypatch.setattr(memory_trace.time, "perf_counter", lambda: float(next(clock)))

    class SlowFollower:
        def put(self, value: torch.Tensor) -> None:
            for _ in range(100):
                next(clock)

    def sample() -> Memory:
        for _ in range(100):
            next(clock)
        return Memory(0, 0, 0)

    trace = Trace("any")
    recorder = memory_trace._Recorder(trace, sample, SlowFollower())
    for token in ([[5, 6, 7]], [1], [2], [3]):
        recorder.put(torch.tensor(token))
    assert trace.token_ids == [1, 2, 3]
    assert trace.first_token_s == 2  # prompt handling and the first step
    assert trace.decode_s == 2
    assert trace.decode_tokens_per_s == 1
    assert len(trace.memory) == 3


def test_common_tokens_are_counted_up_to_the_first_difference() -> None:
    assert n_common_tokens(Trace("a", [1, 2, 3]), Trace("b", [1, 2, 4])) == 2
    assert n_common_tokens(Trace("a", [1, 2]), Trace("b", [1, 2, 4])) == 2


def test_doctor_names_each_limit_and_the_value_to_change() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for word in ("native part", "granularity", "vm.max_map_count", "cgroup", "file size", "hugetlbfs", "torch"):
        assert word in result.stdout


def test_doctor_as_json_carries_the_machine_and_the_driver() -> None:
    data = run_json("doctor")
    assert data["drivers"]["host"]["info"]["device"] == "cpu"
    assert data["machine"]["os_page_bytes"] >= 4096
    assert data["packages"]["torch"]
    assert {finding["topic"] for finding in data["findings"]} >= {"Driver", "Memory", "Limits", "Software"}


def test_doctor_says_why_the_native_part_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("it was not built")

    monkeypatch.setattr(doctor_module, "NativeMapper", missing)
    result = run("doctor")
    assert result.exit_code == 0
    assert "it was not built" in result.stdout
    assert "install a C compiler" in result.stdout


def doctor_in_a_process_of_its_own(prelude: str = "") -> str:
    code = f"""
        {prelude}
        import os, sys
        os.environ["COLUMNS"] = "200"
        sys.argv = ["vmem-kv", "doctor"]
        from vmem_kv.cli import main
        main()
        """
    return " ".join(output_of(code).split())


def test_ctrl_c_while_modules_load_is_no_traceback() -> None:
    done = run_python(
        """
        import builtins, sys
        load = builtins.__import__
        def interrupted(name, *args):
            if name == "vmem_kv.cli.app":
                raise KeyboardInterrupt
            return load(name, *args)
        builtins.__import__ = interrupted
        from vmem_kv.cli import main
        main()
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_doctor_says_why_cuda_is_not_available_and_what_would_be_needed() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch was built with CUDA")
    text = doctor_in_a_process_of_its_own()
    assert "no NVIDIA driver: libcuda.so.1 was not found change: install the driver on a machine with an NVIDIA" in text
    assert "built without CUDA change: for a GPU, install a build of torch with CUDA" in text
    assert re.search(r"-- torch_flash on cpu it needs a CUDA device", text)
    assert re.search(r"ok native on cpu .* \(taken by auto\)", text)


def test_doctor_describes_the_devices_that_there_are() -> None:
    prelude = "from vmem_kv.testing.emulator import load_emulator; load_emulator()"
    text = doctor_in_a_process_of_its_own(prelude)
    assert "ok NVIDIA driver CUDA 13.0" in text
    assert "ok cuda:0 Emulated device 0, 2.00 GiB" in text
    assert "!! cache on cuda:0 " in text  # torch has no CUDA here
    prelude += ".support_virtual_memory(False)"
    assert "!! cuda:0 Emulated device 0, 2.00 GiB, no virtual memory" in doctor_in_a_process_of_its_own(prelude)


def test_doctor_exits_with_1_where_no_driver_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise VmemError("memory files are forbidden here")

    monkeypatch.setattr(doctor_module, "HostDriver", refused)
    result = run("doctor")
    assert result.exit_code == 1
    assert "memory files are forbidden here" in result.stdout


@pytest.mark.real_model
@pytest.mark.timeout(600)  # the first time on a machine, it converts
def test_the_real_model_answers_over_demand_mapped_memory() -> None:
    data = run_json("generate", "-p", "What is the capital of France?", "-n", "24", "--compare")
    assert "Paris" in data["text"]
    assert all(cache["same_tokens"] for cache in data["caches"])
    ours, dynamic, static = data["caches"]
    assert dynamic["live_bytes"] == ours["live_bytes"] <= ours["peak_physical_bytes"]
    assert ours["peak_physical_bytes"] < static["peak_physical_bytes"] / 50


def test_generated_text_keeps_brackets_and_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from vmem_kv.cli.report import _ConsoleStreamer

    streamer = _ConsoleStreamer.__new__(_ConsoleStreamer)
    streamer._console = Console()
    streamer.on_finalized_text("a [bold]b[/] :smile: ")
    streamer.on_finalized_text("x" * 200, stream_end=True)
    assert re.fullmatch(r"a \[bold\]b\[/\] :smile: x{200}\n", capsys.readouterr().out)
