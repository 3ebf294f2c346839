"""The reasons why the Triton kernels cannot be used, and their remedies. No GPU is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradcentral.kernels import triton

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def reason_in(**environment: str) -> str:
    """Return the reason in a new process with these environment variables."""
    code = "from gradcentral.kernels import triton; print(triton._static_reason())"
    clean = {
        name: value for name, value in os.environ.items() if name not in ("GRADCENTRAL_KERNELS", "TRITON_INTERPRET")
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra triton")
def test_remedies_for_the_interpreter_without_selecting_triton() -> None:
    """The message offers two remedies; each of them works."""
    reason = reason_in(TRITON_INTERPRET="1")
    assert "unset it" in reason
    assert reason_in() == ""
    name, value = re.findall(r"set (\w+)=(\w+) too", reason)[0]
    assert reason_in(TRITON_INTERPRET="1", **{name: value}) == ""


def test_remedies_that_install_triton_are_what_the_extra_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_choice", "INTERPRETED"):
        monkeypatch.setattr(triton, name, "")
    specs: dict[str, Any] = {"found": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs["found"])
    extra = re.findall(r"pip install gradcentral\[(\w+)\]", triton._static_reason())[0]
    specs["found"] = "triton"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.3.1")
    requirement = re.findall(r"pip install '(.*?)'", triton._static_reason())[0]
    assert f'\n{extra} = ["{requirement};' in PYPROJECT.read_text()
