"""MMEngine: a hook that attaches Gradient Centralization when training starts.

In a config file: ``custom_hooks = [dict(type="gradcentral.integrations.mmengine.GradientCentralization")]``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradcentral.attach import Handle
from gradcentral.integrations.settings import checked_settings
from gradcentral.targets import check_placement

__all__ = ["GradientCentralization"]


class GradientCentralization(Hook):  # type: ignore[misc]
    """Center the gradients of all optimizers of a ``Runner``, of MMDetection, MMSegmentation, MMPretrain and so on.

    It attaches when training starts, as `gradcentral.centralize` does, after the weights and the optimizer's state have
    been loaded, and detaches when training ends. An ``OptimWrapper`` clips before it calls ``step()``, so clipping
    comes first and centering second.

    Without the hook, ``optimizer=dict(type="gradcentral.AdamW", lr=1e-3)`` centers inside the optimizer's fused step.

    Args:
        placement, strength: see `gradcentral.centralize`.
        only, overrides, exclude: see `gradcentral.weight_layout`.

    Attributes:
        handle: the `gradcentral.Handle`; None before training.

    Raises:
        ValueError: an unknown placement or ``only``; a strength that is not between 0 and 1; when training starts, the
            errors of `gradcentral.centralize` and `gradcentral.weight_layout`.

    Examples:
        >>> hook = GradientCentralization(placement="update", exclude=["backbone.*"])
        >>> hook.handle is None
        True
    """

    def __init__(
        self,
        placement: str = "gradient",
        strength: float = 1.0,
        *,
        only: str = "all",
        overrides: Mapping[str, str | None] | None = None,
        exclude: Iterable[str] = (),
    ) -> None:
        check_placement(placement)
        self._settings = checked_settings(placement, strength, only, overrides, exclude, monitor=None)
        self.handle: Handle | None = None
        self._remove_handle = False

    def before_train(self, runner: Any) -> None:
        """Attach to the optimizers."""
        self._detach()  # in case an exception ended the previous training
        wrapper = runner.optim_wrapper
        wrappers = [*wrapper.values()] if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        model = runner.model
        while isinstance(model, (DataParallel, DistributedDataParallel)):  # so that names are those of one process
            model = model.module
        # If the same had been attached before, it stays attached after training.
        self.handle, self._remove_handle = self._settings.attach(
            [one.optimizer for one in wrappers], self._settings.layout(model)
        )
        runner.logger.info(repr(self.handle))

    def after_train(self, runner: Any) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        if self.handle is not None and self._remove_handle:
            self.handle.remove()
