"""The built-in tasks. A module defines one ``task``, or several ``tasks`` by name."""

from __future__ import annotations

__all__ = ["MODULES", "SUITE"]

_IMAGES = ("fashion-none", "fashion-batchnorm", "fashion-groupnorm", "fashion-layernorm", "autoencoder")
MODULES = {
    "digits": "digits",
    "digits-batchnorm": "digits_batchnorm",
    "digits-vit": "digits_vit",
    "wine": "wine",
    **dict.fromkeys(_IMAGES, "images"),
    **dict.fromkeys(("fine-tuning", "lora"), "fine_tuning"),
    **dict.fromkeys(("text-layernorm", "text-rmsnorm", "text-gru"), "text"),
    **dict.fromkeys(("tabular-sigmoid", "tabular-relu"), "tabular"),
    "cifar100": "cifar",
}
"""Name of a task -> the module in this folder that defines it."""

SUITE = tuple(name for name in MODULES if not name.startswith(("digits", "wine", "cifar")))
"""The small tasks that `benchmarks/evidence.py` trains; ``optimizers.py`` explains their learning rates."""
