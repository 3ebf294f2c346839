"""The optimizers of each library that docs/compatibility.md lists, and how each is created."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tests.integrations.compatibility import Case, Make

__all__ = ["DISTRIBUTIONS", "LIBRARIES", "cases_of"]


def _classes(module: ModuleType) -> dict[str, type[Optimizer]]:
    """Return the public optimizers of a module, by name."""
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and name[0] != "_"}
    return {name: cls for name, cls in sorted(found.items()) if issubclass(cls, Optimizer) and cls is not Optimizer}


def _with(cls: type[Optimizer], **defaults: Any) -> Make:
    return lambda model, **options: cls(model.parameters(), **{**defaults, **options})


def _matrices(cls: type[Optimizer]) -> Make:
    """For optimizers that take matrices only."""
    return lambda model, **options: cls([p for p in model.parameters() if p.ndim == 2], **options)


def _of_library(path: str, special: Mapping[str, Callable[[Any], Make]] = MappingProxyType({})) -> list[Case]:
    found = _classes(importlib.import_module(path))
    return [Case(name, special.get(name, _with)(cls)) for name, cls in found.items()]


def _torch() -> list[Case]:
    decays = ("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
    special = {"Muon": _matrices, "LBFGS": lambda cls: _with(cls, lr=0.1, max_iter=4)}
    return [replace(case, decay=0.1 * (case.name in decays)) for case in _of_library("torch.optim", special)]


def _pytorch_optimizer() -> list[Case]:
    def muon(cls: type[Optimizer]) -> Make:
        def make(model: nn.Module, **options: Any) -> Optimizer:
            split = [[p for p in model.parameters() if (p.ndim > 1) is many] for many in (True, False)]
            return cls([{"params": split[0], "use_muon": True}, {"params": split[1], "use_muon": False}], **options)

        return make

    def of_model(cls: Any) -> Make:
        return lambda model, **options: cls(model, **options)

    def wrapper(cls: Any) -> Make:
        return lambda model, lr=0.1: cls(torch.optim.SGD(model.parameters(), lr=lr))

    def sam(cls: Any) -> Make:
        return lambda model, lr=0.1: cls(model.parameters(), base_optimizer=torch.optim.SGD, lr=lr)

    def wsam(cls: Any) -> Make:
        return lambda model, lr=0.1: cls(
            model, model.parameters(), base_optimizer=torch.optim.SGD, decouple=False, lr=lr
        )

    def adaptive(cls: Any) -> Make:
        return _with(cls, lr=1.0, d0=1e-2)  # the default estimate of the step size, 1e-6, takes long to grow

    special: dict[str, Callable[[Any], Make]] = {
        **dict.fromkeys(("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon"), muon),
        **dict.fromkeys(("AdaLOMO", "AdamMini", "LOMO"), of_model),
        **dict.fromkeys(("Lookahead", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper", "TRAC"), wrapper),
        **dict.fromkeys(("FriendlySAM", "LookSAM", "SAM"), sam),
        "WSAM": wsam,
        **dict.fromkeys(("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "Prodigy"), adaptive),
        "SpectralSphere": _matrices,
        "LBFGS": lambda cls: _with(cls, lr=0.1, max_iter=4),
        "BSAM": lambda cls: _with(cls, num_data=8),
        "Ranger21": lambda cls: _with(cls, num_iterations=40),
    }
    return _of_library("pytorch_optimizer", special)


def _bitsandbytes() -> list[Case]:
    needs_rate = ("LARS", "LARS32bit", "LARS8bit", "SGD", "SGD32bit", "SGD8bit", "PytorchLARS")
    special = {name: lambda cls: _with(cls, lr=0.1, momentum=0.9) for name in needs_rate}
    return _of_library("bitsandbytes.optim", special)


def _schedulefree() -> list[Case]:
    from schedulefree import ScheduleFreeWrapper

    def wrapper(model: nn.Module, lr: float = 0.1) -> Any:
        return ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=lr), momentum=0.9)

    return [*_of_library("schedulefree"), Case("ScheduleFreeWrapper", wrapper)]


def _timm() -> list[Case]:
    optim: Any = importlib.import_module("timm.optim")

    def by_name(name: str) -> Make:
        return lambda model, **options: optim.create_optimizer_v2(model, opt=name, **options)

    # Names that begin with gc are those of gradcentral's adapter, which other tests import.
    names = (name for name in optim.list_optimizers() if not name.startswith(("bnb", "fused", "gc")))
    return [Case(name, by_name(name)) for name in names]


def _heavyball() -> list[Case]:
    def split(cls: Any) -> Make:
        from heavyball import AdamW

        return lambda model, **options: cls([{"params": [*model.parameters()], "optimizer": AdamW, **options}])

    cases = _of_library("heavyball", {"SplitOpt": split})
    return [case for case in cases if not case.name.endswith("Base")]  # base classes


LIBRARIES: dict[str, Callable[[], list[Case]]] = {
    "torch": _torch,
    "pytorch_optimizer": _pytorch_optimizer,
    "timm": _timm,
    "schedulefree": _schedulefree,
    "heavyball": _heavyball,
    "bitsandbytes": _bitsandbytes,
    "torchao": lambda: _of_library("torchao.optim"),
    "optimi": lambda: _of_library("optimi"),
}


DISTRIBUTIONS = {**{library: library for library in LIBRARIES}, "optimi": "torch-optimi"}
"""The names under which pip installs the libraries."""


def cases_of(library: str) -> list[Case]:
    """Return the optimizers of a library."""
    return LIBRARIES[library]()
