"""Where the optional packages are looked for, with packages of the same names that hold the stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.subprocesses import output_of

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
