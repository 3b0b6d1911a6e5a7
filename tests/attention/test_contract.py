"""Specs, binding, calls that do not fit, and which kernel is chosen."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vmem_kv.attention
from tests.core.subprocesses import output_of
from vmem_kv.attention.base import Attend, AttentionSpec, Availability, Kernel
from vmem_kv.attention.choose import all_kernels, choose, explain
from vmem_kv.attention.fa3 import BUILDS, Fa3
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.tensors import SlotKV
from vmem_kv.testing.attention_ops import fa3_with_kvcache

from .harness import MIXES, SPAN, Seq, make_case, spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"n_q_heads": 5}, "5 query heads cannot be shared out among 2"),
        ({"window": 0}, "at least 1 token"),
        ({"window": 3, "is_causal": False}, "causal"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be finite and above 0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"scale": 0.0}, "scale is 0.0; it must be finite and above 0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(spec(), **change)


ASKED = spec(dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4, 64)}, r"query are \(3, 4, 64\); spec and batch say \(2, 4, 64\)"),
        ({"query": torch.zeros(2, 4, 64).half()}, "query are torch.float16 on cpu; .*bound to torch.float32"),
        ({"query": torch.zeros(2, 4, 64, device="meta")}, "on meta"),
        ({"query": torch.zeros(2, 4, 128)[..., ::2]}, "last stride 2"),
        ({"keys": torch.zeros(8 * SPAN, 1, 64)}, "keys are"),
        ({"values": torch.zeros(9 * SPAN, 2, 64)}, "values are"),
        ({"values": torch.zeros(8 * SPAN, 2, 64).double()}, "values are torch.float64"),
        ({"span_tokens": 2 * SPAN}, "K/V slots span 1280 tokens, the batch was built for 640"),
        ({"sinks": torch.zeros(4)}, "sinks were given"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    case = make_case(ASKED, [Seq(2, 5, 1)])
    kv = SlotKV(change.get("keys", case.kv.keys), change.get("values", case.kv.values), change.get("span_tokens", SPAN))
    with pytest.raises(UsageError, match=message):
        Sdpa().bind(ASKED, "cpu")(change.get("query", case.query), kv, case.batch, change.get("sinks"))


def test_sinks_must_be_given_where_the_spec_has_them() -> None:
    asked = replace(ASKED, has_sinks=True)
    case = make_case(asked, [Seq(2, 5, 1)])
    kernel = Sdpa().bind(asked, "cpu")
    with pytest.raises(UsageError, match="not given"):
        kernel(case.query, case.kv, case.batch)
    with pytest.raises(UsageError, match=r"sinks are \(3,\)"):
        kernel(case.query, case.kv, case.batch, torch.zeros(3))


class Fake(Kernel):
    """A kernel that says what it is told to say."""

    def __init__(self, name: str, *, is_available: bool = True, lack: str = "", slack: int = 0) -> None:
        self.name = name  # type: ignore[misc]
        self.has_slack = slack > 0  # type: ignore[misc]
        self._is_available, self._lack, self._slack = is_available, lack, slack

    def availability(self, device: torch.device) -> Availability:
        return Availability(self._is_available, "here" if self._is_available else "not here")

    def lacks(self, spec: AttentionSpec) -> str:
        return self._lack

    def slack_tokens(self, spec: AttentionSpec) -> int:
        return self._slack

    def build(self, spec: AttentionSpec) -> Attend:
        return Sdpa().build(spec)


TOO_MUCH_SLACK = (
    "loads up to 175 tokens behind a sequence, and only 10 will be mapped: map and fill that many and pass"
    " max_slack_tokens=175"
)
FAKES = (
    Fake("gone", is_available=False),
    Fake("lacking", lack="sliding window"),
    Fake("greedy", slack=175),
    Fake("modest"),
    Fake("slow"),
)


def test_auto_takes_the_first_that_can_and_says_why_not_the_others() -> None:
    assert choose("auto", spec(), "cpu", kernels=FAKES).name == "modest"  # nobody said that slack would be mapped
    assert choose("auto", spec(), "cpu", kernels=FAKES, max_slack_tokens=175).name == "greedy"
    assert choose("auto", spec(), "cpu", kernels=FAKES, max_slack_tokens=174).name == "modest"
    verdicts = explain("cpu", spec(), kernels=FAKES, max_slack_tokens=10)
    assert [(v.name, v.is_usable, v.is_chosen, v.slack_tokens, v.why) for v in verdicts] == [
        ("gone", False, False, 0, "not here"),
        ("lacking", False, False, 0, "it has no sliding window"),
        ("greedy", False, False, 0, f"it {TOO_MUCH_SLACK}"),
        ("modest", True, True, 0, "here"),
        ("slow", True, False, 0, "here"),
    ]


def test_without_a_spec_only_the_machine_is_asked() -> None:
    verdicts = explain("cpu", kernels=FAKES)
    assert [(v.name, v.is_usable, v.is_chosen) for v in verdicts[:3]] == [
        ("gone", False, False),
        ("lacking", True, True),
        ("greedy", True, False),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "'gone' cannot run on cpu: not here"),
        ("lacking", "'lacking' has no sliding window"),
        ("greedy", "'greedy' loads up to 175 tokens behind a sequence, and only 10 will be mapped"),
        ("other", "no attention kernel 'other'; choose one of auto, gone, lacking, greedy, modest, slow"),
    ],
)
def test_a_named_kernel_that_cannot_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, spec(), "cpu", kernels=FAKES, max_slack_tokens=10)


def test_where_none_can_all_reasons_are_given() -> None:
    with pytest.raises(ConfigError, match=r"no attention kernel .*gone: not here; lacking: it has no sliding window"):
        choose("auto", spec(), "cpu", kernels=FAKES[:2])


def test_the_slack_of_the_chosen_kernel_is_known() -> None:
    assert choose("greedy", spec(), "cpu", kernels=FAKES, max_slack_tokens=175).slack_tokens == 175
    with pytest.raises(ConfigError, match=r"only 0 will be mapped: .* pass max_slack_tokens=175"):
        choose("greedy", spec(), "cpu", kernels=FAKES)


def test_without_a_spec_auto_takes_no_kernel_that_will_need_slack() -> None:
    verdicts = explain("cpu", kernels=FAKES[2:])
    assert [(v.name, v.is_usable, v.is_chosen) for v in verdicts] == [
        ("greedy", True, False),
        ("modest", True, True),
        ("slow", True, False),
    ]
    assert verdicts[0].why == "here; auto takes it where max_slack_tokens is given"
    assert explain("cpu", kernels=FAKES[2:], max_slack_tokens=200)[0].is_chosen


def test_fa3_is_not_chosen_over_slack_that_nobody_mapped() -> None:
    """What lies behind the sequences is NaN here; an unmapped page on a device."""
    asked = spec(head_dim=128)
    case = make_case(asked, [Seq(1, 100, 0), Seq(1, 600, 1)])
    kernels = (Fa3(fa3_with_kvcache, BUILDS[0]), Sdpa())
    assert kernels[0].bind(asked, "cpu")(*case.arguments).isnan().any()
    kernel = choose("auto", asked, "cpu", kernels=kernels)
    assert (kernel.name, kernel.slack_tokens) == ("sdpa", 0)
    assert kernel(*case.arguments).isfinite().all()
    assert choose("auto", asked, "cpu", kernels=kernels, max_slack_tokens=175).name == "fa3"
    assert [v.is_chosen for v in explain("cpu", kernels=kernels)] == [False, True]


def test_on_the_cpu_auto_is_one_of_its_own_and_the_others_say_what_they_need() -> None:
    assert [kernel.name for kernel in all_kernels()] == ["fa3", "flash_attn", "torch_flash", "native", "sdpa"]
    kernel = choose("auto", spec(dtype=torch.float64, has_sinks=True), "cpu")
    assert (kernel.name, kernel.slack_tokens, kernel.device) == ("sdpa", 0, torch.device("cpu"))
    for verdict in explain("cpu", spec()):
        if verdict.name not in ("native", "sdpa"):
            assert (verdict.is_usable, verdict.why) == (False, "it needs a CUDA device, not cpu")


def test_without_a_cuda_device_every_kernel_says_so() -> None:
    code = """
        import os
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from vmem_kv.attention.choose import explain
        print([(v.name, v.is_usable, "CUDA" in v.why or "cuda" in v.why) for v in explain("cuda")])
        """
    names = ("fa3", "flash_attn", "torch_flash", "native", "sdpa")
    assert output_of(code) == str([(name, False, True) for name in names])


def test_a_batch_on_another_device_is_refused() -> None:
    case = make_case(ASKED, MIXES["mixed"])
    elsewhere = replace(case.batch, query_starts=case.batch.query_starts.to("meta"))
    with pytest.raises(UsageError, match="the batch is on meta, the kernel was bound to cpu"):
        Sdpa().bind(ASKED, "cpu")(case.query, case.kv, elsewhere)


def test_kernels_import_nothing_optional_by_name() -> None:
    allowed = {"torch", "vmem_kv", "__future__", "abc", "collections", "dataclasses", "functools", "importlib"}
    allowed |= {"ctypes", "itertools", "math", "operator", "pathlib", "re", "sys", "typing"}
    for path in Path(vmem_kv.attention.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed, path
