"""Where the optional packages are looked for, with packages of the same names that hold the stand-ins.

And what availability says on machines with other devices, drivers and packages than this one's: all of torch's answers
are planted.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.core.subprocesses import output_of
from vmem_kv.attention import flash_attn
from vmem_kv.attention.cuda_devices import cuda_availability, is_installed
from vmem_kv.attention.fa3 import BUILDS, Fa3
from vmem_kv.attention.flash_attn import FlashAttn
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.attention.torch_flash import TorchFlash

FLASH_ATTN = """
from vmem_kv.testing.attention_ops import flash_attn_varlen_forward as _flash_attn_varlen_forward
from vmem_kv.testing.attention_ops import flash_attn_with_kvcache
"""
FA3 = "from vmem_kv.testing.attention_ops import fa3_with_kvcache as flash_attn_with_kvcache\n"


def run(folder: Path, code: str) -> str:
    """Run `code` where the modules in `folder` are installed; it has `same(kernel)`, to hold one against `sdpa`."""
    prelude = f"""
        import sys
        import torch
        sys.path.insert(0, {str(folder)!r})
        from tests.attention.harness import MIXES, assert_same, make_case, spec
        from vmem_kv.attention.fa3 import Fa3
        from vmem_kv.attention.flash_attn import FlashAttn
        from vmem_kv.attention.sdpa import Sdpa

        def same(kernel):
            asked = spec()
            for mix in ("mixed", "decode of equal lengths"):
                case = make_case(asked, MIXES[mix], slack_tokens=kernel.slack_tokens(asked))
                assert_same(asked, kernel.build(asked)(*case.arguments), Sdpa().build(asked)(*case.arguments))
            return True
        """
    return output_of(prelude + code)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text(FLASH_ATTN)
    (tmp_path / "fa3_fwd_interface.py").write_text(FA3)
    return tmp_path


def test_flash_attn_is_found_by_name(folder: Path) -> None:
    code = """
        same(FlashAttn())
        print(sorted(m for m in sys.modules if m.startswith("flash_attn")))
        """
    assert run(folder, code) == "['flash_attn', 'flash_attn.flash_attn_interface']"


def test_the_fa3_wheel_is_found_by_name_and_has_no_window(folder: Path) -> None:
    code = """
        same(Fa3())
        print([m for m in sys.modules if m.endswith("_interface")], "|", Fa3().lacks(spec(window=8)))
        """
    assert run(folder, code) == "['fa3_fwd_interface'] | sliding window in fa3-fwd"


def test_the_more_complete_build_of_fa3_goes_first(folder: Path) -> None:
    (folder / "flash_attn_interface.py").write_text(FA3)
    code = """
        same(Fa3())
        print([m for m in sys.modules if m.endswith("_interface")], "|", Fa3().lacks(spec(window=8)))
        """
    assert run(folder, code) == "['flash_attn_interface'] |"


def test_optional_packages_are_imported_when_bound_only(folder: Path) -> None:
    """They are there, so importing them would work."""
    code = """
        from vmem_kv.attention.choose import choose, explain
        explain("cpu", spec())
        choose("auto", spec(), "cpu")
        names = {"flash_attn", "flash_attn_interface", "fa3_fwd_interface", "transformers"}
        print(sorted({m.split(".")[0] for m in sys.modules} & names))
        """
    assert run(folder, code) == "[]"


def test_a_build_of_fa3_that_says_what_it_holds_is_believed(folder: Path) -> None:
    (folder / "fa3_fwd_config.py").write_text(
        'CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_LOCAL": False, "FLASHATTENTION_DISABLE_FP16": False,'
        ' "FLASHATTENTION_DISABLE_SOFTCAP": True, "FLASHATTENTION_DISABLE_HDIM256": True}}'
    )
    code = """
        specs = [spec(window=8), spec(dtype=torch.float16), spec(softcap=2.0), spec(head_dim=200), spec(head_dim=192)]
        print([Fa3().lacks(s) for s in specs])
        """
    assert run(folder, code) == str(
        ["", "", "soft capping in fa3-fwd", "head size 200 in fa3-fwd; it takes up to 192", ""]
    )


@pytest.mark.parametrize("text", ["CONFIG = {}", "raise RuntimeError", "CONFIG = {'build_flags': 3}"])
def test_a_build_of_fa3_that_says_it_in_another_way_is_taken_as_usual(folder: Path, text: str) -> None:
    (folder / "fa3_fwd_config.py").write_text(text)
    code = """
        print(Fa3().lacks(spec(window=8)), '|', Fa3().lacks(spec(dtype=torch.float16)))
        """
    assert run(folder, code) == "sliding window in fa3-fwd | torch.float16; use torch.bfloat16"


CUDA = torch.device("cuda:0")


@contextmanager
def machine(
    capability: tuple[int, int] | Exception = (9, 0), *, build: str | None = "13.0", has_device: bool = True
) -> Iterator[None]:
    """Plant what torch says of its build and of the device."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.version, "cuda", build))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=has_device))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_name", return_value="Planted"))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", mock.Mock(side_effect=[capability])))
        yield


