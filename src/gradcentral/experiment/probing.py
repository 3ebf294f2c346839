"""`gradcentral.probe` on a fresh model and the batches of a task. A comparison stores the result."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.diagnostics.input_means import InputMean
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.diagnostics.probe_report import LayerReport, ProbeReport
from gradcentral.diagnostics.probing import DEFAULT_BATCHES, probe
from gradcentral.experiment.data import epochs_of
from gradcentral.experiment.determinism import derive, seed_everything
from gradcentral.experiment.errors import naming
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.experiment.task import Task
from gradcentral.experiment.training import amp_dtype, fresh_model
from gradcentral.weight_vectors import WeightVectors

__all__ = ["probe_task", "read_probe", "write_probe"]


def probe_task(
    task: Task, *, seed: int = 0, batches: int = DEFAULT_BATCHES, device: str = "cpu", amp: bool = False
) -> ProbeReport:
    """Measure the effect that GC would have on the task's fresh model, on the first batches of a run of this seed.

    ``amp`` uses bfloat16 if the device supports it. float16 would need loss scaling, so full precision is used instead.
    A `TaskError` names the line of the task's code that raised an exception.

    Examples:
        >>> from gradcentral.experiment import load_task
        >>> probe_task(load_task("digits")).layers[0].name
        '0.weight'
    """
    with preserve_state(), naming("the task cannot be probed"):
        model = fresh_model(task, seed).to(device)
        seed_everything(derive(seed, "training"))
        loader = next(epochs_of(task, seed))
        half = amp and amp_dtype(torch.device(device)) == torch.bfloat16
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)
        with autocast:
            return probe(model, task.loss, loader, max_batches=batches)


def write_probe(report: ProbeReport, folder: OutputFolder, name: str) -> None:
    """Write a report as JSON for `read_probe`."""
    folder.claim([name])
    folder.write(name, json.dumps(asdict(report)))


def read_probe(path: Path) -> ProbeReport | None:
    """Read a report that `write_probe` wrote; None if there is none, or it is damaged or of another version."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for part in (report, *report["layers"]):
            for name in part.keys() & {"effects", "whole"}:
                part[name] = tuple(Effect(*effect) for effect in part[name])
        for layer in report["layers"]:
            vectors = layer["vectors"] or {}
            layer["vectors"] = WeightVectors(**{k: v and tuple(v) for k, v in vectors.items()}) if vectors else None
            layer["input"] = layer["input"] and InputMean(*layer["input"])
        layers = tuple(LayerReport(**layer) for layer in report["layers"])
        kinds = tuple(report.get("kinds", ()))  # missing in files of earlier versions
        found = ProbeReport(layers, report["whole"], tuple(report["losses"]), kinds)
        str(found)  # fails for numbers of a wrong type
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
