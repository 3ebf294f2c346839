"""Layouts of parameters that have names and shapes only, as those of JAX and Keras."""

from __future__ import annotations

import pytest

from gradcentral.integrations.named_layout import Found, NamedLayout, Skip, decide
from gradcentral.weight_vectors import WeightVectors

FOUND = [
    *(Found(f"block_{i}/Dense_0/kernel", (3, 4), "[i] o", "flax Dense.kernel") for i in range(3)),
    *(Found(f"block_{i}/Dense_0/bias", (4,), Skip("bias"), "flax Dense.bias") for i in range(3)),
    Found("proj/kernel", (3, 4), Skip("no rule for Project.kernel", unknown=True)),
    Found("gate/kernel", (1, 4), "[i] o", "flax Dense.kernel", aliases=("tied/kernel",)),
]


def test_entries_are_found_by_name() -> None:
    layout = decide(FOUND)
    assert len(layout) == 3
    assert list(layout) == [f"block_{i}/Dense_0/kernel" for i in range(3)]
    assert layout["block_1/Dense_0/kernel"].fan_in == 3
    assert "proj/kernel" not in layout
    assert [entry.name for entry in layout.unknown] == ["proj/kernel"]
    assert layout.skipped["gate/kernel"] == "fan-in 1: its centered gradient is always zero"
    with pytest.raises(KeyError, match="proj/kernel is skipped: no rule for Project.kernel"):
        layout["proj/kernel"]
    with pytest.raises(KeyError, match="'other' is not a parameter of the model"):
        layout["other"]


def test_the_table_merges_layers_that_repeat() -> None:
    assert str(decide(FOUND)) == (
        "parameter                       shape  weight vectors  decided by\n"
        "-----------------------------------------------------------------------------------------------------\n"
        "block_{0..2}/Dense_0/kernel ×3  3×4    4 × 3  [i] o    flax Dense.kernel\n"
        "block_{0..2}/Dense_0/bias ×3    4      –               bias\n"
        "proj/kernel                     3×4    –               no rule for Project.kernel\n"
        "gate/kernel                     1×4    –               fan-in 1: its centered gradient is always zero\n\n"
        "3 of 8 parameters are centered (56.2% of the elements); 1 skipped as unknown\n\n"
        "Overrides for the unknown parameters, to paste and edit:\n"
        "overrides={\n"
        '  "proj/kernel": None,  # 3×4; "[i] o" if used as x @ w, "o [i]" if as w @ x\n'
        "}"
    )
    assert "block_1/Dense_0/kernel" in decide(FOUND).table(every=True)


def test_what_the_table_suggests_can_be_pasted() -> None:
    code = decide(FOUND).to_paste().partition("\n")[2]
    scope: dict[str, dict[str, None]] = {}
    exec(code, scope)
    layout = decide(FOUND, scope["overrides"])
    assert not layout.unknown
    edited = code.replace("None", '"[i] o"', 1)
    exec(edited, scope)
    assert decide(FOUND, scope["overrides"])["proj/kernel"].fan_in == 3


@pytest.mark.parametrize("name", ["proj/kernel", "**/proj/kernel", "proj/*", "*oj/kernel"])
def test_overrides_match_by_wildcards(name: str) -> None:
    assert decide(FOUND, {name: "o [i]"})["proj/kernel"].fan_in == 4


def test_the_last_override_that_matches_applies() -> None:
    layout = decide(FOUND, {"**/kernel": "[i] o", "block_1/*": None, "**/gate/kernel": WeightVectors((1,))})
    assert "block_1/Dense_0/kernel" not in layout
    assert layout["block_0/Dense_0/kernel"].fan_in == 3
    assert layout["gate/kernel"].fan_in == layout["tied/kernel"].fan_in == 4


def test_exclude_skips() -> None:
    layout = decide(FOUND, exclude="block_*")
    assert not [*layout]
    assert layout.skipped["block_0/Dense_0/kernel"] == "excluded"
    assert "gate/kernel" in decide(FOUND, {"tied/kernel": "o [i]"}, exclude=["gate/*"]), "an override takes precedence"


@pytest.mark.parametrize(
    ("overrides", "exclude", "message"),
    [
        ({"proj/kernl": "[i] o"}, (), "overrides: 'proj/kernl' matches no parameter of the model; did you mean 'proj/"),
        ({}, ["bloc"], "exclude: 'bloc' matches no parameter of the model"),
        ({"proj/kernel": "[i o"}, (), r"overrides\['proj/kernel'\]: pattern '\[i o': '\[' is not closed"),
        ({"proj/kernel": "[i k] o"}, (), "overrides: proj/kernel: pattern .* has 3 axes, but the shape has 2"),
        ({"gate/kernel": "[i] o"}, (), r"overrides: gate/kernel: shape \(1, 4\): fan-in 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: dict[str, str], exclude: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(FOUND, overrides, exclude)


def test_an_override_must_be_a_rule() -> None:
    with pytest.raises(TypeError, match="must be a pattern such as '\\[i\\] o', WeightVectors or None, not 3"):
        decide(FOUND, {"proj/kernel": 3})  # type: ignore[dict-item]


def test_a_layout_without_elements_can_be_printed() -> None:
    assert "0 of 1 parameters are centered" in str(
        NamedLayout(decide([Found("w", (), Skip("a single number"))]).entries)
    )
