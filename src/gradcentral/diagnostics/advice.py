"""What the project's own measurements found for models of the same kind as a given one."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["PAGE", "advice", "kinds_of"]

PAGE = "docs/should-i-use-it.md"
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.GRU, nn.GRUCell)


def kinds_of(model: nn.Module) -> tuple[str, ...]:
    """Return the measured kinds that a model belongs to, as the page names them; none if it is of another kind.

    The kind follows from the classes of the layers. Whether a convolutional network with BatchNorm is trained from
    scratch or fine-tuned cannot be seen, so it belongs to both kinds.

    Examples:
        >>> kinds_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)))
        ('linear layers with ReLU',)
    """
    modules = list(model.modules())
    names = [type(module).__name__.lower() for module in modules]

    def has(*classes: type[nn.Module]) -> bool:
        return any(isinstance(module, classes) for module in modules)

    layer_norm = has(nn.LayerNorm) or any("rmsnorm" in name for name in names)
    convolutions, linear = (
        sum(p.numel() for module in modules if isinstance(module, classes) for p in module.parameters(recurse=False))
        for classes in (_CONVOLUTIONS, (nn.Linear,))
    )
    # A vision transformer has one convolution, for its patches.
    if layer_norm and linear > convolutions and sum(isinstance(module, _CONVOLUTIONS) for module in modules) < 2:
        lora = any("lora" in name for name in names)
        return ("fine-tuning a transformer with LoRA" if lora else "transformer with LayerNorm or RMSNorm",)
    if has(*_TRANSPOSED) and has(nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return ("convolutional autoencoder",)
    if convolutions:
        if has(nn.modules.batchnorm._BatchNorm):
            return "CNN with BatchNorm", "fine-tuning a CNN with BatchNorm"
        return ("CNN with GroupNorm or LayerNorm" if layer_norm or has(nn.GroupNorm) else "CNN without normalization",)
    if has(*_RECURRENT):
        return ("GRU",)
    if linear and not layer_norm:
        for activation in (nn.Sigmoid, nn.ReLU):
            if has(activation):
                return (f"linear layers with {'sigmoid' if activation is nn.Sigmoid else 'ReLU'}",)
    return ()


@functools.cache
def _evidence() -> dict[str, list[dict[str, Any]]]:
    """Read the summaries that ``python benchmarks/evidence.py report`` writes."""
    found: dict[str, list[dict[str, Any]]] = json.loads(
        Path(__file__).with_name("evidence.json").read_text(encoding="utf-8")
    )
    return found


def advice(kinds: tuple[str, ...]) -> str:
    """Return one sentence per kind: the effect of each placement on the test error, with its interval.

    Examples:
        >>> print(advice(()))
        No measurements of models of this kind exist; docs/should-i-use-it.md lists the kinds that have been measured.
    """
    sentences = []
    for kind in kinds:
        effects = [
            f'"{effect["arm"]}" {effect["mean"]:+.1f}% [{effect["low"]:+.1f}, {effect["high"]:+.1f}], '
            f"{effect['cells']} cells"
            for effect in _evidence().get(kind, [])
        ]
        if effects:
            sentences.append(f"{kind}: {'; '.join(effects)}.")
    if not sentences:
        return f"No measurements of models of this kind exist; {PAGE} lists the kinds that have been measured."
    return (
        f"Measured reduction of the test error in small models of this kind (95% interval). {' '.join(sentences)} "
        f"See {PAGE}."
    )
