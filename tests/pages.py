"""Pages of documentation whose Python is run: as printed, and with tracebacks that name the page's lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python on a page, each behind as many empty lines as there are lines before it."""
    text = page.read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


def run_block(block: str, page: Path, names: dict[str, Any]) -> None:
    """Run a block with `names` as its globals."""
    exec(compile(block, str(page), "exec"), names)
