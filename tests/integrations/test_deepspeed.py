"""DeepSpeed's ZeRO, stages 0 to 3, on one and two ranks, compared with a loop on one rank that centers by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradcentral
from gradcentral.targets import PLACEMENTS
from tests.distributed.workers import Workers
from tests.integrations.pages import run_page

pytest.importorskip("deepspeed", reason="needs deepspeed: run `make trainers`")

STEPS, BATCH = 4, 16


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Workers]:
    workers = Workers(request.param)
    yield workers
    workers.stop()


def _deepspeed() -> Any:
    """Import DeepSpeed in a rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed would compile its own all-reduce, which takes a minute; gloo's is used instead.
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False
    return deepspeed


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def _batches() -> list[tuple[Tensor, Tensor]]:
    images = torch.rand(STEPS, BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 10, (STEPS, BATCH), generator=torch.Generator().manual_seed(2))
    return [*zip(images, labels, strict=True)]


def _by_hand(clip: float = 0.0, accumulate: int = 1, center: bool = True) -> list[Tensor]:
    """Return the parameters after training on one rank with SGD, momentum and gradients centered before clipping."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, (images, labels) in enumerate(_batches(), start=1):
        (cross_entropy(model(images), labels) / accumulate).backward()
        if step % accumulate == 0:
            for p in model.parameters():
                if center and p.ndim > 1 and p.grad is not None:
                    p.grad -= p.grad.mean(dim=[*range(1, p.ndim)], keepdim=True)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def _train(
    stage: int, how: str, placement: str = "gradient", clip: float = 0.0, accumulate: int = 1
) -> tuple[list[Tensor], str]:
    """Return the parameters after DeepSpeed's training, and the error if it raised one."""
    deepspeed = _deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param

    model = _model()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if how == "backward":
        gradcentral.centralize_in_backward(model)
    elif how == "attached":
        gradcentral.centralize(optimizer, model, placement)
    elif how == "fused":
        optimizer = gradcentral.SGD(model, lr=0.1, momentum=0.9, placement=placement)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    error = ""
    try:
        for images, labels in _batches():
            engine.backward(cross_entropy(engine(images[mine]), labels[mine]))
            engine.step()
    except (RuntimeError, ValueError) as raised:
        error = str(raised)
    whole = [safe_get_full_fp32_param(p) if stage == 3 else p for p in model.parameters()]
    return [p.detach().clone() for p in whole], error


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("clip", "accumulate"), [(0.0, 1), (0.5, 2)], ids=["plain", "accumulated and clipped"])
def test_centering_in_backward_equals_centering_by_hand(
    stage: int, clip: float, accumulate: int, ranks: Workers
) -> None:
    expected = _by_hand(clip, accumulate)
    assert _difference(expected, _by_hand(clip, accumulate, center=False)) > 1e-3
    for found, error in ranks.run(_train, stage, "backward", "gradient", clip, accumulate):
        assert not error
        assert _difference(found, expected) < 2e-7


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("how", ["attached", "fused"])
def test_stage_0_allows_every_placement(how: str, placement: str, ranks: Workers) -> None:
    expected = _by_hand()  # without weight decay, the placements of SGD are equal
    for found, error in ranks.run(_train, 0, how, placement):
        assert not error
        assert _difference(found, expected) < 2e-7


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("how", ["attached", "fused"])
def test_stages_1_to_3_refuse_step_hooks_and_name_the_remedy(how: str, stage: int, ranks: Workers) -> None:
    for _, error in ranks.run(_train, stage, how):
        assert "or call gradcentral.centralize_in_backward(model) before deepspeed.initialize" in error


def _run_page() -> float:
    """Run the page's script, whose assertion checks the means, and return how far the weights have moved."""
    _deepspeed()
    namespace = run_page("deepspeed")
    weight = namespace["model"][0].weight.detach()
    return float((weight - namespace["before"][0]).abs().max())


def test_the_page_runs(ranks: Workers) -> None:
    assert min(ranks.run(_run_page)) > 1e-3


def _means_with_zero_init() -> tuple[str, float, float]:
    """Register hooks by name, with the layout of a model that is not partitioned."""
    deepspeed = _deepspeed()
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    layout = gradcentral.weight_layout(_model())
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = _model()
    with pytest.raises(ValueError, match="made by DeepSpeed ZeRO-3") as refused:
        gradcentral.centralize_in_backward(model)
    for name, p in model.named_parameters():
        if name in layout:
            p.register_hook(lambda gradient, vectors=layout[name]: gradcentral.center(gradient, vectors))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    images, labels = _batches()[0]
    engine.backward(cross_entropy(engine(images), labels))
    gradient = safe_get_full_grad(model[3].weight)
    return str(refused.value), float(gradient.mean(1).abs().max()), float(gradient.abs().max())


def test_with_zero_init_hooks_by_name_center(ranks: Workers) -> None:
    for refusal, mean, largest in ranks.run(_means_with_zero_init):
        assert "centralize_in_backward(model) before deepspeed.initialize" in refusal
        assert mean < 1e-7 < 1e-3 < largest
