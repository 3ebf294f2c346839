"""The layouts of Keras layers, proven by theorem 4.1.

KERAS_BACKEND chooses the backend, by default JAX; `make jax` runs these tests with each of the three. A layout does not
depend on the backend, so all layers are tested with torch, which need not compile their operations, and some with each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gradcentral import WeightVectors
from tests.integrations.keras_setup import BACKEND, as_numpy, float64, keras  # noqa: F401

from gradcentral.integrations.keras import centralize, weight_layout  # isort: skip, after the choice of the backend

GAMMA = 3.0

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Keras' own conversions to numpy and back.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


def _noise(*shape: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.RandomState(seed).normal(0.3, 1, shape)


# --- Theorem 4.1 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A weight of a layer, and the outputs of its units as a function of the inputs that they multiply."""

    layer: Callable[[], Any]
    inputs: tuple[int, ...]
    """Shape of the layer's inputs, without the batch."""
    weight: str
    """End of the weight's path."""
    pattern: str
    all_but_last: bool
    """Whether the mean over all axes but the last is right, as other code for Keras takes it."""
    outputs: Callable[[Any, Any], Any] = lambda layer, x: layer(x)
    unit_inputs: tuple[int, ...] | None = None
    """Shape of the inputs that the weight multiplies, if it differs."""


def _interior(layer: Any, x: Any) -> Any:
    """Leave out the border, whose outputs are sums over a part of the taps."""
    y = as_numpy(layer(x))
    inside = [slice(None), *[slice(6, -6)] * (y.ndim - 2)]
    return y[tuple(inside)]


def _in_layer(name: str) -> Callable[[Any, Any], Any]:
    def outputs(layer: Any, x: Any) -> Any:
        return next(each for each in layer._flatten_layers() if each.name == name)(x)

    return outputs


def _gates(inputs: Callable[[Any], list[Any]], count: int) -> Callable[[Any, Any], Any]:
    """Record what a recurrent cell passes to its activations, which is the output of the units of its kernels."""

    def outputs(layer: Any, x: Any) -> Any:
        recorded = []

        def record(values: Any) -> Any:
            recorded.append(as_numpy(values))
            return keras.ops.ones_like(values)

        cell = layer.cell
        cell.activation = cell.recurrent_activation = record
        first, *states = inputs(x)
        cell.call(first, states)
        gates = np.stack(recorded[:count], -1)
        return gates[:, 2:-2, 2:-2] if gates.ndim > 3 else gates

    return outputs


def _zeros(*shape: int) -> Any:
    return keras.ops.zeros((2, *shape), dtype="float64")


def _float64_of(variable: Any) -> Any:
    return keras.ops.cast(variable, "float64")


