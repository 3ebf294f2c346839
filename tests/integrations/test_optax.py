"""`centralize` as a gradient transformation, for models of Flax, Equinox and Haiku."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("optax", reason="needs optax: run `make jax`")
pytest.importorskip("flax", reason="needs flax: run `make jax`")
pytest.importorskip("equinox", reason="needs equinox: run `make jax`")
pytest.importorskip("haiku", reason="needs haiku: run `make jax`")

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import gradcentral
from gradcentral.integrations.optax import centralize, models, transformation, weight_layout

KEY = jax.random.key(0)
PARAMS = {"Dense_0": {"kernel": (5, 4), "bias": (4,)}, "Dense_1": {"kernel": (4, 3)}}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def _random(seed: int, shapes: Any = PARAMS, dtype: Any = jnp.float64) -> Any:
    """Return a tree of random arrays, whose means are not zero."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    numbers = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(numbers.normal(1, 1, shape), dtype) for shape in leaves])


def _equal(one: Any, other: Any, tolerance: float = 1e-13) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), one, other)


def _by_hand(tree: Any, strength: float = 1.0) -> Any:
    """Center the columns of the matrices in a tree."""
    return jax.tree.map(lambda g: g - strength * g.mean(0, keepdims=True) if g.ndim == 2 else g, tree)


def _step(optimizer: optax.GradientTransformation, grads: Any, params: Any) -> Any:
    return optimizer.update(grads, optimizer.init(params), params)[0]


class TestPlacements:
    def test_gradient_centers_what_the_optimizer_receives(self) -> None:
        params, grads = _random(0), _random(1)
        updates = _step(optax.chain(centralize(params), optax.adamw(0.1, weight_decay=0.1)), grads, params)
        _equal(updates, _step(optax.adamw(0.1, weight_decay=0.1), _by_hand(grads), params))

    def test_update_centers_the_whole_change(self) -> None:
        params, grads = _random(0), _random(1)
        plain = optax.adamw(0.1, weight_decay=0.1)
        updates = _step(optax.chain(plain, centralize(params, "update")), grads, params)
        _equal(updates, _by_hand(_step(plain, grads, params)))

    def test_regularized_centers_the_sum_with_weight_decay(self) -> None:
        params, grads = _random(0), _random(1)
        decay = optax.add_decayed_weights(0.3)
        rule = centralize(params, "regularized", weight_decay=0.3)
        updates = _step(optax.chain(rule, decay, optax.adam(0.1)), grads, params)
        _equal(updates, _step(optax.chain(decay, centralize(params), optax.adam(0.1)), grads, params))
        summed = jax.tree.map(lambda g, w: g + 0.3 * w, grads, params)
        by_hand = jax.tree.map(lambda g, w: g - 0.3 * w, _by_hand(summed), params)
        _equal(_step(rule, grads, params), by_hand)

    @pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, np.float64(0.25)])
    def test_strength_subtracts_a_part_of_the_mean(self, strength: float) -> None:
        params, grads = _random(0), _random(1)
        _equal(_step(centralize(params, strength=strength), grads, params), _by_hand(grads, float(strength)))
        rule = centralize(params, "regularized", strength=strength, weight_decay=0.3)
        summed = jax.tree.map(lambda g, w: g + 0.3 * w, grads, params)
        by_hand = jax.tree.map(lambda g, w: g - 0.3 * w, _by_hand(summed, float(strength)), params)
        _equal(_step(rule, grads, params), by_hand)

    def test_strength_follows_a_schedule_by_inject_hyperparams(self) -> None:
        params, grads = _random(0), _random(1)
        schedule = optax.linear_schedule(1.0, 0.0, 2)
        injected = optax.inject_hyperparams(centralize, static_args=("layout", "placement"))
        optimizer = injected(weight_layout(params), strength=schedule)
        state = optimizer.init(params)
        for strength in (1.0, 0.5, 0.0):
            updates, state = jax.jit(optimizer.update)(grads, state)
            _equal(updates, _by_hand(grads, strength))

    def test_strength_zero_changes_nothing_even_if_a_gradient_is_infinite(self) -> None:
        params, grads = _random(0), _random(1)
        grads["Dense_0"]["kernel"] = grads["Dense_0"]["kernel"].at[2, 1].set(jnp.inf)
        for placement in ("gradient", "update"):
            _equal(_step(centralize(params, placement, strength=0), grads, params), grads)

    def test_what_is_not_finite_stays_in_its_weight_vector(self) -> None:
        params, grads = _random(0), _random(1)
        grads["Dense_0"]["kernel"] = grads["Dense_0"]["kernel"].at[2, 1].set(jnp.nan)
        centered = _step(centralize(params), grads, params)["Dense_0"]["kernel"]
        assert np.isnan(centered).sum(0).tolist() == [0, 5, 0, 0]
        centered = _step(centralize(params, "update"), grads, params)["Dense_0"]["kernel"]
        assert np.isnan(centered).sum(0).tolist() == [0, 1, 0, 0], "as for torch, whose weights are not shifted then"

    def test_half_precision_is_summed_in_float32(self) -> None:
        grads = {"Dense_0": {"kernel": jnp.full((4096, 2), 1.01, jnp.bfloat16).at[0].set(3.0)}}
        centered = _step(centralize(grads), grads, grads)["Dense_0"]["kernel"]
        assert centered.dtype == jnp.bfloat16
        wide = np.asarray(grads["Dense_0"]["kernel"], np.float32)
        expected = (wide - wide.mean(0, dtype=np.float64)).astype(jnp.bfloat16)
        _equal(centered.astype(float), expected.astype(float), 1e-5)

    def test_complex_gradients_are_centered(self) -> None:
        params = _random(0, dtype=jnp.complex128)
        grads = jax.tree.map(lambda a, b: a + 1j * b, _random(1), _random(2))
        _equal(_step(centralize(params), grads, params), _by_hand(grads))