@pytest.mark.parametrize(
    ("capability", "is_available", "why"),
    [
        ((8, 9), False, "Planted has compute capability 8.9; it needs at least 9.0 and below 10.0"),
        ((9, 0), True, "Planted, compute capability 9.0"),
        ((9, 9), True, "Planted, compute capability 9.9"),
        ((10, 0), False, "Planted has compute capability 10.0; it needs at least 9.0 and below 10.0"),
        ((12, 0), False, "Planted has compute capability 12.0; it needs at least 9.0 and below 10.0"),
        (AssertionError("Invalid device id"), False, "torch cannot use cuda:0: Invalid device id"),
        (RuntimeError("CUDA unknown error"), False, "torch cannot use cuda:0: CUDA unknown error"),
    ],
)
def test_bounds_of_the_compute_capability(
    capability: tuple[int, int] | Exception, is_available: bool, why: str
) -> None:
    with machine(capability):
        found = cuda_availability(CUDA, least=(9, 0), below=(10, 0))
    assert (found.is_available, found.why) == (is_available, why)


def test_without_an_upper_bound_newer_devices_will_do() -> None:
    with machine((7, 5)):
        found = cuda_availability(CUDA, least=(8, 0))
        assert (found.is_available, found.why) == (False, "Planted has compute capability 7.5; it needs at least 8.0")
    with machine((12, 0)):
        assert cuda_availability(CUDA, least=(8, 0)).is_available


def test_what_a_machine_is_missing() -> None:
    assert cuda_availability(torch.device("cpu"), least=(8, 0)).why == "it needs a CUDA device, not cpu"
    with machine(build=None):
        assert "built without CUDA" in cuda_availability(CUDA, least=(8, 0)).why
    with machine(has_device=False):
        assert "check the driver with nvidia-smi" in cuda_availability(CUDA, least=(8, 0)).why


@pytest.mark.parametrize(("capability", "is_available"), [((7, 9), False), ((8, 0), True), ((12, 0), True)])
@pytest.mark.parametrize("has_flash", [True, False])
def test_torch_flash_needs_ampere_and_a_torch_with_it(
    capability: tuple[int, int], is_available: bool, has_flash: bool
) -> None:
    with (
        machine(capability),
        mock.patch.object(torch.backends.cuda, "is_flash_attention_available", return_value=has_flash),
    ):
        found = TorchFlash().availability(CUDA)
    assert found.is_available == (is_available and has_flash)
    if is_available and not has_flash:
        assert found.why == "this torch was built without FlashAttention"