def _lora(layer: Any, rank: int = 2) -> Callable[[], Any]:
    class WithLora(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer()

        def build(self, shape: Any) -> None:
            self.inner.build(shape)
            self.inner.enable_lora(rank)

        def call(self, x: Any) -> Any:
            return self.inner(x)

    return WithLora


L = keras.layers
EINSUM = {
    "abc,cde->abde": ((5, 6), (None, 3, 2), "[c] d e", False),  # projection of an attention
    "ab,bcd->acd": ((6,), (3, 2), "[b] c d", False),
    "abcd,cde->abe": ((5, 3, 2), (None, 4), "[c d] e", True),  # output of an attention
    "abc,bcd->abd": ((3, 4), (3, 5), "b [c] d", False),  # one matrix per position
    "...x,xy->...y": ((5, 4), (5, 3), "[x] y", True),
}

CASES = {
    "Dense": Case(lambda: L.Dense(3), (4,), "/kernel", "[i] o", True),
    **{
        f"EinsumDense {equation}": Case(
            lambda equation=equation, shape=shape: L.EinsumDense(equation, shape),  # type: ignore[misc]
            inputs,
            "/kernel",
            pattern,
            right,
        )
        for equation, (inputs, shape, pattern, right) in EINSUM.items()
    },
    "Conv1D": Case(lambda: L.Conv1D(3, 3), (7, 2), "/kernel", "[k i] o", True),
    "Conv2D": Case(lambda: L.Conv2D(3, (3, 2)), (7, 7, 2), "/kernel", "[k k i] o", True),
    "Conv2D, groups": Case(lambda: L.Conv2D(4, 3, groups=2), (7, 7, 4), "/kernel", "[k k i] o", True),
    "Conv2D, stride": Case(lambda: L.Conv2D(3, 3, strides=2), (7, 7, 2), "/kernel", "[k k i] o", True),
    "Conv3D": Case(lambda: L.Conv3D(3, 2), (4, 4, 4, 2), "/kernel", "[k k k i] o", True),
    "Conv1DTranspose": Case(lambda: L.Conv1DTranspose(3, 3), (16, 2), "/kernel", "[3] o [i]", False, _interior),
    "Conv2DTranspose": Case(
        lambda: L.Conv2DTranspose(3, (3, 2)), (16, 16, 2), "/kernel", "[3] [2] o [i]", False, _interior
    ),
    "Conv3DTranspose": Case(
        lambda: L.Conv3DTranspose(2, 2), (14, 14, 14, 2), "/kernel", "[2] [2] [2] o [i]", False, _interior
    ),
    "Conv2DTranspose, stride 2, kernel 4": Case(
        lambda: L.Conv2DTranspose(3, 4, strides=2, padding="same"),
        (9, 9, 2),
        "/kernel",
        "([m] 2) ([m] 2) o [i]",
        False,
        _interior,
    ),
    "Conv2DTranspose, stride 2, kernel 2": Case(
        lambda: L.Conv2DTranspose(3, 2, strides=2), (9, 9, 4), "/kernel", "2 2 o [i]", False, _interior
    ),
    "DepthwiseConv1D": Case(lambda: L.DepthwiseConv1D(3, depth_multiplier=2), (7, 3), "/kernel", "[k] c m", False),
    "DepthwiseConv2D": Case(lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (7, 7, 3), "/kernel", "[k k] c m", False),
    "SeparableConv1D, depthwise": Case(
        lambda: L.SeparableConv1D(4, 3),
        (7, 3),
        "/depthwise_kernel",
        "[k] c m",
        False,
        lambda layer, x: keras.ops.depthwise_conv(x, layer.depthwise_kernel, data_format="channels_last"),
    ),
    "SeparableConv2D, depthwise": Case(
        lambda: L.SeparableConv2D(4, 3, depth_multiplier=2),
        (7, 7, 3),
        "/depthwise_kernel",
        "[k k] c m",
        False,
        lambda layer, x: keras.ops.depthwise_conv(x, layer.depthwise_kernel, data_format="channels_last"),
    ),
    "SeparableConv2D, pointwise": Case(
        lambda: L.SeparableConv2D(4, 3, depth_multiplier=2),
        (7, 7, 3),
        "/pointwise_kernel",
        "[k k i] o",
        True,
        lambda layer, x: keras.ops.conv(x, layer.pointwise_kernel, data_format="channels_last"),
        (7, 7, 6),
    ),
    **{
        f"{name}{weight}": Case(
            lambda name=name: getattr(L, name)(3),  # type: ignore[misc]
            (5, 4),
            weight,
            "[i] o",
            True,
            _gates(
                (lambda x, states=states: [x, *[_zeros(3)] * states])  # type: ignore[misc]
                if weight == "_cell/kernel"
                else (lambda h, states=states: [_zeros(4), h, *[_zeros(3)] * (states - 1)]),  # type: ignore[misc]
                gates,
            ),
            (4,) if weight == "_cell/kernel" else (3,),
        )
        for name, states, gates in (("SimpleRNN", 1, 1), ("GRU", 1, 3), ("LSTM", 2, 4))
        for weight in ("_cell/kernel", "_cell/recurrent_kernel")
    },
    "ConvLSTM2D, kernel": Case(
        lambda: L.ConvLSTM2D(2, 3),
        (4, 9, 9, 3),
        "/kernel",
        "[k k i] o",
        True,
        _gates(lambda x: [x, _zeros(7, 7, 2), _zeros(7, 7, 2)], 4),
        (9, 9, 3),
    ),
    "ConvLSTM2D, recurrent_kernel": Case(
        lambda: L.ConvLSTM2D(2, 3),
        (4, 9, 9, 3),
        "/recurrent_kernel",
        "[k k i] o",
        True,
        _gates(lambda h: [_zeros(9, 9, 3), h, _zeros(7, 7, 2)], 4),
        (7, 7, 2),
    ),
    **{
        f"MultiHeadAttention, {name}": Case(
            lambda: _self_attention(L.MultiHeadAttention(2, 3)),
            (5, 4),
            f"/{name}/kernel",
            "[c] d e",
            False,
            _in_layer(name),
        )
        for name in ("query", "key", "value")
    },
    "MultiHeadAttention, output": Case(
        lambda: _self_attention(L.MultiHeadAttention(2, 3)),
        (5, 4),
        "/attention_output/kernel",
        "[c d] e",
        True,
        _in_layer("attention_output"),
        (5, 2, 3),
    ),
    "GroupedQueryAttention, key": Case(
        lambda: _self_attention(L.GroupQueryAttention(3, 4, 2)),
        (5, 4),
        "/key/kernel",
        "[d] v h",
        False,
        _in_layer("key"),
    ),
    "Dense, LoRA a": Case(
        _lora(lambda: L.Dense(3)),
        (4,),
        "/lora_kernel_a",
        "[i] o",
        True,
        lambda layer, x: keras.ops.matmul(x, _float64_of(layer.inner.lora_kernel_a)),
    ),
    "Dense, LoRA b": Case(
        _lora(lambda: L.Dense(3)),
        (4,),
        "/lora_kernel_b",
        "[i] o",
        True,
        lambda layer, x: keras.ops.matmul(x, _float64_of(layer.inner.lora_kernel_b)),
        (2,),
    ),
    "EinsumDense, LoRA a": Case(
        _lora(lambda: L.EinsumDense("abc,cde->abde", (None, 3, 5))),
        (5, 4),
        "/lora_kernel_a",
        "[c] d rank",
        False,
        lambda layer, x: keras.ops.einsum("abc,cdr->abdr", x, _float64_of(layer.inner.lora_kernel_a)),
    ),
    "Conv2D, LoRA a": Case(
        _lora(lambda: L.Conv2D(4, 3)),
        (7, 7, 2),
        "/lora_kernel_a",
        "[k k i] o",
        True,
        lambda layer, x: keras.ops.conv(x, _float64_of(layer.inner.lora_kernel_a), data_format="channels_last"),
    ),
}


ON_EACH_BACKEND = (
    "Dense",
    "Conv2D, groups",
    "Conv2DTranspose, stride 2, kernel 4",
    "DepthwiseConv2D",
    "LSTM_cell/kernel",
    "MultiHeadAttention, query",
)
TESTED = list(CASES) if BACKEND == "torch" else ON_EACH_BACKEND


def _self_attention(attention: Any) -> Any:
    class SelfAttention(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def build(self, shape: Any) -> None:
            self.attention.build(shape, shape)

        def call(self, x: Any) -> Any:
            return self.attention(x, x)

    return SelfAttention()


def _change_of_outputs(case: Case, layer: Any) -> np.ndarray[Any, Any]:
    """Return by how much the outputs of all units change if γ is added to all of their inputs."""
    x = _noise(2, *(case.unit_inputs or case.inputs))
    before, after = (as_numpy(case.outputs(layer, keras.ops.convert_to_tensor(each))) for each in (x, x + GAMMA))
    change: np.ndarray[Any, Any] = after - before
    return change


def _drift(case: Case, overrides: dict[str, WeightVectors] | None) -> tuple[float, np.ndarray[Any, Any], Any]:
    """Return by how much that change differs after five steps, the change at first, and the unit sums γ·Σw⁰."""
    layer = case.layer()
    model = keras.Sequential([keras.Input(case.inputs), layer])
    optimizer = centralize(keras.optimizers.SGD(0.1, momentum=0.9), model, overrides=overrides)
    weight = next(each for each in model.trainable_variables if each.path.endswith(case.weight))
    vectors = optimizer.layout[weight.path]
    # Gradients of any kind, since the theorem holds for all of them; but γ·Σw⁰ must not be 0.
    weight.assign(_noise(*weight.shape, seed=2))
    w0 = as_numpy(weight).reshape(vectors.dims).astype("float64")
    first = _change_of_outputs(case, layer)
    for seed in range(5):
        gradients = [_noise(*each.shape, seed=seed) for each in model.trainable_variables]
        optimizer.apply([keras.ops.convert_to_tensor(each) for each in gradients], model.trainable_variables)
    assert np.abs(as_numpy(weight).reshape(vectors.dims) - w0).max() > 0.1, "the weights have not been trained"
    return float(np.abs(_change_of_outputs(case, layer) - first).max()), first, GAMMA * w0.sum(vectors.span)


@pytest.mark.parametrize("name", TESTED)
def test_theorem_4_1(name: str) -> None:
    """A constant γ added to one unit's inputs changes its output by γ·Σw⁰, as before training."""
    case = CASES[name]
    model = keras.Sequential([keras.Input(case.inputs), case.layer()])
    layout = weight_layout(model)
    (path,) = (path for path in layout if path.endswith(case.weight))
    assert layout[path].agrees_with(WeightVectors.parse(case.pattern, layout[path].shape or ()))
    assert not layout.unknown
    drift, first, sums = _drift(case, None)
    precision = 1e-6 if "lora" in case.weight else 1e-13  # Keras keeps the factors of LoRA in float32
    assert drift < 10 * precision * np.abs(first).max()
    # The changes of the outputs are these sums and no others, so the layout has exactly the layer's units.
    assert np.unique(first.round(9)) == pytest.approx(np.unique(sums.round(9)), abs=1e-8)


@pytest.mark.parametrize("name", TESTED)
def test_theorem_4_1_fails_for_axes_that_ignore_the_layer(name: str) -> None:
    """Of all axes but the last, and of axes 1 and up as in optax, the documentation says where they are right."""
    case = CASES[name]
    model = keras.Sequential([keras.Input(case.inputs), case.layer()])
    ndim = next(len(v.shape) for v in model.trainable_variables if v.path.endswith(case.weight))
    selector = f"*{case.weight}"
    drift, *_ = _drift(case, {selector: WeightVectors(span=tuple(range(ndim - 1)))})
    assert (drift < 1e-5) == case.all_but_last
    drift, *_ = _drift(case, {selector: WeightVectors(span=tuple(range(1, ndim)))})
    assert drift > 1e-3, "axes 1 and up are right for no kernel of Keras"


# --- Decisions --------------------------------------------------------------------------------------------------------


def test_what_is_skipped_and_why() -> None:
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            L.Embedding(9, 4),
            L.LayerNormalization(),
            L.Conv1D(4, 3),
            L.BatchNormalization(),
            L.PReLU(),
            L.DepthwiseConv1D(1),
            L.Flatten(),
            L.Dense(2),
        ]
    )
    layout = weight_layout(model)
    assert [vectors.pattern for vectors in layout.values()] == ["[k i] o", "[i] o"]
    assert not layout.unknown
    reasons = {path.split("/", 1)[1]: reason for path, reason in layout.skipped.items()}
    names = [layer.name for layer in model.layers]
    assert reasons[f"{names[0]}/embeddings"].startswith("lookup table")
    assert reasons[f"{names[1]}/gamma"] == reasons[f"{names[3]}/gamma"] == "gain of a normalization"
    assert reasons[f"{names[4]}/alpha"] == "parameter of an activation"
    assert reasons[f"{names[5]}/kernel"] == "fan-in 1: its centered gradient is always zero"
    assert reasons[f"{names[7]}/bias"] == "bias"


