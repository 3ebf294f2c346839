"""Find the raw parameters declared in the source of a library, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CREATORS = {"zeros", "ones", "empty", "randn", "rand", "full", "normal", "Tensor", "FloatTensor"}

_CONTAINERS = {"ParameterDict", "ParameterList"}


class Declaration(NamedTuple):
    """A statement ``self.<name> = nn.Parameter(…)`` in a class."""

    module: str
    class_name: str
    name: str
    source: str


def declarations(root: Path) -> Iterator[Declaration]:
    """Yield all parameters with two or more axes, or of unknown shape, that classes of the package declare on self."""
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "Param" not in text or path.name.startswith("modular_"):  # sources of generated files in transformers
            continue
        module = ".".join((root.name, *path.relative_to(root).with_suffix("").parts))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                for name, value in _assignments(node):
                    if _is_parameter(value) and not _has_one_axis(value):
                        yield Declaration(module, node.name, name, ast.unparse(value))


def _assignments(owner: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, value) for ``self.name = …``, ``self.name[key] = …`` and ``self.register_parameter("name", …)``."""
    for node in ast.walk(owner):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Attribute) and _is_self(target.value):
                yield f"{target.value.attr}.item", node.value
            elif isinstance(target, ast.Attribute) and _is_self(target):
                in_container = isinstance(node.value, ast.Call) and _called(node.value) in _CONTAINERS
                yield f"{target.attr}.item" if in_container else target.attr, node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "register_parameter"
            and len(node.args) == 2
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), node.args[1]


def _is_self(target: ast.Attribute) -> bool:
    return isinstance(target.value, ast.Name) and target.value.id == "self"


def _is_parameter(value: ast.expr) -> bool:
    return any(isinstance(node, ast.Call) and _called(node) in ("Parameter", "Param") for node in ast.walk(value))


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _has_one_axis(value: ast.expr) -> bool:
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    if any(_called(call) in ("unsqueeze", "reshape", "view") for call in calls):
        return False
    shapes = [_axes(call) for call in calls if _called(call) in _CREATORS]
    return any(_called(call) == "tensor" for call in calls) or (bool(shapes) and max(shapes) <= 1)


def _axes(call: ast.Call) -> int:
    sizes: list[ast.expr] = [*call.args]
    for keyword in call.keywords:
        if keyword.arg == "size":
            sizes = [keyword.value]
    if _called(call) == "full":
        sizes = sizes[:1]
    if len(sizes) == 1 and isinstance(sizes[0], (ast.Tuple, ast.List)):
        sizes = sizes[0].elts
    return 9 if any(isinstance(size, ast.Starred) for size in sizes) else len(sizes)
