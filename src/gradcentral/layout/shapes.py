"""Rules by the meaning of a parameter's axes, checked against what the module says of itself."""

from __future__ import annotations

from torch import Tensor, nn

from gradcentral.layout.rules import Decision, LeaveAlone, Rule
from gradcentral.weight_vectors import WeightVectors

__all__ = ["unexpected_shape", "weights"]


def weights(axes: str, **sizes: str) -> Rule:
    """A rule from the names of a parameter's axes: a weight vector runs over those that begin with ``i``.

    Args:
        axes: one name an axis: ``"o i"`` for a Linear, ``"i o"`` for what is used as ``x @ w``, ``"o i ik ik"`` for
            a convolution, ``"e i o"`` for experts.
        sizes: the module's attribute that holds the size of an axis, as in ``o="out_features"``. Checked where the
            module has it: a parameter of another shape is left alone as unknown.

    Examples:
        >>> import torch
        >>> rule = weights("i o", o="units")
        >>> layer = torch.nn.Module()
        >>> layer.units = 3
        >>> rule(layer, torch.zeros(4, 3)).span
        (0,)
        >>> rule(layer, torch.zeros(3, 4))
        LeaveAlone(reason='shape (3, 4) is not what Module has ([i, o], o = units = 3)', unknown=True)
    """
    names = axes.split()
    span = tuple(axis for axis, name in enumerate(names) if name.startswith("i"))

    def rule(module: nn.Module, tensor: Tensor) -> Decision:
        expected = f"[{', '.join(names)}]"
        if tensor.ndim != len(names):
            return unexpected_shape(module, tensor, expected)
        for name, attribute in sizes.items():
            size = getattr(module, attribute, None)
            if isinstance(size, int) and tensor.shape[names.index(name)] != size:
                return unexpected_shape(module, tensor, f"{expected}, {name} = {attribute} = {size}")
        return WeightVectors(span=span)

    return rule


def unexpected_shape(module: nn.Module, tensor: Tensor, expected: str) -> LeaveAlone:
    """The layer has changed, or is not the one that the rule was written for."""
    return LeaveAlone(f"shape {tuple(tensor.shape)} is not what {type(module).__name__} has ({expected})", unknown=True)
