"""Runs the script of a page in docs/integrations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[2] / "docs" / "integrations"
LONGEST = 40
"""Lines of a script, so that a page shows what to type and nothing else."""


def run_page(name: str) -> dict[str, Any]:
    """Execute the Python blocks of a page in order, in one namespace, and return the namespace.

    Args:
        name: the page's name without ``.md``.
    """
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks, f"docs/integrations/{name}.md has no Python block"
    namespace: dict[str, Any] = {"__name__": name}
    for position, block in enumerate(blocks):
        assert block.count("\n") <= LONGEST, f"block {position} has more than {LONGEST} lines"
        exec(compile(block, f"docs/integrations/{name}.md, block {position}", "exec"), namespace)
    return namespace
