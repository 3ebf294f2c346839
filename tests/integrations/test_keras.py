"""Gradient Centralization in Keras: steps, `fit`, clipping, accumulation, loss scaling, saving, refusals."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradcentral
from gradcentral.experiment import CustomTask, compare, load_task
from tests.integrations.keras_setup import BACKEND, as_numpy, float64, keras  # noqa: F401

from gradcentral.integrations.keras import Centralized, centralize  # isort: skip, after the choice of the backend

ops, L = keras.ops, keras.layers
EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_digits.py"

# Keras' own conversions to numpy and back.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def _noise(*shape: int, seed: int = 1, offset: float = 0.3) -> np.ndarray[Any, Any]:
    return np.random.RandomState(seed).normal(offset, 1, shape)


def _dense() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), L.Dense(3, activation="tanh"), L.Dense(2)])


def _step(optimizer: Any, model: Any, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Apply random gradients, and return them."""
    gradients = [_noise(*variable.shape, seed=seed + i) for i, variable in enumerate(model.trainable_variables)]
    optimizer.apply([ops.convert_to_tensor(gradient) for gradient in gradients], model.trainable_variables)
    return gradients


def _weights(model: Any) -> list[np.ndarray[Any, Any]]:
    return [as_numpy(variable).copy() for variable in model.trainable_variables]