def test_sdpa_runs_on_every_device_that_torch_can_use() -> None:
    with machine((5, 0)):
        assert Sdpa().availability(CUDA).why == "part of torch, on Planted, compute capability 5.0"
    with machine(AssertionError("Invalid device id")):
        assert Sdpa().availability(torch.device("cuda:7")).why == "torch cannot use cuda:7: Invalid device id"


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Install the modules in `folder`; they are forgotten afterwards."""
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        importlib.invalidate_caches()
        yield


@pytest.mark.parametrize(
    ("version", "is_available", "why"),
    [
        ("2.7.0", True, "flash-attn 2.7.0 on Planted, compute capability 8.0"),
        ("2.7rc1", True, "flash-attn 2.7rc1 on"),
        ("2.10.1", True, "flash-attn 2.10.1 on"),
        ("3", True, "flash-attn 3 on"),
        ("2.8.3+cu13torch2.11", True, "flash-attn 2.8.3"),
        ("2.6.3", False, "flash-attn 2.6.3 is too old: install 2.7 or later"),
        ("2", False, "flash-attn 2 is too old"),
        ("dev", False, "flash-attn says that its version is 'dev': install 2.7 or later"),
        ("", False, "flash-attn says that its version is ''"),
    ],
)
def test_versions_of_flash_attn(folder: Path, version: str, is_available: bool, why: str) -> None:
    with installed(folder), machine((8, 0)), mock.patch.object(flash_attn, "version", return_value=version):
        found = FlashAttn().availability(CUDA)
    assert found.is_available == is_available
    assert found.why.startswith(why)


def test_flash_attn_without_a_version_is_not_available(folder: Path) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    with installed(folder), machine((8, 0)), mock.patch.object(flash_attn, "version", version):
        found = FlashAttn().availability(CUDA)
    assert (found.is_available, found.why[:51]) == (False, "flash_attn cannot be imported: PackageNotFoundError")


def test_without_the_packages_their_names_are_said(tmp_path: Path) -> None:
    with machine((9, 0)):
        assert FlashAttn().availability(CUDA).why == "the package flash-attn is not installed"
    with machine((9, 0)):
        assert Fa3().availability(CUDA).why == "neither flash-attn-3 nor fa3-fwd is installed"


def test_fa3_says_which_build_runs_where(folder: Path) -> None:
    with installed(folder), machine((9, 0)):
        assert Fa3().availability(CUDA).why == "fa3-fwd on Planted, compute capability 9.0"
    with installed(folder), machine((10, 0)):
        assert "below 10.0" in Fa3().availability(CUDA).why


@pytest.mark.parametrize(
    "failure",
    ["raise RuntimeError('operator registered already')", "raise OSError('undefined symbol')", "1 / 0", "import gone"],
)
def test_a_package_that_cannot_be_imported_is_not_available(folder: Path, failure: str) -> None:
    (folder / "flash_attn" / "flash_attn_interface.py").write_text(failure)
    (folder / "fa3_fwd_interface.py").write_text(failure)
    with installed(folder), mock.patch.object(flash_attn, "version", return_value="2.8.3"):
        for kernel, package in ((FlashAttn(), "flash_attn"), (Fa3(), "fa3-fwd")):
            with machine((9, 0)):
                found = kernel.availability(CUDA)
            assert not found.is_available
            assert found.why.startswith(f"{package} cannot be imported: ")
            assert found.why.split(": ")[1] in {"RuntimeError", "OSError", "ZeroDivisionError", "ModuleNotFoundError"}


def test_a_module_put_in_place_by_hand_counts_as_installed() -> None:
    name = BUILDS[0].module
    assert not is_installed(name)
    with mock.patch.dict(sys.modules, {name: types.ModuleType(name)}), machine((9, 0)):
        assert is_installed(name)
        assert "flash-attn-3 cannot be imported: AttributeError" in Fa3().availability(CUDA).why


def test_a_finder_that_fails_finds_nothing() -> None:
    finder = mock.Mock()
    finder.find_spec.side_effect = RuntimeError
    with mock.patch.object(sys, "meta_path", [finder]):
        assert not is_installed("no_such_module")
        assert is_installed("torch"), "what is loaded is there"
