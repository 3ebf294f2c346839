"""Step time against torch.optim on this machine: ``gradcentral bench``."""

from gradcentral.bench.runs import Benchmark, Case, bench, iteration

__all__ = ["Benchmark", "Case", "bench", "iteration"]