def _centered(gradients: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Return Φ of the gradients of Dense layers."""
    return [gradient - gradient.mean(0) if gradient.ndim > 1 else gradient for gradient in gradients]


# --- The same steps as in torch ---------------------------------------------------------------------------------------


def _convolutions() -> tuple[Any, nn.Module, list[tuple[int, ...] | None]]:
    """Return a Keras model, its counterpart in torch, and how the weights of the one become those of the other."""
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            L.Conv2D(4, 3, activation="tanh"),
            L.Conv2DTranspose(3, 4, strides=2, activation="tanh"),
            L.DepthwiseConv2D(3, activation="tanh"),
            L.Flatten(),
            L.Dense(2),
        ]
    )

    class Channels(nn.Module):
        """Flattens as Keras does, with the channels last; Keras also gives the channels last."""

        def __init__(self, axes: tuple[int, ...]) -> None:
            super().__init__()
            self.axes = axes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.permute(self.axes)

    counterpart = nn.Sequential(
        Channels((0, 3, 1, 2)),
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 4, stride=2),
        nn.Tanh(),
        nn.Conv2d(3, 3, 3, groups=3),
        nn.Tanh(),
        Channels((0, 2, 3, 1)),
        nn.Flatten(),
        nn.Linear(6 * 6 * 3, 2),
    )
    return model, counterpart, [(3, 2, 0, 1), None, (3, 2, 0, 1), None, (2, 3, 0, 1), None, (1, 0), None]


def _recurrent() -> tuple[Any, nn.Module, list[tuple[int, ...] | None]]:
    model = keras.Sequential([keras.Input((5, 4)), L.LSTM(3, use_bias=False), L.Dense(2)])

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, bias=False, batch_first=True)
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
            return last

    return model, Last(), [(1, 0), (1, 0), (1, 0), None]


def _optimizers(name: str, placement: str, model: Any, counterpart: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    # TensorFlow rounds constants to float32, so they are chosen to be exact there.
    if name == "sgd":
        ours = keras.optimizers.SGD(0.125, momentum=0.875, nesterov=True)
        theirs: torch.optim.Optimizer = torch.optim.SGD(
            counterpart.parameters(), lr=0.125, momentum=0.875, nesterov=True
        )
    else:  # Keras adds ε where torch does not, so it is as good as 0
        constants: dict[str, Any] = {"weight_decay": 0.125}
        ours = keras.optimizers.AdamW(0.015625, beta_1=0.875, beta_2=0.9375, epsilon=1e-30, **constants)
        theirs = torch.optim.AdamW(counterpart.parameters(), 0.015625, (0.875, 0.9375), eps=1e-30, **constants)
    gradcentral.centralize(theirs, counterpart, placement)
    return centralize(ours, model, placement), theirs


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("build", [_convolutions, _recurrent])
def test_ten_steps_equal_those_of_torch(build: Any, name: str, placement: str) -> None:
    model, counterpart, axes = build()
    counterpart.double()
    parameters = [*counterpart.parameters()]
    with torch.no_grad():
        for variable, parameter, order in zip(model.trainable_variables, parameters, axes, strict=True):
            value = as_numpy(variable)
            parameter.copy_(torch.tensor(value if order is None else value.transpose(order)))
    x, y = _noise(8, *model.input_shape[1:]), _noise(8, 2, seed=2)
    optimizer, theirs = _optimizers(name, placement, model, counterpart)
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(10):
        model.train_on_batch(x, y)
        theirs.zero_grad()
        nn.functional.mse_loss(counterpart(torch.tensor(x)), torch.tensor(y)).backward()
        theirs.step()
    for variable, parameter, order in zip(model.trainable_variables, parameters, axes, strict=True):
        value = as_numpy(variable)
        np.testing.assert_allclose(
            value if order is None else value.transpose(order), parameter.detach().numpy(), rtol=0, atol=1e-12
        )


@pytest.mark.usefixtures("float64")
def test_a_regularizer_is_centered_as_the_weight_decay_of_regularized() -> None:
    """Keras' L2 penalty is part of the loss, so "gradient" gives P(g + λw), which "regularized" is in torch."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, kernel_regularizer=keras.regularizers.L2(0.125))])
    counterpart = nn.Linear(4, 3).double()
    with torch.no_grad():
        counterpart.weight.copy_(torch.tensor(as_numpy(model.layers[0].kernel).T))
        counterpart.bias.zero_()
    groups: list[dict[str, Any]] = [{"params": [counterpart.weight], "weight_decay": 0.25}]
    groups.append({"params": [counterpart.bias]})
    theirs = torch.optim.SGD(groups, lr=0.125, momentum=0.875)
    gradcentral.centralize(theirs, counterpart, "regularized")
    model.compile(optimizer=centralize(keras.optimizers.SGD(0.125, momentum=0.875), model, "regularized"), loss="mse")
    x, y = _noise(8, 4), _noise(8, 3, seed=2)
    for _ in range(10):
        model.train_on_batch(x, y)
        theirs.zero_grad()
        nn.functional.mse_loss(counterpart(torch.tensor(x)), torch.tensor(y)).backward()
        theirs.step()
    np.testing.assert_allclose(
        as_numpy(model.layers[0].kernel).T, counterpart.weight.detach().numpy(), rtol=0, atol=1e-12
    )


# --- One step ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("placement", ["gradient", "regularized", "update"])
def test_strength(placement: str, strength: float) -> None:
    model = _dense()
    before = _weights(model)
    gradients = _step(centralize(keras.optimizers.SGD(0.1), model, placement, strength=strength), model)
    for w, w0, g, full in zip(_weights(model), before, gradients, _centered(gradients), strict=True):
        np.testing.assert_allclose(w, w0 - 0.1 * ((1 - strength) * g + strength * full), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("option", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_comes_after_centering(option: str) -> None:
    model = _dense()
    before = _weights(model)
    optimizer = centralize(keras.optimizers.SGD(0.1, **{option: 0.5}), model)
    gradients = _centered(_step(optimizer, model))
    norms = [np.linalg.norm(gradient) for gradient in gradients]
    total = np.linalg.norm(norms)
    clipped = {
        "clipvalue": [gradient.clip(-0.5, 0.5) for gradient in gradients],
        "clipnorm": [g * min(1, 0.5 / norm) for g, norm in zip(gradients, norms, strict=True)],
        "global_clipnorm": [g * min(1, 0.5 / total) for g in gradients],
    }[option]
    assert total > 0.5
    for w, w0, g in zip(_weights(model), before, clipped, strict=True):
        np.testing.assert_allclose(w, w0 - 0.1 * g, rtol=0, atol=1e-7)  # Keras computes its norms in float32


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_accumulation(placement: str) -> None:
    """Two accumulated gradients make the step of their mean; the first one changes nothing."""
    model, other = _dense(), _dense()
    optimizer = centralize(keras.optimizers.Adam(0.1, gradient_accumulation_steps=2), model, placement)
    before = _weights(model)
    first = _step(optimizer, model, seed=0)
    for w, w0 in zip(_weights(model), before, strict=True):
        np.testing.assert_allclose(w, w0, rtol=0, atol=1e-15)
    second = _step(optimizer, model, seed=9)
    mean = [ops.convert_to_tensor((a + b) / 2) for a, b in zip(first, second, strict=True)]
    centralize(keras.optimizers.Adam(0.1), other, placement).apply(mean, other.trainable_variables)
    for w, w0, expected in zip(_weights(model), before, _weights(other), strict=True):
        assert np.abs(w - w0).max() > 0.01
        np.testing.assert_allclose(w, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["Adam", "Lion", "RMSprop", "Muon", "Adafactor"])
def test_update_keeps_the_means_of_the_weights(name: str) -> None:
    model = _dense()
    optimizer = centralize(getattr(keras.optimizers, name)(0.1, weight_decay=0.1), model, "update")
    before = _weights(model)
    for seed in range(3):
        _step(optimizer, model, seed)
    for w, w0 in zip(_weights(model), before, strict=True):
        if w.ndim > 1:
            assert np.abs(w - w0).max() > 1e-3
            np.testing.assert_allclose(w.mean(0), w0.mean(0), rtol=0, atol=1e-14)


def test_several_optimizers_of_one_model() -> None:
    model = _dense()
    first = model.layers[0].kernel.path
    inner = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {first: keras.optimizers.Adam(0.1)})
    )
    optimizer = centralize(inner, model, "update")
    before = _weights(model)
    _step(optimizer, model)
    for w, w0 in zip(_weights(model), before, strict=True):
        assert np.abs(w - w0).max() > 1e-2
        if w.ndim > 1:
            np.testing.assert_allclose(w.mean(0), w0.mean(0), rtol=0, atol=1e-6)


def test_missing_gradients_and_half_precision() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((400,), dtype="bfloat16"), L.Dense(3, dtype="bfloat16"), L.Dense(2)])
    optimizer = centralize(keras.optimizers.SGD(1.0), model)
    kernel, *others = model.trainable_variables
    kernel.assign(ops.zeros(kernel.shape))
    gradient = ops.cast(ops.convert_to_tensor(_noise(400, 3, offset=5)), "bfloat16")
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([gradient, *[None] * len(others)], model.trainable_variables)
    # A mean in bfloat16 would be wrong by up to 1 %, which is 0.05 here.
    assert np.abs(as_numpy(ops.cast(kernel, "float32")).mean(0)).max() < 2e-3