def test_unknown_layers_are_skipped_and_reported_and_overrides_decide() -> None:
    class Project(keras.layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(3, shape[-1]), name="w")

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, keras.ops.transpose(self.w))

    model = keras.Sequential([keras.Input((4,)), Project(name="project"), L.Dense(2)])
    layout = weight_layout(model)
    (unknown,) = layout.unknown
    assert (unknown.name, unknown.reason) == (f"{model.name}/project/w", "no rule for Project.w")
    assert f'"{unknown.name}": None,  # 3×4; "[i] o" if used as x @ w' in str(layout)
    decided = weight_layout(model, overrides={"**/project/w": "o [i]"})
    assert decided[unknown.name].pattern == "o [i]"
    assert not decided.unknown
    assert unknown.name not in weight_layout(model, overrides={"**/project/w": None})
    with pytest.raises(ValueError, match="overrides: 'projekt/w' matches no parameter of the model"):
        weight_layout(model, overrides={"projekt/w": "o [i]"})
    with pytest.raises(ValueError, match=r"overrides: .*/project/w: pattern 'o \[i k\]'"):
        weight_layout(model, overrides={"**/project/w": "o [i k]"})


def test_subclasses_whose_kernel_has_other_sizes_are_reported() -> None:
    class Transposed(keras.layers.Dense):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self._kernel = self.add_weight(shape=(self.units, shape[-1]), name="kernel")
            self.bias = None
            self.built = True

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, keras.ops.transpose(self._kernel))

    model = keras.Sequential([keras.Input((4,)), Transposed(3)])
    (unknown,) = weight_layout(model).unknown
    assert unknown.reason.startswith("Dense.kernel: pattern '[i] o'")


