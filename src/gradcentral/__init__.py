"""Gradient Centralization for PyTorch: one line on any optimizer, with the right axes for every layer.

    handle = gradcentral.centralize(optimizer, model)

Yong, Huang, Hua, Zhang: Gradient Centralization: A New Optimization Technique for Deep Neural Networks, ECCV 2020.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradcentral import startup  # noqa: F401, before torch is imported

if TYPE_CHECKING:
    from gradcentral import kernels as kernels
    from gradcentral import layout as layout
    from gradcentral import optim as optim
    from gradcentral.attach import Handle, attached, centralize, centralize_in_backward
    from gradcentral.diagnostics.monitor import Monitor
    from gradcentral.diagnostics.probing import probe
    from gradcentral.experiment import compare
    from gradcentral.gradients import centralize_gradients
    from gradcentral.initialization import center_weights_
    from gradcentral.layout import Entry, LeaveAlone, WeightLayout, register_layout, weight_layout
    from gradcentral.optim import SGD, Adam, AdamW
    from gradcentral.projection import center, projection_matrix, share
    from gradcentral.updates import center_update_, centered_update
    from gradcentral.weight_vectors import WeightVectors

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

# Where each public name is defined. Its module is imported at the first use of the name, so that the adapters for JAX
# and Keras import no torch, and `import gradcentral` needs none of the extras.
_NAMES = {
    "gradcentral.attach": ("Handle", "attached", "centralize", "centralize_in_backward"),
    "gradcentral.diagnostics.monitor": ("Monitor",),
    "gradcentral.diagnostics.probing": ("probe",),
    "gradcentral.experiment": ("compare",),
    "gradcentral.gradients": ("centralize_gradients",),
    "gradcentral.initialization": ("center_weights_",),
    "gradcentral.layout": ("Entry", "LeaveAlone", "WeightLayout", "register_layout", "weight_layout"),
    "gradcentral.optim": ("SGD", "Adam", "AdamW"),
    "gradcentral.projection": ("center", "projection_matrix", "share"),
    "gradcentral.updates": ("center_update_", "centered_update"),
    "gradcentral.weight_vectors": ("WeightVectors",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("kernels", "layout", "optim")  # can be used as gradcentral.kernels and so on, without importing them

if not TYPE_CHECKING:  # otherwise type checkers would accept every name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"gradcentral.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'gradcentral' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
