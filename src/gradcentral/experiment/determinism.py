"""Seeds, threads and digests, which make two runs of one seed bit-identical and check that they are."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import starmap
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from gradcentral.extras import optional

__all__ = ["approximately", "derive", "digest", "one_thread", "same", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    optional("numpy").random.seed(seed)
    torch.manual_seed(seed)


def derive(seed: int, purpose: str) -> int:
    """Derive a seed below 2³² per purpose, so that draws for one purpose do not shift those for another.

    >>> derive(0, "order") == derive(0, "order") != derive(0, "training")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "little")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as every worker does: sums over more threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest(value: Any) -> str:
    """Hash tensors, arrays, numbers, strings, containers and objects of them, to twelve hex digits.

    The hash is the same in every process and wherever a task's file lies. Functions and what cannot be pickled count
    by their names.

    >>> digest([1, "a"]) == digest((1, "a")) != digest([1, "b"])
    True
    """
    sha = hashlib.sha256()
    for part in _parts(value):
        sha.update(part)
    return sha.hexdigest()[:12]


def approximately(*values: float) -> str:
    """Write numbers as text that `same` compares up to rounding.

    >>> approximately(0.5, float("nan"))
    '≈ 0.5, nan'
    """
    return "≈ " + ", ".join(f"{value:.6g}" for value in values)


def same(one: str, other: str) -> bool:
    """Whether two texts are equal; numbers after "≈" may differ as rounding on other machines and GPUs makes them.

    >>> same("≈ 0.5, nan", "≈ 0.50001, nan"), same("≈ 0.5", "≈ 0.6"), same("0.5", "0.50001")
    (True, False, False)
    """
    if not one.startswith("≈ ") or not other.startswith("≈ "):
        return one == other
    numbers, others = (text[2:].split(", ") for text in (one, other))
    return len(numbers) == len(others) and all(starmap(_close, zip(numbers, others, strict=True)))


def _close(one: str, other: str) -> bool:
    try:
        return one == other or math.isclose(float(one), float(other), rel_tol=1e-3)
    except ValueError:  # a damaged file
        return False


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.cpu().contiguous().flatten().view(torch.uint8).numpy()  # not a copy: it may be a whole dataset
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield f"{value!r};".encode()
    elif isinstance(value, (Mapping, Sequence)):
        yield f"{len(value)} items".encode()
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _parts(item)
    elif isinstance(value, Set):
        yield from _parts(sorted(map(digest, value)))  # the order of a set differs between processes
    elif hasattr(value, "__array_interface__"):  # an array, an image of PIL
        array = optional("numpy").asarray(value)
        yield from _parts([array.dtype.str, array.shape, array.tolist() if array.dtype.hasobject else array.tobytes()])
    elif isinstance(value, _NAMED):
        yield f"{value.__name__};".encode()
    else:
        yield _pickled(value)


# Their modules are not hashed, because that of a task is named after the path of its file.
_NAMED = (type, FunctionType, MethodType, ModuleType)


class _Pickler(pickle.Pickler):
    """Pickle objects by the digests of their parts whose own pickles differ between processes."""

    def persistent_id(self, value: Any) -> str | None:
        hashed = isinstance(value, (torch.Tensor, Set, *_NAMED)) or hasattr(type(value), "__array_interface__")
        return digest(value) if hashed else None


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except Exception:  # a lock, an open file, an own error of __getstate__
        return f"{type(value).__qualname__};".encode()
    return file.getvalue()
