"""``digits-batchnorm``: the CNN of ``digits`` with BatchNorm after each convolution."""

from __future__ import annotations

import dataclasses
import functools

from gradcentral.experiment.tasks import digits

__all__ = ["task"]

task = dataclasses.replace(digits.task, name="digits-batchnorm", model=functools.partial(digits.cnn, batchnorm=True))
