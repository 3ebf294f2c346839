"""Under DistributedDataParallel, `centralize_in_backward` centers the gradients before they are reduced."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from gradcentral import center, centralize_in_backward, weight_layout
from tests.distributed.workers import Workers


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def compare_with_one_rank(attach_first: bool, as_view: bool) -> None:
    model, ranks = _model(), dist.get_world_size()
    if attach_first:
        centralize_in_backward(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    if not attach_first:
        centralize_in_backward(wrapped)
    alone = _model()
    for step in range(3):
        with wrapped.no_sync() if step == 0 else nullcontext():
            wrapped(_batch(step, dist.get_rank())).square().mean().backward()
        for rank in range(ranks):
            (alone(_batch(step, rank)).square().mean() / ranks).backward()
    layout = weight_layout(alone)
    assert len(layout) == 2
    for p, reference in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.grad is not None
        assert reference.grad is not None
        expected = center(reference.grad, layout[reference]) if reference in layout else reference.grad
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
def test_gradients_equal_those_of_one_rank(attach_first: bool, as_view: bool, two_ranks: Workers) -> None:
    two_ranks.run(compare_with_one_rank, attach_first, as_view)


def wrap_in_fsdp1_afterwards(use_orig_params: bool) -> None:
    model = _model()
    centralize_in_backward(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="made by FullyShardedDataParallel"):
        wrapped(_batch(0, 0))


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_model_that_fsdp1_flattens_afterwards_raises(use_orig_params: bool, two_ranks: Workers) -> None:
    two_ranks.run(wrap_in_fsdp1_afterwards, use_orig_params)
