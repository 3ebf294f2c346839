"""The places where a model's parameters are registered, and the module that computes with each of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradcentral.layout.classes import defining_classes
from gradcentral.layout.lookup import find_rule
from gradcentral.layout.rules import LeaveAlone

__all__ = ["Owner", "Site", "refuse_flat", "sites"]

_REMEDY = "cannot be identified: use torch.distributed.fsdp.fully_shard (FSDP2), which keeps the shapes"
_WITH_ACCELERATE = "; with accelerate, set fsdp_version: 2"
_MAGNITUDE = LeaveAlone("magnitude of weight_norm")
_Classes: TypeAlias = "dict[nn.Module, type[nn.Module]]"


class Owner(NamedTuple):
    """The module that computes with a parameter."""

    module: nn.Module
    cls: type[nn.Module]  # the class that defines the module, also where torch.jit or torch.export converted it
    name: str  # the parameter's name in that module: "weight" for "parametrizations.weight.original"
    skip: LeaveAlone | None = None  # why it is skipped although a rule centers the tensor that is computed from it


class Site(NamedTuple):
    """One place where a parameter is registered in a model; a tied parameter has several."""

    name: str
    tensor: Tensor
    owner: Owner
    modules: tuple[nn.Module, ...]  # the enclosing modules, outermost first


def sites(model: nn.Module) -> Iterator[Site]:
    """Yield each place where a parameter is registered; raise a ValueError if the parameters are flat parts."""
    modules: dict[str, nn.Module] = {}
    classes = defining_classes(model)
    for path, module in model.named_modules():
        modules[path] = module
        if type(module).__name__ == "FullyShardedDataParallel":
            wrapped = f"{path or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters"
            raise ValueError(f"{wrapped}, so that their weight vectors {_REMEDY}{_WITH_ACCELERATE}")
        prefixes = accumulate(path.split("."), "{}.{}".format)
        enclosing = (model, *(modules[prefix] for prefix in prefixes if prefix in modules))
        for local_name, tensor in module._parameters.items():
            if tensor is not None:
                name = f"{path}.{local_name}" if path else local_name
                refuse_flat(name, tensor)
                yield Site(name, tensor, _owner(module, path, local_name, modules, classes), enclosing)


def refuse_flat(name: str, tensor: Tensor) -> None:
    """Refuse a flat part of a parameter, as made by FSDP1 and DeepSpeed's ZeRO-3: it has no visible weight vectors."""
    if getattr(tensor, "_fsdp_flattened", False):
        maker, also = "FullyShardedDataParallel (FSDP1)", _WITH_ACCELERATE
    elif hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape"):
        maker = "DeepSpeed ZeRO-3"
        also = ", or call gradcentral.centralize_in_backward(model) before deepspeed.initialize"
    else:
        return
    what = f"{name} of shape {tuple(tensor.shape)} is a flat part of a parameter, made by {maker}"
    raise ValueError(f"{what}, whose weight vectors {_REMEDY}{also}")


def _owner(module: nn.Module, path: str, name: str, modules: dict[str, nn.Module], classes: _Classes) -> Owner:
    if isinstance(module, ParametrizationList):
        above, _, tensor_name = path.rpartition(".")
        owner = modules[above.rpartition(".")[0]]
        return Owner(owner, classes[owner], tensor_name, _skipped_original(module, name))
    while issubclass(classes[module], (nn.ParameterList, nn.ParameterDict)) and path:
        path, _, last = path.rpartition(".")
        module, name = modules[path], f"{last}.{name}"
    return (
        _owner_behind_hook(module, classes[module], name)
        or _enclosing_owner(path, name, modules, classes)
        or Owner(module, classes[module], name)
    )


def _skipped_original(chain: ParametrizationList, name: str) -> LeaveAlone | None:
    """Return why ``original…`` of a parametrized tensor is skipped, or None if the rule of that tensor applies."""
    kind = type(chain[0]) if len(chain) == 1 else None
    if kind is parametrizations._WeightNorm:
        return None if name == "original1" else _MAGNITUDE
    if kind is parametrizations._SpectralNorm:
        return None
    if kind is parametrizations._Orthogonal:
        return LeaveAlone("orthogonal: the weight is not a linear function of the parameter")
    return LeaveAlone(f"parametrized by {', '.join(type(step).__name__ for step in chain)}", unknown=True)


def _owner_behind_hook(module: nn.Module, cls: type[nn.Module], name: str) -> Owner | None:
    """Return the owner of ``weight_v`` or ``weight_orig``, from which a forward pre-hook computes ``weight``."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and name in (f"{hook.name}_g", f"{hook.name}_v"):
            return Owner(module, cls, hook.name, _MAGNITUDE if name.endswith("_g") else None)
        if isinstance(hook, SpectralNorm) and name == f"{hook.name}_orig":
            return Owner(module, cls, hook.name)
        if isinstance(hook, BasePruningMethod) and name == f"{hook._tensor_name}_orig":
            # The weight vector consists of the unmasked entries, which no view of the tensor describes.
            return Owner(module, cls, hook._tensor_name, LeaveAlone("pruned: the mean would include masked entries"))
    return None


def _enclosing_owner(path: str, name: str, modules: dict[str, nn.Module], classes: _Classes) -> Owner | None:
    """Return the direct parent (past ModuleList and ModuleDict), if it has a rule for this parameter of its child."""
    while path:
        path, _, last = path.rpartition(".")
        module, name = modules[path], f"{last}.{name}"
        cls = classes[module]
        if not issubclass(cls, (nn.ModuleList, nn.ModuleDict)):
            return Owner(module, cls, name) if find_rule(module, cls, name) else None
    return None
