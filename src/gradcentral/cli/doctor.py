"""What a bug report needs, and a test of the kernels on this machine (``gradcentral doctor``)."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
from torch import Tensor

import gradcentral
from gradcentral.bench.benchmark import describe_machine
from gradcentral.extras import own_version
from gradcentral.kernels import native, unavailable_reasons

__all__ = ["REPORT", "describe", "problems"]

REPORT = "Report this: "
"""Beginning of a problem that is a bug of gradcentral."""

# Libraries with which gradcentral is used, in the order of the list.
LIBRARIES = (
    *("triton", "numpy", "transformers", "accelerate", "peft", "lightning", "pytorch-lightning", "timm", "deepspeed"),
    *("jax", "flax", "optax", "keras", "tensorflow"),
)
# Rows longer than a vector register, with a remainder, and short ones.
SHAPES = ((33, 70), (8, 3, 3, 3), (12,))


def describe() -> dict[str, str]:
    """Return the facts, name -> value: the machine, versions, kernels, threads, devices and environment variables."""
    machine = describe_machine()
    facts = {name: machine[name] for name in ("gradcentral", "torch", "python", "system", "processor")}
    facts["installed in"] = os.path.dirname(gradcentral.__file__)
    for name, reason in unavailable_reasons().items():
        facts[f"{name} kernels"] = f"not used: {reason}" if reason else "in use"
    if not native.unavailable_reason() and not native.has_openmp():
        facts["native kernels"] = "in use, on one thread (built without OpenMP)"
    facts["threads"] = f"{torch.get_num_threads()} of {_available_cores()} cores"
    facts["devices"] = ", ".join(["cpu", *_accelerators()])
    set_here = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _matters(name)]
    facts["environment"] = ", ".join(set_here) or "nothing set"
    facts["libraries"] = ", ".join(f"{name} {found}" for name in LIBRARIES if (found := _version(name))) or "none"
    return facts


def problems() -> list[str]:
    """Return what should be mended, each with its remedy or what to report; runs the kernels on small tensors."""
    found = []
    if own_version() not in (gradcentral.__version__, "not installed"):
        found.append(
            f"The code is version {gradcentral.__version__}, but version {own_version()} is installed: reinstall it."
        )
    if reason := native.unavailable_reason():
        found.append(f"CPU tensors take the slower reference path: {reason}.")
    if torch.cuda.is_available() and (reason := unavailable_reasons()["triton"]):
        found.append(f"CUDA tensors take the slower reference path: {reason}.")
    if torch.get_num_threads() > _available_cores():
        found.append(
            f"torch uses {torch.get_num_threads()} threads on {_available_cores()} cores, which wait for each other: "
            f"set OMP_NUM_THREADS={_available_cores()}."
        )
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    found += [f"{REPORT}{wrong}" for device in devices for wrong in wrong_steps(device)]
    return found


def wrong_steps(device: str) -> list[str]:
    """Compare three steps of each optimizer and placement with the reference path; return one line per difference."""
    wrong = []
    for kind in (gradcentral.SGD, gradcentral.AdamW):
        for placement in ("gradient", "regularized", "update"):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
                ours, expected = (_steps(kind, placement, dtype, device, fused) for fused in (None, False))
                worst = max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True))
                if not worst <= tolerance:  # NaN is wrong too
                    case = f"{kind.__name__}, placement {placement!r}, {dtype} on {device}"
                    wrong.append(f"the kernels differ from the reference path by {worst:.1g} ({case})")
    return wrong


def _steps(
    kind: type[gradcentral.SGD | gradcentral.AdamW], placement: str, dtype: torch.dtype, device: str, fused: bool | None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, device="cpu").to(device, dtype).requires_grad_() for shape in SHAPES
    ]
    layout = gradcentral.WeightLayout.from_shapes(weights)
    optimizer = kind(weights, lr=0.1, layout=layout, placement=placement, weight_decay=0.1, fused=fused)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, device="cpu").to(device, dtype)
        optimizer.step()
    return [weight.detach().double() for weight in weights]


def _available_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _accelerators() -> list[str]:
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return names + ["mps"] * (platform.system() == "Darwin" and torch.backends.mps.is_available())


def _matters(name: str) -> bool:
    return name.startswith(("GRADCENTRAL_", "OMP_", "KMP_", "MKL_", "CUDA_", "TORCH_", "TRITON_", "KERAS_", "JAX_"))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
