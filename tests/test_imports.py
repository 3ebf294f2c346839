"""The import graph of the package: imports go down only, and there are no cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gradcentral

PACKAGE = Path(gradcentral.__file__).parent

# From the top down, as in docs/architecture.md. A module may import modules of its own part and of lower parts.
PARTS = (
    "__main__",
    "cli",
    "gradcentral",  # __init__.py, the public names
    "integrations",
    "bench",
    "paper",
    "experiment",
    "diagnostics",
    "initialization",
    "optim",
    "attach",
    "attachment",
    "never_stepped",
    "step_hooks",
    "gradient_hooks",
    "updates",
    "gradients",
    "targets",
    "groups",
    "distributed",
    "weight_decay",
    "strengths",
    "local_shard",
    "kernels",
    "layout",
    "projection",
    "weight_vectors",
    "plotting",
    "tables",
    "json_lines",
    "extras",
    "caller",
    "startup",
)


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(module: str) -> Iterator[str]:
    """Yield every module of the package that a module imports anywhere in its code, even for type checking only."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


GRAPH = {module: sorted({*_imports(module)} - {module}) for module in MODULES}


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_module_is_in_a_part() -> None:
    assert {_part(module) for module in MODULES} == set(PARTS)


def test_imports_go_down_only() -> None:
    floor = {part: height for height, part in enumerate(reversed(PARTS))}
    upward = [
        f"{module} imports {imported}"
        for module, found in GRAPH.items()
        for imported in found
        if floor[_part(imported)] > floor[_part(module)]
    ]
    assert not upward


def test_there_are_no_import_cycles() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in GRAPH[module]:
                visit(imported, (*path, module))
            finished.add(module)

    for module in GRAPH:
        visit(module, ())


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Otherwise the function would hide the module of the same name."""
    public = {name for name in gradcentral.__all__ if callable(getattr(gradcentral, name))}
    assert not {module.rpartition(".")[2] for module in MODULES} & public


def test_importing_the_package_imports_torch_and_nothing_else() -> None:
    code = (
        "import sys, torch; before = {*sys.modules}; import gradcentral; "
        "print(*{name.partition('.')[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) <= {"gradcentral", "torch"}


def test_importing_the_package_does_not_import_what_needs_extras() -> None:
    code = "import sys, gradcentral; print(*(name for name in sys.modules if name.startswith('gradcentral.')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = {_part(module) for module in run.stdout.split()}
    assert not parts & {"bench", "cli", "paper", "experiment", "diagnostics", "plotting"}
