"""Gradient Centralization for Keras 3, on the JAX, torch and TensorFlow backends. Imports Keras, and no torch.

    from gradcentral.integrations.keras import centralize

    model.compile(optimizer=centralize(keras.optimizers.AdamW(1e-3), model), loss=...)

Keras' own mean over "all axes but the last" is right for Dense and Conv, and wrong for transposed and depthwise
convolutions and some einsum kernels; see `gradcentral.integrations.keras_layout`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
from keras import ops

from gradcentral.integrations.discarded import warn_if_discarded
from gradcentral.integrations.keras_layout import KerasLayout, weight_layout
from gradcentral.integrations.named_layout import NamedEntry, Rule
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Centralized", "centralize", "weight_layout"]

PLACEMENTS = ("gradient", "regularized", "update")
# What Keras reads from the inner optimizer, because that one makes the step.
_OF_INNER = frozenset(
    {
        "weight_decay",
        "clipnorm",
        "clipvalue",
        "global_clipnorm",
        "use_ema",
        "ema_momentum",
        "ema_overwrite_frequency",
        "gradient_accumulation_steps",
    }
)


def centralize(
    optimizer: keras.optimizers.Optimizer | str,
    model: keras.Model,
    placement: str = "gradient",
    *,
    strength: float = 1.0,
    overrides: Mapping[str, Rule] | None = None,
) -> keras.optimizers.Optimizer:
    """Return an optimizer that applies Gradient Centralization, to be passed to ``model.compile``.

    The optimizer passed in is wrapped and not changed, so a model that was compiled with it must be compiled again with
    the result. Only a ``LossScaleOptimizer`` is returned itself, with its inner optimizer wrapped.

    Args:
        optimizer: any Keras optimizer, or its name. One that has been trained with keeps its state.
        model: determines the layout (see `weight_layout`). A model that is not built yet is examined when the optimizer
            is built.
        placement: ``"gradient"``: the optimizer receives Φ(∂L/∂w). A layer's ``kernel_regularizer`` is part of the
            loss, so its gradient is centered too. ``"regularized"``: the same, since the weight decay of every Keras
            optimizer is decoupled. ``"update"``: w ← w + Φ(Δw), Δw the whole change that ``apply`` makes, weight decay
            included.
        strength: s of P_s = I − s·eeᵀ in place of P, from 0 (off) to 1 (GC).
        overrides: see `weight_layout`.

    Returns:
        A ``Centralized`` optimizer. Its ``layout`` prints what is centered.

    Raises:
        TypeError: the model is not a Keras model; the strength is not a number.
        ValueError: an unknown placement; a strength that is not between 0 and 1; an optimizer that is already
            centralized; nothing to center; placement ``"update"`` for an optimizer with ``use_ema=True``, for
            ScheduleFreeAdamW, or for a weight with a constraint; placement ``"regularized"`` for the weight decay of an
            optimizer that is not Keras' own.

    Warns:
        UserWarning: the result is not used, as if the optimizer had been changed.

    Note:
        Gradients are centered first and clipped second, since Keras clips inside ``apply``.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> optimizer = centralize(keras.optimizers.SGD(0.1), model)
        >>> optimizer.apply([keras.ops.ones((4, 2)), keras.ops.zeros(2)], model.trainable_variables)
        >>> len(optimizer.layout)  # the kernel; the gradient of ones was centered to zeros
        1
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model must be a Keras model, as in centralize(optimizer, model), not {model!r}")
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.inner_optimizer = centralize(
            optimizer.inner_optimizer, model, placement, strength=strength, overrides=overrides
        )
        return optimizer
    centralized = Centralized(optimizer, _OfModel(model, overrides), placement, strength)
    warn_if_discarded(
        centralized,
        centralized._use,
        "the optimizer that centralize returns is not used, so nothing will be centered: write optimizer = "
        "centralize(optimizer, model), and pass it to model.compile",
    )
    return centralized


