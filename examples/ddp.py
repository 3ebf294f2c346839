"""Data-parallel training with Gradient Centralization: DistributedDataParallel on the built-in digits.

torchrun --standalone --nproc_per_node 2 examples/ddp.py
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import gradcentral
from gradcentral.experiment.tasks import digits


def accuracy(model: nn.Module, device: torch.device) -> float:
    """Return the fraction of correct test images; called on one rank only, so the model must be the unwrapped one."""
    images, targets = (tensor.to(device) for tensor in digits.test.tensors)
    with torch.no_grad():
        return float((model(images).argmax(1) == targets).float().mean())


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

    torch.manual_seed(0)
    model = DistributedDataParallel(digits.cnn().to(device))
    # The same line as on one device: DDP gives every rank the same gradients, so centering needs no communication.
    optimizer = gradcentral.SGD(model, lr=0.05, momentum=0.9, weight_decay=5e-4)
    # For any other optimizer: gradcentral.centralize(optimizer, model)

    sampler: DistributedSampler[Any] = DistributedSampler(digits.train, seed=0)
    batches = DataLoader(digits.train, batch_size=32 // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, targets in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images.to(device)), targets.to(device))
            torch.autograd.backward(loss)
            optimizer.step()
        if dist.get_rank() == 0:
            print(
                f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy(model.module, device):.3f}",
                flush=True,
            )

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
