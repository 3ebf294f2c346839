"""ThreadSanitizer finds no data race between two threads that run the C kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import gradcentral.kernels

C = Path(gradcentral.kernels.__file__).with_name("c")
CLANG = shutil.which("clang")


@pytest.mark.skipif(CLANG is None, reason="needs clang and its OpenMP runtime: apt install clang libomp-dev")
def test_two_threads_do_not_race(tmp_path: Path) -> None:
    program = tmp_path / "races"
    # GCC's OpenMP runtime cannot tell the sanitizer about its barriers; clang's does, through the library Archer.
    flags = ["-O1", "-g", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fsanitize=thread", f"-I{C}"]
    source = Path(__file__).with_name("races.c")
    built = subprocess.run([str(CLANG), *flags, source, "-o", program, "-lm"], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(
            f"clang cannot build with OpenMP and ThreadSanitizer (apt install libomp-dev): {built.stderr[-200:]}"
        )
    environment = os.environ | {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1", "OMP_TOOL_VERBOSE_INIT": "stdout"}
    found = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=250)
    if "Tool was started and is using the OMPT interface" not in found.stdout:
        pytest.skip("clang's OpenMP runtime has not loaded Archer (apt install libomp-dev)")
    assert "ThreadSanitizer" not in found.stderr, found.stderr[:3000]
    assert found.returncode == 0
    assert "finished" in found.stdout
