"""The Triton kernel compiles without a GPU, into code whose threads read and write 16 bytes at a time."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs the extra triton")

from gradcentral.kernels.forms import Operation, Placement, UpdateRule  # noqa: E402
from gradcentral.kernels.triton import INTERPRETED  # noqa: E402
from gradcentral.kernels.triton.division import TILE, elements_beside  # noqa: E402
from gradcentral.kernels.triton.plans import REGISTERS, WARPS  # noqa: E402
from gradcentral.kernels.triton.step import run  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 turns off the compiler")


def compiled(capability: int, rule: int, placement: int, dtype: Any, extras: bool) -> str:
    """Return the PTX of a variant of the kernel; Triton's compiler needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {
        "RULE": rule,
        "PLACEMENT": placement,
        "DAMPENED": extras and rule == UpdateRule.MOMENTUM,
        "WAITS": True,
        "ALIGNED": True,
        "WEIGHT": dtype,
        "GRAD": dtype,
        "STATE": dtype,
        "BESIDE": elements_beside(dtype.primitive_bitwidth // 8),
        "TILE": TILE,
    }
    optional = {"lr_at": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32", "strength_at": "*fp32", "fresh": "*i32"}
    if not extras:
        constants |= dict.fromkeys(optional)
    signature: dict[str, Any] = {
        **dict.fromkeys(("pointers", "parameters"), "*i64"),
        **dict.fromkeys(("pieces", "progress", "tap_map"), "*i32"),
        **dict.fromkeys(("partials", "means"), "*fp32"),
        **optional,
        "n_parameters": "i32",
        "n_counters": "i32",
        "lr": "fp32",
        "strength": "fp32",
        "rule": ("fp32",) * 11,
        "logs": ("fp32",) * 4,
        **dict.fromkeys(constants, "constexpr"),
    }
    names = run.arg_names
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=run, signature={name: signature[name] for name in names}, constexprs=values)
    options = {"num_warps": WARPS, "maxnreg": REGISTERS}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.asm["cubin"], "the assembler returned nothing"
    return str(kernel.asm["ptx"])


@pytest.mark.parametrize(
    ("capability", "rule", "placement", "dtype", "extras"),
    [
        (90, UpdateRule.MOMENTUM, Placement.GRADIENT, "float32", True),
        (90, UpdateRule.AMSGRAD, Placement.UPDATE, "bfloat16", True),
        (80, UpdateRule.ADAM, Placement.GRADIENT, "float16", False),
        (80, Operation.CENTER, Placement.GRADIENT, "float32", False),
        (90, Operation.SHIFT, Placement.GRADIENT, "bfloat16", False),
        (90, UpdateRule.ADAM, Placement.REGULARIZED, "float32", True),
    ],
)
def test_the_kernel_compiles(capability: int, rule: int, placement: Placement, dtype: str, extras: bool) -> None:
    ptx = compiled(capability, rule, placement, getattr(triton.language, dtype), extras)
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)
    assert f".maxnreg {REGISTERS}" in ptx