@keras.saving.register_keras_serializable(package="gradcentral")
class Centralized(keras.optimizers.Optimizer):  # type: ignore[misc]
    """An optimizer inside which another one receives centered gradients, or makes centered updates.

    Created by `centralize`. Saved and loaded with its model: `keras.saving.load_model` restores it with its layout if
    ``gradcentral.integrations.keras`` has been imported.

    Attributes:
        inner_optimizer: the optimizer that was passed to `centralize`. Its variables are those of this optimizer.
        placement: ``"gradient"``, ``"regularized"`` or ``"update"``.
        strength: s of P_s = I − s·eeᵀ. Training steps are compiled with it, so it is set once, by `centralize`.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        layout: KerasLayout | _OfModel,
        placement: str = "gradient",
        strength: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)  # unused: the inner optimizer has its own
        if placement not in PLACEMENTS:
            raise ValueError(f"unknown placement {placement!r}; choose from {', '.join(map(repr, PLACEMENTS))}")
        if not hasattr(strength, "__float__"):
            raise TypeError(f"strength must be a number, not {strength!r}")
        if not 0 <= float(strength) <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {strength}")
        self._use: list[str] = []
        self.inner_optimizer = inner_optimizer
        self._placement = placement
        self._strength = float(strength)
        self._layout = layout
        # Keras replaces dictionaries that are attributes by ones that track their contents; a proxy is left as it is.
        self._vectors: Mapping[Any, WeightVectors] = MappingProxyType({})
        _check_optimizer(inner_optimizer, placement)
        if isinstance(layout, KerasLayout) or layout.is_ready():
            _check_entries(self._present_layout().entries)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises an AttributeError for those that would have no effect.
        """
        if "inner_optimizer" in vars(self):  # that is, after the constructor of the base class
            if name in _OF_INNER:
                raise AttributeError(f"{name} has no effect here: set optimizer.inner_optimizer.{name}")
            if name == "loss_scale_factor":  # Keras' LossScaleOptimizer takes over the scaling
                self.inner_optimizer.loss_scale_factor = value
            if name in ("strength", "placement"):
                raise AttributeError(
                    f"{name} cannot be set, because Keras compiles the step: call centralize("
                    f"optimizer.inner_optimizer, model, {name}=...), and compile the model with the result"
                )
        super().__setattr__(name, value)

    @property
    def placement(self) -> str:
        """Where the mean is subtracted."""
        return self._placement

    @property
    def strength(self) -> float:
        """The part of the mean that is subtracted."""
        return self._strength

    @property
    def layout(self) -> KerasLayout:
        """The layout in use; until the optimizer is built, that of the model as it is now.

        Raises a ValueError as long as the model is not built.
        """
        self._use[:] = ["layout"]
        return self._present_layout()

    def _present_layout(self) -> KerasLayout:
        return self._layout if isinstance(self._layout, KerasLayout) else self._layout()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Build the inner optimizer, and look up the weight vectors of the variables."""
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        _check_optimizer(self.inner_optimizer, self.placement)  # a MultiOptimizer may have added some of its optimizers
        self._layout = self.layout
        found = self._layout.of(variables)
        _check_entries(found)
        centered = {}
        for variable, entry in zip(variables, found, strict=True):
            if entry is not None and entry.vectors is not None:
                centered[self._var_key(variable)] = entry.vectors
                if self.placement == "update" and variable.constraint is not None:
                    raise ValueError(
                        f"placement 'update' would undo the constraint of {entry.name}: use placement='gradient', or "
                        f"skip the weight with overrides={{{entry.name!r}: None}}"
                    )
        self._vectors = MappingProxyType(centered)
        super().build(variables)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None) -> None:
        """Center, and let the inner optimizer make its step. Called by ``model.fit`` on every backend."""
        if not self.built and trainable_variables is not None:
            self.build([*trainable_variables])
        variables = self._trainable_variables if trainable_variables is None else [*trainable_variables]
        if len(grads) != len(variables):
            raise ValueError(f"{len(grads)} gradients were given for {len(variables)} variables")
        pairs = [
            (gradient, variable, self._vectors.get(self._var_key(variable)))
            for gradient, variable in zip(grads, variables, strict=True)
        ]
        if self.strength == 0:
            self.inner_optimizer.apply(grads, trainable_variables)
        elif self.placement == "update":
            before = [
                (variable, vectors, _means(variable, vectors))
                for gradient, variable, vectors in pairs
                if gradient is not None and vectors is not None
            ]
            self.inner_optimizer.apply(grads, trainable_variables)
            for variable, vectors, means in before:
                # A weight vector that is not finite has no mean to restore.
                shift = ops.nan_to_num(_means(variable, vectors) - means, nan=0.0, posinf=0.0, neginf=0.0)
                variable.assign(_shifted(variable, self.strength * shift, vectors))
        else:
            centered = [
                gradient
                if gradient is None or vectors is None
                else _shifted(gradient, self.strength * _means(gradient, vectors), vectors)
                for gradient, _, vectors in pairs
            ]
            self.inner_optimizer.apply(centered, trainable_variables)

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the inner optimizer; this one has no state of its own."""
        return list(self.inner_optimizer.variables)

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the inner optimizer, which can be set."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The number of steps of the inner optimizer."""
        return self.inner_optimizer.iterations

    def scale_loss(self, loss: Any) -> Any:
        """Scale the loss if the inner optimizer has a ``loss_scale_factor``."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: Sequence[keras.Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from the weight decay of the inner optimizer."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Let the inner optimizer put in its averages, if it has ``use_ema=True``."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with that of the inner optimizer and the layout as plain data."""
        is_known = isinstance(self._layout, KerasLayout) or self._layout.is_ready()
        return {
            "name": self.name,
            "inner_optimizer": keras.optimizers.serialize(self.inner_optimizer),
            "layout": self.layout.get_config(self._trainable_variables if self.built else None) if is_known else None,
            "placement": self.placement,
            "strength": self.strength,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Centralized:
        """Create the optimizer from the result of `get_config`."""
        inner = keras.optimizers.deserialize(config.pop("inner_optimizer"), custom_objects=custom_objects)
        layout = config.pop("layout")
        return cls(inner, _OfModel() if layout is None else KerasLayout.from_config(layout), **config)


class _OfModel:
    """The layout of a model, which may not be built yet, or change until the optimizer is built."""

    def __init__(self, model: keras.Model | None = None, overrides: Mapping[str, Rule] | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._overrides = overrides

    def is_ready(self) -> bool:
        """Return whether the model has been built."""
        model = None if self._model is None else self._model()
        return model is not None and bool(model.built)

    def __call__(self) -> KerasLayout:
        """Return the layout. Raises a ValueError if there is no model, or it is not built."""
        model = None if self._model is None else self._model()
        if model is None:
            raise ValueError(
                "the layout is unknown, because this optimizer was saved before its model was built, or its model no "
                "longer exists: call centralize(optimizer.inner_optimizer, model)"
            )
        return weight_layout(model, overrides=self._overrides)


def _check_entries(entries: Sequence[NamedEntry | None]) -> None:
    if not any(entry is not None and entry.vectors is not None for entry in entries):
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in entries if entry is not None)
        raise ValueError(
            f"nothing to center ({reasons or 'the optimizer has no weight of the model'}): pass "
            "overrides={'path of a weight': '[i] o'} if one of them has weight vectors"
        )


def _check_optimizer(optimizer: keras.optimizers.Optimizer, placement: str) -> None:
    """Refuse an optimizer with which the placement would not do what its definition says."""
    for each in (optimizer, *getattr(optimizer, "optimizers", ())):  # a MultiOptimizer has several
        name = type(each).__name__
        if isinstance(each, Centralized):
            raise ValueError("this optimizer is already centralized: pass optimizer.inner_optimizer")
        if placement == "update" and each.use_ema:
            raise ValueError(
                f"placement 'update' cannot center the averages that {name} keeps with use_ema=True: use "
                "placement='gradient'"
            )
        if placement == "update" and name.startswith("ScheduleFree"):
            raise ValueError(
                f"placement 'update' would center only one of the two sequences of weights that {name} keeps: use "
                "placement='gradient'"
            )
        if placement == "regularized" and each.weight_decay and not _decays_as_keras_does(each):
            raise ValueError(
                f"placement 'regularized' equals 'gradient' for Keras' decoupled weight decay, but whether that of "
                f"{name} is decoupled is unknown: use placement='update', which centers either, or "
                "placement='gradient'"
            )


def _decays_as_keras_does(optimizer: keras.optimizers.Optimizer) -> bool:
    methods = ("update_step", "apply", "_apply_weight_decay")
    owners = [next(cls for cls in type(optimizer).__mro__ if method in vars(cls)) for method in methods]
    return all(owner.__module__.split(".")[0] == "keras" for owner in owners)


def _means(values: Any, vectors: WeightVectors) -> Any:
    """Return the mean of each weight vector, in float32 or wider; the axes of the span are kept with size 1."""
    # keras.ops.mean computes in float32 on JAX and torch, even if the values are float64.
    return ops.sum(_view(values, vectors), axis=vectors.span, keepdims=True) / vectors.fan_in


def _shifted(values: Any, shift: Any, vectors: WeightVectors) -> Any:
    """Subtract one number per weight vector, with one rounding, and return a tensor of the type of the values."""
    return ops.cast(ops.reshape(_view(values, vectors) - shift, values.shape), values.dtype)


def _view(values: Any, vectors: WeightVectors) -> Any:
    values = ops.convert_to_tensor(values)
    # A sum of many half-precision numbers is too inaccurate for their mean.
    if keras.backend.standardize_dtype(values.dtype) in ("float16", "bfloat16"):
        values = ops.cast(values, "float32")
    return values if vectors.view is None else ops.reshape(values, vectors.view)
