"""Train a small Flax network on the digits of scikit-learn with Gradient Centralization.

python examples/flax_digits.py               # one training run, without torch
gradcentral compare examples/flax_digits.py  # paired runs with and without GC; the command itself needs torch
"""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from gradcentral.integrations.optax import centralize, weight_layout

images, labels = load_digits(return_X_y=True)
X, Y = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16), jnp.asarray(labels)
BATCH, TRAIN, EPOCHS = 50, 1000, 5  # the first 1000 digits are for training, the other 797 for testing


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def task(seed: int, arm: str) -> Iterator[dict[str, float]]:
    """Train once; the seed decides the initial weights and the order of the data, the arm is "none" or a placement."""
    model, key = Network(), jax.random.key(seed)
    params = model.init(key, X[:1])
    optimizer = optax.adamw(1e-3)
    if arm != "none":
        gc = centralize(weight_layout(lambda: model.init(key, X[:1])), arm)
        optimizer = optax.chain(optimizer, gc) if arm == "update" else optax.chain(gc, optimizer)
    state = optimizer.init(params)

    def loss(params: optax.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    @jax.jit
    def step(params: optax.Params, state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple[optax.Params, ...]:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for epoch in range(EPOCHS):
        losses = []
        for batch in jax.random.permutation(jax.random.fold_in(key, epoch), TRAIN).reshape(-1, BATCH):
            params, state, value = step(params, state, X[batch], Y[batch])
            losses.append(float(value))
        accuracy = (model.apply(params, X[TRAIN:]).argmax(-1) == Y[TRAIN:]).mean()
        yield {"train_loss": sum(losses) / len(losses), "test_metric": float(accuracy)}


if __name__ == "__main__":
    print(weight_layout(lambda: Network().init(jax.random.key(0), X[:1])), *task(0, "gradient"), sep="\n")