def test_overridden_embedding() -> None:
    """The gradient of an embedding is sparse in TensorFlow."""
    model = keras.Sequential([keras.Input((3,), dtype="int32"), L.Embedding(7, 4), L.Flatten(), L.Dense(2)])
    assert "/embeddings" not in " ".join(centralize("sgd", model).layout)
    optimizer = centralize(keras.optimizers.SGD(0.5), model, overrides={"**/embeddings": "[v] d"})
    before = _weights(model)[0]
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(np.array([[0, 1, 2], [3, 3, 1]]), _noise(2, 2), epochs=3, verbose=0)
    after = _weights(model)[0]
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(after.mean(0), before.mean(0), rtol=0, atol=1e-6)


# --- Training and saving ----------------------------------------------------------------------------------------------


def _means(model: Any) -> list[np.ndarray[Any, Any]]:
    return [w.mean(0) for w in _weights(model) if w.ndim > 1]


@pytest.mark.parametrize("jit_compile", [False] if BACKEND == "torch" else [False, True])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_fit(placement: str, jit_compile: bool) -> None:
    x, y = _noise(32, 4), _noise(32, 2, seed=2)
    model, plain = _dense(), _dense()
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer=centralize(optimizer, model, placement), loss="mse", jit_compile=jit_compile)
    plain.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9), loss="mse", jit_compile=jit_compile)
    before = _means(model)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    for each in (model, plain):
        each.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[halve])
    assert int(model.optimizer.iterations) == 8
    assert float(optimizer.learning_rate) == pytest.approx(0.05 / 4)
    for mean, mean0, without in zip(_means(model), before, _means(plain), strict=True):
        assert np.abs(mean - mean0).max() < 1e-6 < 1e-2 < np.abs(without - mean0).max()