def test_frozen_weights_are_shown_and_a_shared_weight_is_decided_by_all_its_layers() -> None:
    class Tied(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, dense: Any) -> None:
            super().__init__()
            self.kernel = dense.kernel

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, keras.ops.transpose(self.kernel))

    first, second = L.Dense(3, use_bias=False), L.Dense(2)
    second.trainable = False
    model = keras.Sequential([keras.Input((4,)), first, second])
    assert "; not trained" in str(weight_layout(model))
    model = keras.Sequential([keras.Input((4,)), first, Tied(first)])
    (entry,) = weight_layout(model).entries
    assert entry.reason.startswith("shared by ")
    assert "Dense" in entry.reason
    assert entry.vectors is None


def test_a_wrapper_that_refers_to_the_weight_of_its_layer() -> None:
    model = keras.Sequential([keras.Input((4,)), L.SpectralNormalization(L.Dense(3))])
    assert [vectors.pattern for vectors in weight_layout(model).values()] == ["[i] o"]


def test_layers_inside_of_others() -> None:
    """A layer that is called twice, a model in a model, cells and wrappers of recurrent layers."""
    x = keras.Input((4,))
    twice = L.Dense(4, name="twice")
    h = keras.Sequential([keras.Input((4,)), L.Dense(6)], name="inner")(twice(twice(x)))
    h = L.TimeDistributed(L.Dense(3))(L.Reshape((2, 3))(h))
    h = L.RNN([L.GRUCell(3), L.LSTMCell(2)])(L.Bidirectional(L.LSTM(3, return_sequences=True))(h))
    layout = weight_layout(keras.Model(x, h))
    assert {vectors.pattern for vectors in layout.values()} == {"[i] o"}
    assert len(layout) == 2 + 1 + 4 + 4
    assert [layout[path].count for path in layout if path.endswith("gru_cell/kernel")] == [9]
    assert not layout.unknown


def test_a_model_without_weights() -> None:
    with pytest.raises(
        ValueError, match=r"begin it with keras.Input\(shape\), or call model.build\(input_shape\) first"
    ):
        weight_layout(keras.Sequential([L.Dense(2)]))
    model = keras.Sequential([L.Dense(2)])
    model.build((None, 4))  # as the message says
    assert len(weight_layout(model)) == 1
