"""Train a Keras model on 8×8 digits with and without GC, and let the comparison judge it.

KERAS_BACKEND=jax gradcentral compare examples/keras_digits.py --seeds 10
"""

import os
from collections.abc import Iterator

os.environ.setdefault("KERAS_BACKEND", "jax")  # or torch, tensorflow

import keras
import numpy as np
from sklearn.datasets import load_digits

from gradcentral.experiment import CustomTask
from gradcentral.integrations.keras import centralize

EPOCHS = 10
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
order = np.random.default_rng(0).permutation(len(images))  # the same split for every seed
train, test = order[:1000], order[1000:]


def build() -> keras.Model:
    """Build a small network whose transposed convolution stores its kernel as [k, k, out, in]."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Conv2DTranspose(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def run(seed: int, arm: str) -> Iterator[dict[str, float]]:
    """Train once; a seed gives the same initial weights and the same order of the data in every arm."""
    keras.utils.set_random_seed(seed)
    model = build()
    optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
    if arm != "none":
        optimizer = centralize(optimizer, model, arm)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    for epoch in range(EPOCHS):
        shuffled = np.random.default_rng([seed, epoch]).permutation(train)
        fitted = model.fit(images[shuffled], labels[shuffled], batch_size=50, shuffle=False, verbose=0)
        test_loss, accuracy = model.evaluate(images[test], labels[test], verbose=0)
        yield {"train_loss": fitted.history["loss"][0], "test_loss": test_loss, "test_metric": accuracy}


task = CustomTask("keras-digits", run, metric_name="accuracy")