class TestTransformations:
    """The same numbers under jit, vmap, scan, masks and on several devices."""

    def test_jit(self) -> None:
        params, grads = _random(0), _random(1)
        optimizer = centralize(params)
        _equal(jax.jit(optimizer.update)(grads, optimizer.init(params))[0], _by_hand(grads))

    def test_vmap_over_models(self) -> None:
        params = _random(0)
        grads = [_random(seed) for seed in range(3)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
        update = centralize(params).update
        centered = jax.vmap(lambda grads: update(grads, optax.EmptyState())[0])(stacked)
        for position, each in enumerate(grads):
            _equal(jax.tree.map(lambda leaf, position=position: leaf[position], centered), _by_hand(each))

    def test_scan_over_layers(self) -> None:
        """The parameters of layers in a scan have an axis in front; each of its slices is centered by itself."""

        class Block(linen.Module):
            @linen.compact
            def __call__(self, x: Any, _: None) -> Any:
                return x + linen.Dense(4, param_dtype=jnp.float64)(x), None

        class Blocks(linen.Module):
            @linen.compact
            def __call__(self, x: Any) -> Any:
                layers = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
                return layers(name="blocks")(x, None)[0]

        model, x = Blocks(), _random(3, (2, 4))
        params = model.init(KEY, x)["params"]
        layout = weight_layout(lambda: model.init(KEY, x))
        assert layout["blocks/Dense_0/kernel"].pattern == "l [i] o"
        assert not layout.unknown
        grads = jax.grad(lambda params: (model.apply({"params": params}, x) ** 2).sum())(params)
        centered = _step(centralize(layout), grads, params)["blocks"]["Dense_0"]["kernel"]
        before = grads["blocks"]["Dense_0"]["kernel"]
        for layer in range(4):
            _equal(centered[layer], before[layer] - before[layer].mean(0))

    def test_masked_parameters_and_parts_are_left_out(self) -> None:
        params, grads = _random(0), _random(1)
        mask = {"Dense_0": {"kernel": False, "bias": True}, "Dense_1": {"kernel": True}}
        updates = _step(optax.masked(centralize(params), mask), grads, params)
        _equal(updates["Dense_0"], grads["Dense_0"])
        _equal(updates["Dense_1"], _by_hand(grads["Dense_1"]))
        labels = {"Dense_0": "plain", "Dense_1": "centered"}
        rules = {"plain": optax.identity(), "centered": centralize(params)}
        _equal(_step(optax.partition(rules, labels), grads, params), updates)

    def test_accumulation_by_multi_steps(self) -> None:
        params, grads = _random(0), [_random(1), _random(2)]
        optimizer = optax.MultiSteps(optax.chain(centralize(params), optax.sgd(1.0)), every_k_schedule=2)
        state = optimizer.init(params)
        for each in grads:
            updates, state = optimizer.update(each, state, params)
        mean = jax.tree.map(lambda a, b: -(a + b) / 2, *grads)
        _equal(updates, _by_hand(mean), 1e-6)  # MultiSteps accumulates in float32

    def test_sharded_arrays(self) -> None:
        """On two devices, with the axis of the mean sharded: the partial sums are reduced over the devices."""
        code = """
            import os
            os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
            os.environ["JAX_PLATFORMS"] = "cpu"
            import jax, jax.numpy as jnp, numpy as np, optax, sys
            from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
            from gradcentral.integrations.optax import centralize
            jax.config.update("jax_enable_x64", True)
            mesh = Mesh(np.array(jax.devices()), ("m",))
            w = jnp.asarray(np.random.default_rng(0).normal(1, 1, (6, 4)))
            optimizer = optax.chain(centralize({"Dense_0": {"kernel": w}}), optax.sgd(-1.0))
            for spec in (P("m", None), P(None, "m"), P()):
                params = {"Dense_0": {"kernel": jax.device_put(w, NamedSharding(mesh, spec))}}
                updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
                kernel = updates["Dense_0"]["kernel"]
                assert len(kernel.sharding.device_set) == 2
                np.testing.assert_allclose(kernel, w - w.mean(0), atol=1e-14)
            assert "torch" not in sys.modules
            print("equal")
        """
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        assert run.stdout == "equal\n", run.stderr


class TestLibraries:
    """The trees that each library gives to an optimizer."""

    def test_nnx_optimizer(self) -> None:
        model = nnx.Sequential(
            nnx.Linear(5, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
            nnx.LoRALinear(4, 3, lora_rank=2, param_dtype=jnp.float64, lora_param_type=nnx.Param, rngs=nnx.Rngs(1)),
        )
        layout = weight_layout(model)
        patterns = {name: layout[name].pattern for name in layout}
        assert patterns == dict.fromkeys(
            ["layers/0/kernel", "layers/1/kernel", "layers/1/lora/lora_a", "layers/1/lora/lora_b"], "[i] o"
        )
        sums = [model.layers[0].kernel.get_value().sum(0), model.layers[1].lora.lora_a.get_value().sum(0)]
        before = model.layers[0].kernel.get_value()
        rule = centralize(layout, "update")
        optimizer = nnx.Optimizer(model, optax.chain(optax.adamw(0.1, weight_decay=0.1), rule), wrt=nnx.Param)
        x = _random(3, (8, 5))
        for _ in range(3):
            optimizer.update(model, nnx.grad(lambda model: ((model(x) - 1) ** 2).mean())(model))
        assert jnp.abs(model.layers[0].kernel.get_value() - before).max() > 0.1
        now = [model.layers[0].kernel.get_value().sum(0), model.layers[1].lora.lora_a.get_value().sum(0)]
        _equal(now, sums, 1e-6)  # LoRA's parameters are in float32

    def test_nnx_layers_stacked_by_vmap(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(5, 4, rngs=rngs)

        layout = weight_layout(create(nnx.Rngs(0)))
        assert (layout["kernel"].pattern, layout["kernel"].count) == ("l [i] o", 12)

    def test_equinox(self) -> None:
        model = eqx.nn.MLP(5, 3, 4, 1, key=KEY, dtype=jnp.float64)
        layout = weight_layout(model)
        assert [*layout] == ["layers/0/weight", "layers/1/weight"]
        params, static = eqx.partition(model, eqx.is_inexact_array)
        grads = jax.grad(lambda params: (eqx.combine(params, static)(jnp.ones(5)) ** 2).sum())(params)
        optimizer = centralize(layout)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        weight = grads.layers[0].weight
        _equal(updates.layers[0].weight, weight - weight.mean(1, keepdims=True))

    def test_equinox_layers_stacked_by_vmap(self) -> None:
        stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 4, key=key))(jax.random.split(KEY, 3))
        assert weight_layout(stacked)["weight"].pattern == "l o [i]"

    def test_train_state_and_frozen_parameters(self) -> None:
        model, x = linen.Dense(4), jnp.ones((2, 5))
        optimizer = optax.chain(centralize(weight_layout(lambda: model.init(KEY, x))), optax.sgd(-1.0))
        variables = model.init(KEY, x)
        for params in (variables, variables["params"], freeze(variables["params"])):
            grads = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), params)
            state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
            state = jax.jit(TrainState.apply_gradients)(state, grads=grads)
            _equal(jax.tree.map(jnp.subtract, state.params, params), _by_hand(grads), 1e-5)

    def test_trees_of_models(self) -> None:
        """Also under keys that are names of a dictionary's methods."""
        layout = weight_layout({"items": eqx.nn.Linear(5, 4, key=KEY), "update": [eqx.nn.Linear(4, 3, key=KEY)]})
        assert [*layout] == ["items/weight", "update/0/weight"]
        layout = weight_layout([nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.Conv(4, 3, (3,), rngs=nnx.Rngs(0))])
        assert [layout[name].pattern for name in layout] == ["[i] o", "[k i] o"]

    def test_shapes_without_arrays(self) -> None:
        layout = weight_layout(eqx.filter_eval_shape(eqx.nn.MLP, 5, 3, 4, 1, key=KEY))
        assert [*layout] == ["layers/0/weight", "layers/1/weight"]
        assert [*weight_layout(nnx.eval_shape(lambda: nnx.Linear(5, 4, rngs=nnx.Rngs(0))))] == ["kernel"]

    def test_the_state_of_an_nnx_model(self) -> None:
        """The state does not tell the layers; the layout of the model fits it."""
        model = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
        state = nnx.state(model, nnx.Param)
        assert "The model tells the layers, which its state does not: weight_layout(model)" in str(weight_layout(state))
        updates = _step(centralize(weight_layout(model)), state, state)
        _equal(updates["kernel"].get_value(), _by_hand(model.kernel.get_value()), 1e-6)

    def test_haiku_layer_stack(self) -> None:
        stack = lambda x: hk.experimental.layer_stack(3)(lambda h: hk.Linear(5)(h))(hk.Linear(5)(x))  # noqa: E731
        model, x = hk.transform(stack), jnp.ones((2, 7))
        layout = weight_layout(lambda: model.init(KEY, x))
        assert {name: layout[name].pattern for name in layout} == {
            "__layer_stack_no_per_layer/linear/w": "l [i] o",
            "linear/w": "[i] o",
        }

    def test_equinox_cells_norms_and_lookups(self) -> None:
        model = {
            "lstm": eqx.nn.LSTMCell(5, 4, key=KEY),
            "gru": eqx.nn.GRUCell(5, 4, key=KEY),
            "attention": eqx.nn.MultiheadAttention(2, 4, key=KEY),
            "norm": eqx.nn.LayerNorm(4),
            "table": eqx.nn.Embedding(9, 4, key=KEY),
            "slope": eqx.nn.PReLU(0.1),
        }
        layout = weight_layout(model)
        assert {layout[name].pattern for name in layout} == {"o [i]"}
        assert layout["lstm/weight_ih"].count == 16
        assert layout["gru/weight_hh"].count == 12
        assert sum(name.startswith("attention") for name in layout) == 4
        assert not layout.unknown

    @pytest.mark.parametrize("stateful", [False, True])
    def test_haiku(self, stateful: bool) -> None:
        def forward(x: Any) -> Any:
            if stateful:
                x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
            return hk.nets.MLP([4, 3])(x) + hk.get_parameter("scaling", (5, 3), init=jnp.ones).sum()

        model = (hk.transform_with_state if stateful else hk.transform)(forward)
        x = _random(3, (8, 5))
        layout = weight_layout(lambda: model.init(KEY, x))
        assert [*layout] == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
        assert [entry.name for entry in layout.unknown] == ["~/scaling"]
        params = model.init(KEY, x)[0] if stateful else model.init(KEY, x)
        grads = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(0).normal(1, 1, leaf.shape)), params)
        centered = _step(centralize(layout), grads, params)
        _equal(centered["mlp/~/linear_0"], _by_hand(grads["mlp/~/linear_0"]))
        _equal(centered["~"], grads["~"])

    def test_haiku_cells_and_attention(self) -> None:
        def forward(x: Any) -> Any:
            states = [core(x, core.initial_state(len(x)))[0] for core in (hk.LSTM(4), hk.GRU(4), hk.VanillaRNN(4))]
            y = hk.MultiHeadAttention(2, 3, model_size=4, w_init=hk.initializers.Constant(0.1))(*[sum(states)] * 3)
            return hk.LayerNorm(-1, True, True)(y) + hk.Embed(7, 4)(jnp.array([1]))

        model = hk.transform(forward)
        layout = weight_layout(lambda: model.init(KEY, jnp.ones((8, 5))))
        assert {layout[name].pattern for name in layout} == {"[i] o"}
        assert layout["lstm/linear/w"].fan_in == 9
        assert layout["gru/w_i"].count == layout["gru/w_h"].count == 12
        assert sum(name.startswith("multi_head_attention") for name in layout) == 4
        assert not layout.unknown

    def test_linen_with_sharding_metadata_and_all_variables(self) -> None:
        init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
        model = linen.Dense(4, kernel_init=init)
        variables = model.init(KEY, jnp.ones((1, 5)))
        layout = weight_layout(lambda: model.init(KEY, jnp.ones((1, 5))))
        assert [*layout] == ["kernel"]
        assert [*weight_layout({"Dense_0": variables["params"]})] == ["Dense_0/kernel"]
        for tree in (variables, variables["params"], linen.meta.unbox(variables)):
            grads = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), tree)
            _equal(_step(centralize(layout), grads, tree), _by_hand(grads), 1e-6)

    def test_linen_transformer_layers(self) -> None:
        class Model(linen.Module):
            @linen.compact
            def __call__(self, tokens: Any) -> Any:
                x = linen.Embed(9, 6)(tokens)
                x = linen.remat(linen.Dense)(6)(linen.LayerNorm()(x))
                x = linen.MultiHeadDotProductAttention(2, qkv_features=8)(x, x)
                x = linen.RNN(linen.OptimizedLSTMCell(6), name="rnn")(x) + linen.RNN(linen.GRUCell(6), name="gru")(x)
                x = linen.RNN(linen.LSTMCell(6))(x) + linen.RNN(linen.SimpleCell(6))(x)
                return linen.BatchNorm(use_running_average=False)(linen.WeightNorm(linen.Dense(3))(x))

        layout = weight_layout(lambda: Model().init(KEY, jnp.ones((2, 5), int)))
        assert not layout.unknown
        attention = "MultiHeadDotProductAttention_0"
        assert layout[f"{attention}/query/kernel"].pattern == "[i] o o"
        assert (layout[f"{attention}/out/kernel"].pattern, layout[f"{attention}/out/kernel"].fan_in) == ("[i i] o", 8)
        others = {layout[name].pattern for name in layout if not name.startswith(attention)}
        assert others == {"[i] o"}
        assert len(layout) == 4 + 2 + 8 + 6 + 8 + 2
        assert layout.skipped["Embed_0/embedding"].startswith("lookup table")


