"""Gradient Centralization for PyTorch: one line on any optimizer, with the right axes for every layer.

    handle = gradcentral.centralize(optimizer, model)

Yong, Huang, Hua, Zhang: Gradient Centralization: A New Optimization Technique for Deep Neural Networks, ECCV 2020.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradcentral import startup  # noqa: F401, before torch is imported

# isort: split
from gradcentral.attach import Handle, attached, centralize, centralize_in_backward
from gradcentral.gradients import centralize_gradients
from gradcentral.initialization import center_weights_
from gradcentral.layout import Entry, LeaveAlone, WeightLayout, register_layout, weight_layout
from gradcentral.optim import SGD, Adam, AdamW
from gradcentral.projection import center, projection_matrix, share
from gradcentral.updates import center_update_, centered_update
from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from gradcentral.diagnostics.monitor import Monitor
    from gradcentral.diagnostics.probing import probe
    from gradcentral.experiment import compare

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Entry",
    "Handle",
    "LeaveAlone",
    "Monitor",
    "WeightLayout",
    "WeightVectors",
    "attached",
    "center",
    "center_update_",
    "center_weights_",
    "centered_update",
    "centralize",
    "centralize_gradients",
    "centralize_in_backward",
    "compare",
    "probe",
    "projection_matrix",
    "register_layout",
    "share",
    "weight_layout",
]

__version__ = "0.2.0"

# Imported at first use: these need an extra, or take a while to import.
_LATER = {
    "Monitor": "gradcentral.diagnostics.monitor",
    "compare": "gradcentral.experiment",
    "probe": "gradcentral.diagnostics.probing",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'gradcentral' has no attribute {name!r}")
