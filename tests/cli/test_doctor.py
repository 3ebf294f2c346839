"""``gradcentral doctor`` finds what is wrong on a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from gradcentral.cli import doctor
from gradcentral.cli.main import app
from gradcentral.kernels import native


def test_facts_contain_the_versions_and_kernels() -> None:
    facts = doctor.describe()
    assert facts["torch"] == torch.__version__
    assert facts["native kernels"].startswith("in use" if not native.unavailable_reason() else "not used")
    assert facts["devices"].startswith("cpu")
    assert "numpy" in facts["libraries"]


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_the_kernels_of_this_machine_pass(device: str) -> None:
    assert doctor.wrong_steps(device) == []


def test_wrong_kernels_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = doctor._steps

    def wrong(kind: Any, placement: str, dtype: torch.dtype, device: str, fused: bool | None) -> list[torch.Tensor]:
        weights = steps(kind, placement, dtype, device, fused)
        return [weight * float("nan") for weight in weights] if fused is None and placement == "update" else weights

    monkeypatch.setattr(doctor, "_steps", wrong)
    lines = doctor.wrong_steps("cpu")
    assert len(lines) == 4
    assert all("placement 'update'" in line and "by nan" in line for line in lines)
    assert app(["doctor"], standalone_mode=False) == 1
    assert "- Report this: the kernels differ" in capsys.readouterr().out


def test_the_reference_path_is_named_as_a_problem_with_its_reason() -> None:
    environment = {**os.environ, "GRADCENTRAL_KERNELS": "reference"}
    run = subprocess.run(
        [sys.executable, "-m", "gradcentral", "doctor"], env=environment, capture_output=True, text=True, check=True
    )
    assert "native kernels     not used: GRADCENTRAL_KERNELS=reference" in run.stdout
    assert "CPU tensors take the slower reference path: GRADCENTRAL_KERNELS=reference." in run.stdout


def test_too_many_threads_are_a_problem_whose_remedy_works() -> None:
    code = "import torch; torch.set_num_threads(torch.get_num_threads() + 999); "
    code += "from gradcentral.cli import doctor; print([p for p in doctor.problems() if 'threads' in p])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"set OMP_NUM_THREADS={doctor._available_cores()}." in run.stdout
    environment = {**os.environ, "OMP_NUM_THREADS": str(doctor._available_cores())}
    code = "from gradcentral.cli import doctor; print([p for p in doctor.problems() if 'threads' in p])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
