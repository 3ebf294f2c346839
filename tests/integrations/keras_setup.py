"""Sets up Keras for its tests: the backend, which KERAS_BACKEND chooses (by default JAX), and float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason="needs Keras: run `make jax`")
BACKEND: str = keras.backend.backend()


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let models be made and computed in float64."""
    from keras.src.backend.common import dtypes

    def forget() -> None:
        for function in vars(dtypes).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    # On JAX and torch, Keras computes products of float64 in float32 because of this table.
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    forget()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    monkeypatch.undo()
    forget()


def as_numpy(values: Any) -> np.ndarray[Any, Any]:
    """Return a variable or tensor as an array."""
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(values)))
