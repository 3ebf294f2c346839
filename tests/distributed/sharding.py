"""FSDP2 on processes of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard_and_average(module: nn.Module | list[nn.Module], mesh: DeviceMesh, **options: Any) -> None:
    """Call ``fully_shard``; gradients are averaged over the ranks, in all versions of torch.

    In torch 2.8, gloo's reduce-scatter ignores that FSDP2 asks for the average and returns the sum, so FSDP2 has to be
    told to divide the sum itself.
    """
    fully_shard(module, mesh=mesh, **options)
    if torch.__version__ >= "2.9":  # compared as versions, not as text
        return
    for sharded in module if isinstance(module, list) else [module]:
        assert isinstance(sharded, FSDPModule)
        sharded.set_force_sum_reduction_for_comms(True)
