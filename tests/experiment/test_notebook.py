"""A task is defined and compared in a notebook, with a progress bar and the report below the cell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.experiment.conftest import make_task

from gradcentral.experiment import compare

CELLS = (
    """
import torch
from torch.utils.data import TensorDataset
import gradcentral
from gradcentral.experiment import Task

x = torch.linspace(0, 1, 40)[:, None] * torch.ones(3)

def model():
    return torch.nn.Linear(3, 2)

task = Task(
    name="line", model=model, train=TensorDataset(x[:20], x[:20, :2]), test=TensorDataset(x[20:], x[20:, :2]),
    loss=torch.nn.functional.mse_loss, metric=torch.nn.functional.l1_loss, higher_is_better=False, epochs=2,
    optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.1)},
)
""",
    "comparison = gradcentral.compare(task, seeds=2, arms=['none', 'gradient'], jobs=JOBS)\ncomparison",
    "print(comparison)",
)


def _run_notebook(folder: Path, jobs: int) -> tuple[list[Any], list[Any]]:
    """Return the outputs of the last two cells."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel: pip install 'gradcentral[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install 'gradcentral[dev]'")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: pip install 'gradcentral[dev]'")
    cells = [nbformat.v4.new_code_cell(cell.replace("JOBS", str(jobs))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, timeout=200).execute()
    return notebook.cells[-2].outputs, notebook.cells[-1].outputs


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.filterwarnings("ignore:Proactor event loop:RuntimeWarning")
def test_a_task_of_a_notebook_is_compared_there(tmp_path: Path, jobs: int) -> None:
    outputs, printed = _run_notebook(tmp_path, jobs)
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)  # the progress bars
    report = next(data["text/html"] for data in shown if "text/html" in data and "<iframe" in data["text/html"])
    assert "no clear change" in report or "helps" in report or "hurts" in report
    assert (tmp_path / "runs" / "line" / "report.html").exists()
    assert [output.output_type for output in printed] == ["stream"]  # text, and nothing displayed beside it
    assert "line, sgd: mean ± std of 2 runs" in printed[0].text


def test_the_report_is_shown_in_a_frame_of_its_own(tmp_path: Path) -> None:
    result = compare(make_task(), seeds=2, epochs=1, jobs=1, out=tmp_path, progress=False)
    page = result._repr_html_()
    assert re.match('<iframe title="[^"<>]*" srcdoc="&lt;!', page)
    assert page.count('"') == 6  # the attributes' own: the report cannot end them