def test_mixed_precision_and_a_gradient_that_overflows() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.Dense(2)])
        model.compile(optimizer=centralize(keras.optimizers.SGD(0.05), model, "update"), loss="mse")
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, Centralized)
    before, weights = _means(model), _weights(model)
    model.fit(_noise(32, 4), _noise(32, 2, seed=2), batch_size=8, epochs=2, verbose=0)
    assert np.abs(_weights(model)[0] - weights[0]).max() > 1e-2
    for mean, mean0 in zip(_means(model), before, strict=True):
        np.testing.assert_allclose(mean, mean0, rtol=0, atol=1e-6)
    weights, scale = _weights(model), float(as_numpy(model.optimizer.dynamic_scale))
    model.fit(np.full((8, 4), 1e4), _noise(8, 2), batch_size=8, epochs=1, verbose=0)
    assert float(as_numpy(model.optimizer.dynamic_scale)) == scale / 2
    for w, w0 in zip(_weights(model), weights, strict=True):
        np.testing.assert_array_equal(w, w0)


def test_loss_scale_optimizer_is_centered_inside() -> None:
    model = _dense()
    optimizer = centralize(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), model)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(optimizer.inner_optimizer, Centralized)


@pytest.mark.skipif(BACKEND == "jax", reason="with JAX, LossScaleOptimizer makes steps only in compiled training")
def test_the_scaling_of_the_loss_is_done_once() -> None:
    """LossScaleOptimizer resets the scaling of the optimizer inside of it, at whatever depth."""
    model = _dense()
    before = _weights(model)
    inner = centralize(keras.optimizers.SGD(0.1, loss_scale_factor=8.0), model)
    assert float(inner.scale_loss(1.0)) == 8
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0)
    gradients = _centered(_step(optimizer, model))
    for w, w0, g in zip(_weights(model), before, gradients, strict=True):
        np.testing.assert_allclose(w, w0 - 0.1 * g, rtol=0, atol=1e-6)


def test_a_trained_optimizer_keeps_its_state() -> None:
    model = _dense()
    inner = keras.optimizers.Adam(0.1)
    _step(inner, model)
    optimizer = centralize(inner, model)
    _step(optimizer, model)
    assert int(optimizer.iterations) == int(inner.iterations) == 2


def test_model_that_is_built_later() -> None:
    model = keras.Sequential([L.Dense(3), L.Dense(2)])
    optimizer = centralize(keras.optimizers.SGD(0.1), model)
    with pytest.raises(ValueError, match="has no weights yet: begin it with keras.Input"):
        print(optimizer.layout)
    assert optimizer.get_config()["layout"] is None
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(_noise(8, 4), _noise(8, 2), verbose=0)
    assert len(optimizer.layout) == 2


def test_model_that_changes_before_the_optimizer_is_built() -> None:
    model = _dense()
    optimizer = centralize(keras.optimizers.SGD(0.1), model)
    model.layers[0].enable_lora(2)
    _step(optimizer, model)
    assert {"lora_kernel_a", "lora_kernel_b"} <= {path.split("/")[-1] for path in optimizer.layout}


LOAD = """
import sys, numpy as np, keras
import gradcentral.integrations.keras
model = keras.saving.load_model(sys.argv[1])
optimizer = model.optimizer
assert type(optimizer).__name__ == "Centralized", optimizer
assert (optimizer.placement, optimizer.strength, len(optimizer.layout)) == ("update", 0.5, 2), optimizer.layout
x, y = np.load(sys.argv[2]).values()
model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
np.savez(sys.argv[3], *[keras.ops.convert_to_numpy(weight) for weight in model.trainable_variables])
"""


