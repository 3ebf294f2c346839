"""Step times compared with torch.optim on this machine: ``gradcentral bench``."""

from gradcentral.bench.benchmark import Benchmark, Case, bench
from gradcentral.bench.training_iteration import iteration

__all__ = ["Benchmark", "Case", "bench", "iteration"]
