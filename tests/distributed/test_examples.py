"""The distributed examples run under torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gradcentral

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 240


def _torchrun(script: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    package = str(Path(gradcentral.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    process = subprocess.Popen(
        [*command, str(script), "--epochs", "3"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun and its children
        output, _ = process.communicate()
        pytest.fail(f"{script.name} has not finished within {LIMIT_S} s:\n{output}", pytrace=False)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("name", ["ddp.py", "fsdp2.py"])
def test_the_example_learns_on_two_processes(name: str) -> None:
    script = EXAMPLES / name
    assert len(script.read_text().splitlines()) < 80
    reached = [float(number) for number in re.findall(r"test accuracy ([\d.]+)", _torchrun(script))]
    assert len(reached) == 3  # only rank 0 prints
    assert reached[-1] > 0.8
