"""The import graph of the package: imports go down only, and there are no cycles."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    "transposed_taps",
    "weight_vectors",
    "plotting",
    "tables",
    "text_table",
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


# The public names that need an extra.
WITH_EXTRAS = ("Monitor", "compare", "probe")


def _run(code: str) -> list[str]:
    """Run code in a new interpreter, and return the words that it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", ["gradcentral", "gradcentral.weight_vectors", "gradcentral.integrations"])
def test_importing_the_package_imports_the_standard_library_only(module: str) -> None:
    """Adapters for JAX and Keras must not import torch, and importing one imports the package first."""
    code = (
        f"import sys; before = {{*sys.modules}}; import {module}; "
        "print(*{name.partition('.')[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names})"
    )
    assert _run(code) == ["gradcentral"]


def test_the_public_names_import_torch_and_nothing_else() -> None:
    code = (
        "import sys, torch; before = {*sys.modules}; import gradcentral; "
        f"[getattr(gradcentral, name) for name in {{*gradcentral.__all__}} - {{*{WITH_EXTRAS}}}]; "
        "print(*{name.partition('.')[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names})"
    )
    assert set(_run(code)) <= {"gradcentral", "torch"}


def test_the_public_names_do_not_import_what_needs_extras() -> None:
    code = (
        "import sys, gradcentral; "
        f"[getattr(gradcentral, name) for name in {{*gradcentral.__all__}} - {{*{WITH_EXTRAS}}}]; "
        "print(*(name for name in sys.modules if name.startswith('gradcentral.')))"
    )
    parts = set(map(_part, _run(code)))
    assert "attach" in parts
    assert not parts & {"bench", "cli", "paper", "experiment", "diagnostics", "plotting"}


def test_every_public_name_is_found_before_its_module_is_imported() -> None:
    code = (
        "import gradcentral, inspect, sys; names = {*dir(gradcentral)}; assert 'torch' not in sys.modules; "
        "assert names >= {*gradcentral.__all__, 'kernels', 'layout', 'optim'}; "
        "values = {name: getattr(gradcentral, name) for name in gradcentral.__all__}; "
        "assert all(values[name] is getattr(gradcentral, name) for name in values); "
        "print(*(name for name in values if inspect.isclass(values[name]) or inspect.isfunction(values[name])))"
    )
    assert set(_run(code)) == {*gradcentral.__all__}


def test_submodules_that_the_docs_use_need_no_import_of_their_own() -> None:
    code = "import gradcentral; print(*gradcentral.kernels.unavailable_reasons())"
    assert "native" in _run(code)
    assert _run("import gradcentral; print(gradcentral.layout.axes.__name__)") == ["axes"]
    assert _run("import gradcentral; print(gradcentral.optim.SGD is gradcentral.SGD)") == ["True"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(gradcentral, "centralise")
    with pytest.raises(AttributeError, match="module 'gradcentral' has no attribute 'centralise'"):
        gradcentral.centralise  # type: ignore[attr-defined] # noqa: B018


def test_an_optimizer_is_unpickled_where_nothing_else_has_been_imported() -> None:
    pickled = pickle.dumps((gradcentral.AdamW, gradcentral.centralize, gradcentral.WeightVectors((1,), shape=(2, 3))))
    assert _run(f"import pickle; print(pickle.loads({pickled!r})[2].fan_in)") == ["3"]


def test_ctrl_c_is_handled_before_torch_is_imported() -> None:
    """The command line imports torch for seconds, so `startup` must come first."""
    code = (
        "import sys; sys.argv[0] = sys.orig_argv[0] = 'gradcentral'; import gradcentral, signal; "
        "print(signal.getsignal(signal.SIGINT).__module__, 'torch' in sys.modules)"
    )
    assert _run(code) == ["gradcentral.startup", "False"]
