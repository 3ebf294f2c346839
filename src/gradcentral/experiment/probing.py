"""`gradcentral.probe` on a task: its model as a run would make it, its own batches."""

from __future__ import annotations

import torch

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.diagnostics.probe_report import ProbeReport
from gradcentral.diagnostics.probing import DEFAULT_BATCHES, probe
from gradcentral.experiment.errors import TaskError
from gradcentral.experiment.loading import describe, where
from gradcentral.experiment.randomness import derive, seed_everything
from gradcentral.experiment.task import Task
from gradcentral.experiment.training import amp_dtype, fresh_model, loader_of, orders_of, pair_of

__all__ = ["probe_task"]


def probe_task(
    task: Task, *, seed: int = 0, batches: int = DEFAULT_BATCHES, device: str = "cpu", amp: bool = False
) -> ProbeReport:
    """What GC would do to the task's fresh model, on the batches that a run of this seed begins with.

    With ``amp`` in bfloat16 where the device has it; float16 would need a loss scale, and is left out.

    Raises:
        TaskError: something in the task raises; the message says where.

    Examples:
        >>> from gradcentral.experiment import load_task
        >>> probe_task(load_task("digits")).layers[0].name
        '0.weight'
    """
    with preserve_state():
        model = fresh_model(task, seed).to(device)
        seed_everything(derive(seed, "training"))
        loader = loader_of(task, next(orders_of(task, seed)))
        half = amp and amp_dtype(torch.device(device)) == torch.bfloat16
        try:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
                return probe(model, task.loss, map(pair_of, loader), max_batches=batches)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(f"the task can't be probed: {describe(error)} ({where(error)})") from error