def test_saved_and_loaded_in_another_process(tmp_path: Path) -> None:
    x, y = _noise(32, 4).astype("float32"), _noise(32, 2, seed=2).astype("float32")
    model = _dense()
    inner = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    overrides = {model.layers[0].kernel.path: "i [o]"}
    model.compile(optimizer=centralize(inner, model, "update", strength=0.5, overrides=overrides), loss="mse")
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x, y)
    paths = [str(tmp_path / name) for name in ("model.keras", "data.npz", "weights.npz")]
    environment = {**os.environ, "KERAS_BACKEND": BACKEND}
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, *paths], check=True, env=environment)
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    with np.load(tmp_path / "weights.npz") as loaded:
        for expected, value in zip(_weights(model), loaded.values(), strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_saved_layout_of_another_model() -> None:
    model = _dense()
    config = centralize("sgd", model).get_config()
    optimizer = Centralized.from_config(config)
    other = keras.Sequential([keras.Input((5,)), L.Dense(2)])
    with pytest.raises(ValueError, match=r"call centralize\(optimizer.inner_optimizer, model\) again"):
        optimizer.build(other.trainable_variables)
    _step(centralize(optimizer.inner_optimizer, other), other)  # as the message says


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = _dense()
    sgd = keras.optimizers.SGD
    with pytest.raises(ValueError, match="unknown placement 'weights'; choose from 'gradient', 'regularized', 'upd"):
        centralize(sgd(0.1), model, "weights")
    with pytest.raises(ValueError, match="strength must be between 0 and 1, not 1.5"):
        centralize(sgd(0.1), model, strength=1.5)
    with pytest.raises(ValueError, match="strength must be between 0 and 1, not nan"):
        centralize(sgd(0.1), model, strength=float("nan"))
    with pytest.raises(TypeError, match="strength must be a number, not '0.5'"):
        centralize(sgd(0.1), model, strength="0.5")  # type: ignore[arg-type]
    for wrong in (None, sgd(0.1)):
        with pytest.raises(TypeError, match=r"model must be a Keras model, as in centralize\(optimizer, model\), not"):
            centralize(sgd(0.1), wrong)
    with pytest.raises(ValueError, match="nothing to center .the optimizer has no weight of the model"):
        _step(centralize(sgd(0.1), _dense()), model)
    centralized = centralize(sgd(0.1), model)
    with pytest.raises(ValueError, match="already centralized: pass optimizer.inner_optimizer"):
        centralize(centralized, model)
    assert len(centralize(centralized.inner_optimizer, model).layout) == 2
    with pytest.raises(ValueError, match="use_ema=True: use placement='gradient'"):
        centralize(sgd(0.1, use_ema=True), model, "update")
    assert len(centralize(sgd(0.1, use_ema=True), model).layout) == 2
    if hasattr(keras.optimizers, "ScheduleFreeAdamW"):
        with pytest.raises(ValueError, match="ScheduleFreeAdamW keeps: use placement='gradient'"):
            centralize(keras.optimizers.ScheduleFreeAdamW(0.1), model, "update")
        assert len(centralize(keras.optimizers.ScheduleFreeAdamW(0.1), model).layout) == 2
    lookup = keras.Sequential([keras.Input((3,), dtype="int32"), L.Embedding(7, 4)])
    with pytest.raises(ValueError, match="nothing to center .*lookup table.*pass overrides="):
        centralize("sgd", lookup)
    with pytest.raises(ValueError, match="2 gradients were given for 4 variables"):
        centralized.apply([ops.zeros(1), ops.zeros(1)], model.trainable_variables)


def test_a_result_that_is_not_used() -> None:
    """The optimizer that is passed does not change, unlike in torch, so the call alone has no effect."""
    model, sgd = _dense(), keras.optimizers.SGD(0.1)
    with pytest.warns(UserWarning, match="not used, so nothing will be centered: write optimizer = centralize"):
        centralize(sgd, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(centralize(sgd, model).layout) == 2
        optimizer = centralize(sgd, model)
        del optimizer  # as where a function that has compiled a model ends


def test_settings_of_the_inner_optimizer() -> None:
    model = _dense()
    optimizer = centralize(keras.optimizers.SGD(0.1, weight_decay=0.5), model)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    for name, value in (("clipnorm", 0.5), ("weight_decay", 0.1)):
        with pytest.raises(AttributeError, match=f"has no effect here: set optimizer.inner_optimizer.{name}"):
            setattr(optimizer, name, value)
    with pytest.raises(AttributeError, match=r"call centralize\(optimizer.inner_optimizer, model, strength=...\), and"):
        optimizer.strength = 0.5
    weaker = centralize(optimizer.inner_optimizer, model, strength=0.5)  # as the message says
    assert weaker.strength == 0.5
    bias = model.layers[0].bias
    bias.assign(ops.ones(3))
    optimizer.apply([ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    np.testing.assert_array_equal(as_numpy(bias), np.ones(3))


def test_constraints_and_update() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, kernel_constraint="non_neg"), L.Dense(2)])
    optimizer = centralize("sgd", model, "update")
    with pytest.raises(ValueError, match="would undo the constraint of .*: use placement='gradient', or skip") as error:
        optimizer.build(model.trainable_variables)
    path = model.layers[0].kernel.path
    assert f"{{{path!r}: None}}" in str(error.value)
    centralize("sgd", model, "update", overrides={path: None}).build(model.trainable_variables)
    centralize("sgd", model).build(model.trainable_variables)


def test_weight_decay_of_unknown_kind() -> None:
    class Own(keras.optimizers.SGD):  # type: ignore[misc]
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient + self.weight_decay * variable, variable, learning_rate)

    model = _dense()
    with pytest.raises(ValueError, match="whether that of Own is decoupled is unknown: use placement='update'"):
        centralize(Own(0.1, weight_decay=0.1), model, "regularized")
    for placement in ("update", "gradient"):
        optimizer = centralize(Own(0.1, weight_decay=0.1), model, placement)
        assert optimizer.placement == placement


