"""Every raw parameter with two or more axes that an installed library declares has a rule."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gradcentral.layout.lookup import LIBRARIES, library_rules
from gradcentral.layout.rules import matching_name
from tests.zoo.declarations import declarations

# Declared on a module other than self, or covered by the rules of torch.nn.
_ELSEWHERE = {
    ("MultiheadAttention", "in_proj_weight"),
    ("MultiheadAttention", "weight"),
    ("LoraEmbeddingATPHolder", "_parameters.item"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_declared_parameter_has_a_rule(library: str) -> None:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {library}: pip install 'gradcentral[zoo]', or the library itself")
    found = list(declarations(Path(spec.origin).parent))
    assert len(found) > 5
    undecided = []
    for declared in found:
        cls = type(declared.class_name, (), {"__module__": declared.module, "__qualname__": declared.class_name})
        if (
            matching_name(library_rules(cls), declared.name) is None
            and (declared.class_name, declared.name) not in _ELSEWHERE
        ):
            undecided.append(f"{declared.module}.{declared.class_name}.{declared.name} = {declared.source}")
    assert undecided == []