class TestAttentionAndCells:
    """Theorem 4.1 where the layer is not linear: a constant on the inputs acts like γ·Σw⁰ on the biases."""

    def test_attention(self) -> None:
        model = linen.MultiHeadDotProductAttention(2, qkv_features=6, param_dtype=jnp.float64)
        inputs = [_random(seed, (2, 4, 5)) for seed in range(3)]
        before = model.init(KEY, *inputs)["params"]
        after = self._trained(model, before, *inputs)
        for position, name in enumerate(("query", "key", "value")):
            shifted = [x + 0.7 * (place == position) for place, x in enumerate(inputs)]
            moved = jax.tree.map(jnp.copy, after)
            moved[name]["bias"] += 0.7 * before[name]["kernel"].sum(0)
            _equal(model.apply({"params": after}, *shifted), model.apply({"params": moved}, *inputs), 1e-12)
        _equal(after["out"]["kernel"].sum((0, 1)), before["out"]["kernel"].sum((0, 1)), 1e-12)
        assert jnp.abs(after["out"]["kernel"].sum(0) - before["out"]["kernel"].sum(0)).max() > 1e-3

    @pytest.mark.parametrize("cell", [linen.OptimizedLSTMCell, linen.LSTMCell, linen.GRUCell])
    def test_cells(self, cell: Any) -> None:
        model = linen.RNN(cell(4, param_dtype=jnp.float64), name="rnn")
        x = _random(1, (2, 3, 5))
        before = model.init(KEY, x)["params"]["cell"]
        after = self._trained(model, {"cell": before}, x)["cell"]
        moved = jax.tree.map(jnp.copy, after)
        for name in (name for name in before if name[0] == "i"):
            target = moved[name] if "bias" in moved[name] else moved[f"h{name[1]}"]
            target["bias"] += 0.7 * before[name]["kernel"].sum(0)
        run = lambda cell, x: model.apply({"params": {"cell": cell}}, x)  # noqa: E731
        _equal(run(after, x + 0.7), run(moved, x), 1e-12)

    def _trained(self, model: Any, params: Any, *inputs: Any) -> Any:
        layout = weight_layout(lambda: model.init(KEY, *inputs))
        assert not layout.unknown
        optimizer = optax.chain(centralize(layout), optax.sgd(0.3, momentum=0.9))

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            grads = jax.grad(lambda params: ((model.apply({"params": params}, *inputs) - 1) ** 2).mean())(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(4):
            params, state = step(params, state)
        return params


class TestNames:
    """Layouts of parameters alone."""

    def test_the_axes_that_names_decide_are_those_that_modules_decide(self) -> None:
        class Model(linen.Module):
            @linen.compact
            def __call__(self, x: Any) -> Any:
                x = linen.Conv(6, (3,), feature_group_count=3)(x)
                x = linen.BatchNorm(use_running_average=False)(linen.Conv(4, (3,), use_bias=False)(x))
                x = linen.MultiHeadDotProductAttention(2)(linen.Dense(4)(x))
                return linen.RNN(linen.GRUCell(4))(x)

        x = jnp.ones((2, 5, 6), jnp.float32)
        by_module = weight_layout(lambda: Model().init(KEY, x))
        by_name = weight_layout(Model().init(KEY, x))
        assert [*by_name] == [*by_module]
        assert all(by_name[name].agrees_with(by_module[name]) for name in by_module)

    def test_what_names_do_not_decide_is_left_alone_with_the_reason(self) -> None:
        shapes = {
            "Conv_0": {"kernel": (3, 3, 5, 4)},
            "ScanBlock_0": {"bias": (3, 4)},
            "Block_0": {"Conv_0": {"kernel": (3, 3, 5, 4)}, "BatchNorm_0": {"scale": (4,)}},
            "block": {"ConvTranspose_0": {"kernel": (4, 5, 4), "bias": (4,)}},
            "DenseGeneral_0": {"kernel": (5, 4, 2)},
            "proj": {"kernel": (5, 4)},
            "Dense_0": {"kernel": (5, 4)},
        }
        layout = weight_layout(_random(0, shapes))
        assert [*layout] == ["Block_0/Conv_0/kernel", "Dense_0/kernel"]
        reasons = {entry.name: entry.reason for entry in layout.unknown}
        assert reasons == {
            "Conv_0/kernel": "one kernel, or a stack of kernels of fewer dimensions",
            "block/ConvTranspose_0/kernel": "the axes of a ConvTranspose depend on its settings",
            "DenseGeneral_0/kernel": "the axes of a DenseGeneral depend on its settings",
            "proj/kernel": "the name does not tell its layer",
        }
        assert "weight_layout(lambda: model.init(key, x))" in str(layout)

    def test_stacked_layers(self) -> None:
        shapes = {
            "ScanBlock_0": {"Dense_0": {"kernel": (3, 5, 4)}, "Conv_0": {"kernel": (3, 2, 5, 4), "bias": (3, 4)}},
            "mlp/~/linear": {"w": (3, 5, 4)},
            "net/conv2_d_1": {"w": (3, 3, 5, 4)},
        }
        layout = weight_layout(_random(0, shapes))
        assert {name: layout[name].pattern for name in layout} == {
            "ScanBlock_0/Conv_0/kernel": "l [k i] o",
            "ScanBlock_0/Dense_0/kernel": "l [i] o",
            "mlp/~/linear/w": "l [i] o",
            "net/conv2_d_1/w": "[k k i] o",
        }

    def test_overrides_decide(self) -> None:
        params = _random(0, {"proj": {"kernel": (5, 4)}, "block": {"proj": {"kernel": (5, 4)}}})
        layout = weight_layout(params, overrides={"**/proj/kernel": "[i] o", "block/proj/kernel": "o [i]"})
        assert [layout[name].fan_in for name in ("proj/kernel", "block/proj/kernel")] == [5, 4]


class TestOwnLayers:
    def test_a_layer_declares_its_weight_vectors(self) -> None:
        class Project(linen.Module):
            weight_vectors = {"matrix": "o [i]"}  # noqa: RUF012

            @linen.compact
            def __call__(self, x: Any) -> Any:
                return x @ self.param("matrix", linen.initializers.ones, (4, 5)).T

        layout = weight_layout(lambda: linen.Sequential([Project()]).init(KEY, jnp.ones((2, 5))))
        assert (layout["layers_0/matrix"].fan_in, layout.entries[0].origin) == (5, "Project.weight_vectors")

    def test_a_subclass_that_stores_its_kernel_otherwise_is_unknown(self) -> None:
        class Transposed(nnx.Linear):
            def __init__(self, inputs: int, outputs: int) -> None:
                super().__init__(inputs, outputs, rngs=nnx.Rngs(0))
                self.kernel: Any = nnx.Param(jnp.zeros((outputs, inputs)))

        (entry,) = weight_layout(Transposed(5, 4)).unknown
        assert entry.reason == "shape (4, 5) does not fit its layer: expected (5, 4), or that after other axes"

    def test_a_masked_kernel_is_left_alone(self) -> None:
        layer = nnx.Conv(5, 4, 3, mask=jnp.ones((3, 5, 4)), rngs=nnx.Rngs(0))
        assert [entry.name for entry in weight_layout(layer).unknown] == ["kernel"]


class TestErrors:
    def test_options(self) -> None:
        params = _random(0)
        with pytest.raises(ValueError, match="unknown placement 'both'; choose from 'gradient', 'regularized'"):
            centralize(params, "both")
        with pytest.raises(ValueError, match="strength must be between 0 and 1, not 1.5"):
            centralize(params, strength=1.5)
        with pytest.raises(ValueError, match=r"strength must be a number or a 0-dim array, not one of shape \(2,\)"):
            centralize(params, strength=jnp.ones(2))
        with pytest.raises(ValueError, match="needs weight_decay=, the same number as in optax.add_decayed_weights"):
            centralize(params, "regularized")
        with pytest.raises(ValueError, match='weight_decay= has no effect with placement "gradient"'):
            centralize(params, weight_decay=0.1)
        with pytest.raises(ValueError, match="strength must be between 0 and 1, not nan"):
            centralize(params, strength=jnp.nan)
        for wrong in (-0.1, jnp.nan):
            with pytest.raises(ValueError, match="weight_decay must be at least 0, not"):
                centralize(params, "regularized", weight_decay=wrong)
        with pytest.raises(
            ValueError, match=r"weight_decay must be a number or a 0-dim array, not one of shape \(4,\)"
        ):
            centralize(params, "regularized", weight_decay=jnp.ones(4))
        with pytest.raises(TypeError, match="strength must be a number or a 0-dim array, not '0.5'"):
            centralize(params, strength="0.5")
        optimizer = centralize(params, "regularized", weight_decay=0.1)
        with pytest.raises(ValueError, match=r"call optimizer.update\(grads, state, params\)"):
            optimizer.update(params, optimizer.init(params))

    def test_a_schedule_in_place_of_a_number(self) -> None:
        params, grads = _random(0), _random(1)
        schedule = optax.constant_schedule(0.5)
        with pytest.raises(TypeError, match="strength must be a number, not a schedule") as raised:
            centralize(params, strength=schedule)
        remedy = str(raised.value).partition(": use ")[2]
        scope = {"optax": optax, "centralize": centralize, "schedule": schedule, "placement": "gradient"}
        _equal(_step(eval(remedy, scope | {"layout": weight_layout(params)}), grads, params), _by_hand(grads, 0.5))

    def test_nothing_to_center(self) -> None:
        with pytest.raises(ValueError, match="nothing to center among these 1 parameters: Dense_0/bias: bias"):
            centralize(_random(0, {"Dense_0": {"bias": (4,)}}))
        params = _random(0, {"proj": {"kernel": (5, 4)}})
        with pytest.raises(ValueError, match="nothing to center: proj/kernel: the name does not tell") as raised:
            centralize(params)
        remedy = re.search(r"weight_layout\(model, overrides=.*\)", str(raised.value))
        assert remedy
        layout = eval(remedy[0], {"weight_layout": weight_layout, "model": params})
        _equal(_step(centralize(layout), params, params), _by_hand(params))

    def test_another_tree(self) -> None:
        params = _random(0)
        optimizer = centralize(params)
        with pytest.raises(ValueError, match="Dense_2/kernel is not in the layout, which has Dense_0/bias, "):
            optimizer.init(params | {"Dense_2": {"kernel": jnp.ones((3, 3))}})
        with pytest.raises(ValueError, match=r"has shape \(3, 4\), but \(4, 3\) .* call optimizer.update outside"):
            optimizer.init(params | {"Dense_1": {"kernel": jnp.ones((3, 4))}})

    def test_parameters_without_names(self) -> None:
        params = _random(0)
        rule = centralize(params)
        with pytest.raises(ValueError, match="a single array is not in the layout.*call centralize outside of it"):
            optax.flatten(rule).init(params)
        _equal(_step(optax.chain(rule, optax.flatten(optax.sgd(-1.0))), params, params), _by_hand(params))

    def test_a_parameter_without_a_gradient(self) -> None:
        params, grads = _random(0), _random(1) | {"Dense_1": {"kernel": None}}
        for placement, weight_decay in (("gradient", None), ("update", None), ("regularized", 0.0)):
            updates = _step(centralize(params, placement, weight_decay=weight_decay), grads, params)
            assert updates["Dense_1"]["kernel"] is None
            _equal(updates["Dense_0"], _by_hand(grads["Dense_0"]))

    def test_a_class_in_place_of_a_model(self) -> None:
        with pytest.raises(TypeError, match=r"not its class: create a Linear\(...\) first"):
            weight_layout(nnx.Linear)

    def test_a_compiled_function_that_is_not_traced_again(self) -> None:
        model, key, x = linen.Dense(4), KEY, jnp.ones((2, 5))
        init = jax.jit(model.init)
        init(key, x)
        with pytest.raises(TypeError, match="it must call model.init without jax.jit") as raised:
            weight_layout(lambda: init(key, x))
        remedy = re.search(r"weight_layout\(lambda: .*\)\)", str(raised.value))
        assert remedy
        scope = {"weight_layout": weight_layout, "model": model, "key": key, "x": x}
        assert [*eval(remedy[0], scope)] == ["kernel"]

    def test_two_models_with_layers_of_the_same_name(self) -> None:
        """A decoder whose initialization calls an encoder; the layers of this name differ in their axes."""
        encoder = linen.Sequential([linen.Dense(4)])
        decoder = linen.Sequential([linen.DenseGeneral(3, batch_dims=(0,))])
        x = jnp.ones((4, 4))
        encode = lambda: encoder.apply(encoder.init(KEY, x), x)  # noqa: E731
        layout = weight_layout(lambda: decoder.init(KEY, encode()))
        assert layout["layers_0/kernel"].pattern == "b [i] o"
        transposed = linen.Sequential([linen.Conv(4, (4,), padding="VALID")])
        shifted = linen.Sequential([linen.ConvTranspose(4, (4,), (2,), padding="VALID")])
        x = jnp.ones((1, 8, 4))
        convolve = lambda: transposed.apply(transposed.init(KEY, x), x)  # noqa: E731
        (entry,) = weight_layout(lambda: shifted.init(KEY, convolve())).unknown
        assert entry.reason == "several layers of this name: linen Conv.kernel and linen ConvTranspose.kernel"

    def test_a_linen_module_without_a_function_that_initializes_it(self) -> None:
        model, key, x = linen.Dense(4), KEY, jnp.ones((2, 5))
        with pytest.raises(ValueError, match="the parameters of a Dense do not exist before") as raised:
            weight_layout(model)
        remedy = re.search(r"weight_layout\(lambda: .*\)\)", str(raised.value))
        assert remedy
        scope = {"weight_layout": weight_layout, "model": model, "key": key, "x": x}
        assert [*eval(remedy[0], scope)] == ["kernel"]

    def test_what_is_not_a_model(self) -> None:
        with pytest.raises(TypeError, match="the function initializes no model of Flax linen or Haiku"):
            weight_layout(lambda: {"w": jnp.ones((2, 3))})
        with pytest.raises(TypeError, match="model must be a model, a function that initializes one, such as"):
            weight_layout({"Dense_0": "kernel"})


class Network(linen.Module):
    """A transposed convolution, a convolution and a dense layer."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        options: dict[str, Any] = {"padding": "VALID", "param_dtype": jnp.float64}
        x = linen.ConvTranspose(4, (4, 4), (2, 2), transpose_kernel=True, **options)(x)
        x = jnp.tanh(x)
        x = jnp.tanh(linen.Conv(6, (3, 3), feature_group_count=2, **options)(x))
        return linen.Dense(5, param_dtype=jnp.float64)(x.mean((1, 2)))


OPTIMIZERS: dict[str, Any] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda: optax.sgd(0.1, momentum=0.9)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1), lambda: optax.adam(0.01)),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), lambda: optax.adamw(0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("placement", ["gradient", "regularized", "update"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_equal_those_of_torch(name: str, placement: str) -> None:
    model = Network()
    x, y = _random(1, (4, 5, 6, 3)), _random(2, (4, 5))
    params = model.init(KEY, x)["params"]
    create, optimizer = OPTIMIZERS[name]

    transposed = torch.nn.ConvTranspose2d(3, 4, 4, 2)
    convolution, dense = torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Linear(6, 5)
    pool, flatten, tanh = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Tanh()
    reference = torch.nn.Sequential(transposed, tanh, convolution, tanh, pool, flatten, dense).double()
    layers: dict[str, torch.nn.Module] = {"ConvTranspose_0": transposed, "Conv_0": convolution, "Dense_0": dense}
    for layer, module in layers.items():
        module.load_state_dict({"weight": _in_torch(params[layer]["kernel"]), "bias": _in_torch(params[layer]["bias"])})
    torch_optimizer = create(reference.parameters())
    gradcentral.centralize(torch_optimizer, reference, placement=placement)

    layout = weight_layout(lambda: model.init(KEY, x))
    l2 = 0.0 if name == "adamw" else 0.1
    rule = centralize(layout, placement, weight_decay=l2 if placement == "regularized" else None)
    chain = [optax.add_decayed_weights(l2), optimizer()]
    chained = optax.chain(*([*chain, rule] if placement == "update" else [rule, *chain]))
    state = chained.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: ((model.apply({"params": params}, x) - y) ** 2).mean())(params)
        updates, state = chained.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    inputs, targets = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2), torch.tensor(np.asarray(y))
    before = params
    for _ in range(10):
        params, state = step(params, state)
        torch_optimizer.zero_grad()
        torch.nn.functional.mse_loss(reference(inputs), targets).backward()
        torch_optimizer.step()
    assert jnp.abs(params["Conv_0"]["kernel"] - before["Conv_0"]["kernel"]).max() > 1e-2
    for layer, module in layers.items():
        for own, theirs in (("kernel", module.get_parameter("weight")), ("bias", module.get_parameter("bias"))):
            np.testing.assert_allclose(_in_torch(params[layer][own]), theirs.detach().numpy(), rtol=0, atol=1e-12)


def _in_torch(array: Any) -> torch.Tensor:
    """Return an array with the axes in torch's order: [k…, a, b] as [b, a, k…]."""
    tensor = torch.tensor(np.asarray(array))
    return tensor if tensor.ndim < 2 else tensor.permute(tensor.ndim - 1, tensor.ndim - 2, *range(tensor.ndim - 2))


@pytest.mark.parametrize("module", ["gradcentral.integrations.optax", "gradcentral.integrations"])
def test_importing_the_adapter_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'flax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("module", [models, transformation])
def test_the_examples_of_the_docstrings_run(module: Any) -> None:
    jax.config.update("jax_enable_x64", False)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


PAGE = Path(__file__).parents[2] / "docs" / "jax-and-keras.md"


def test_the_script_and_the_chains_of_the_page_run() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## JAX\n")[2].partition("\n## Keras\n")[0]
    scope: dict[str, Any] = {"schedule": optax.constant_schedule(0.5)}
    for code in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
        exec(code, scope)
    chains = re.findall(r'^\| `"\w+"` \| `(.*)` \|$', section, re.M) + re.findall(r"`(optax\.inject.*)`", section)
    assert len(chains) == 4
    for chain in chains:
        optimizer = eval(chain, scope)
        params, grads = scope["params"], scope["grads"]
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        if "update" in chain:
            _equal(updates["params"]["Dense_0"]["kernel"].sum(0), np.zeros(10), 1e-6)
        assert jnp.abs(updates["params"]["Dense_0"]["kernel"]).max() > 0
