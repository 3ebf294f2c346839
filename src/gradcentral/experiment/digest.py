"""Short hashes of data, weights and code, to notice that two things are not the same."""

from __future__ import annotations

import ast
import functools
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch

__all__ = ["digest", "digest_of_callable", "digest_of_source"]


def digest(value: Any) -> str:
    """Twelve hex digits of the content: tensors, arrays, numbers, strings, containers of them, else the pickle.

    >>> digest([1, "a"]) == digest((1, "a")) != digest([1, "b"])
    True
    """
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()[:12]


def digest_of_source(path: Path) -> str:
    """Of a Python file's code: comments and blank lines do not count."""
    return digest(ast.dump(ast.parse(path.read_text(encoding="utf-8"))))


def digest_of_callable(function: Any) -> str:
    """Of what a callable does, as far as its code, constants, defaults, closure and bound arguments tell."""
    return digest(_parts(function, depth=0))


def _parts(function: Any, depth: int) -> Any:
    if isinstance(function, functools.partial):
        return ["partial", _parts(function.func, depth), _plain(function.args, depth), _plain(function.keywords, depth)]
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        kind = function if isinstance(function, type) else type(function)
        name = getattr(function, "__qualname__", kind.__qualname__)
        return [kind.__module__, name, _plain(getattr(function, "__dict__", {}), depth)]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [
        _code(code),
        _plain(function.__defaults__, depth),
        _plain(function.__kwdefaults__, depth),
        _plain(cells, depth),
    ]


def _code(code: CodeType) -> list[Any]:
    return [code.co_code, list(code.co_names), [_constant(const) for const in code.co_consts]]


def _constant(const: Any) -> Any:
    if isinstance(const, CodeType):
        return _code(const)
    if isinstance(const, tuple):
        return [_constant(item) for item in const]
    # A set of strings has another order in every process.
    return sorted(map(repr, const)) if isinstance(const, frozenset) else repr(const)


def _plain(value: Any, depth: int) -> Any:
    """The value with everything dropped whose text would differ from one process to the next."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.Tensor)):
        return value
    if depth > 4:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return [[str(key), _plain(item, depth + 1)] for key, item in value.items() if not str(key).startswith("_")]
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return _parts(value, depth + 1) if callable(value) else type(value).__qualname__


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        sha.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        sha.update(f"mapping {len(value)}".encode())
        for key, item in value.items():
            _feed(sha, key)
            _feed(sha, item)
    elif value is None or isinstance(value, (bool, int, float, complex, str)):
        sha.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, bytes):
        sha.update(value)
    elif isinstance(value, Sequence):
        sha.update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(pickle.dumps(value))