@pytest.mark.skipif(BACKEND != "jax", reason="the torch backend imports torch")
def test_no_torch_is_imported() -> None:
    code = """
import sys, keras, numpy as np
from gradcentral.integrations.keras import centralize
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
model.compile(optimizer=centralize("sgd", model), loss="mse")
model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0)
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)


# --- The example ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(BACKEND != "jax", reason="tested with the example's default backend")
def test_compare_judges_the_example(tmp_path: Path) -> None:
    """The runs of a seed are paired, so that they differ by GC alone."""
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install gradcentral[experiments]")
    assert len(EXAMPLE.read_text().splitlines()) < 60
    example = load_task(EXAMPLE)
    assert isinstance(example, CustomTask)
    (again,) = islice(example.run(0, "none"), 1)
    task = CustomTask("keras", lambda seed, arm: islice(example.run(seed, arm), 1), metric_name="accuracy")
    result = compare(task, seeds=1, jobs=1, out=tmp_path, progress=False)
    assert result.report.exists()
    epochs = {(run.arm, run.seed): run.epochs[0] for run in result.all_runs}
    assert {arm for arm, _ in epochs} == {"none", "gradient", "update"}
    assert epochs["none", 0]["train_loss"] == again["train_loss"]
    assert epochs["none", 0]["train_loss"] != epochs["gradient", 0]["train_loss"]
    assert min(epoch["test_metric"] for epoch in epochs.values()) > 0.2  # 0.1 is chance


def test_the_code_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "jax-and-keras.md").read_text(encoding="utf-8")
    section = page[page.index("\n## Keras\n") :]
    blocks = re.findall(r"^```python\n(.*?)^```", section[: section.find("\n## ", 1)], re.M | re.S)
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["optimizer"].layout[f"{namespace['model'].name}/project/w"].pattern == "o [i]"


@pytest.mark.parametrize("module", ["keras", "keras_layout"])
def test_examples_of_the_docstrings(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"gradcentral.integrations.{module}"))
    assert results.attempted
    assert not results.failed
