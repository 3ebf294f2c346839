"""Fully sharded training with Gradient Centralization: FSDP2 on the built-in digits.

torchrun --standalone --nproc_per_node 2 examples/fsdp2.py
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import gradcentral
from gradcentral.experiment.tasks import digits


class Block(nn.Module):
    """A residual block: the unit that FSDP2 gathers, uses and frees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, width]`` to ``[n, width]``."""
        change: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + change


def main() -> None:
    """Train on the processes that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    epochs: int = parser.parse_args().epochs

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    blocks = [Block(64) for _ in range(3)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *blocks, nn.Linear(64, 10)).to(device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Create the optimizer after fully_shard, which replaces the parameters. Each rank centers its own rows, so
    # centering needs no communication.
    optimizer = gradcentral.AdamW(model, lr=3e-3, placement="update")

    sampler: DistributedSampler[Any] = DistributedSampler(digits.train, seed=0)
    batches = DataLoader(digits.train, batch_size=32 // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, targets in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images.to(device)), targets.to(device))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        images, targets = digits.test.tensors
        with torch.no_grad():
            output = model(images.to(device))  # a collective operation: all ranks call it, with the same images
        if dist.get_rank() == 0:
            reached = digits.task.metric(output.cpu(), targets)
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {reached:.3f}", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
