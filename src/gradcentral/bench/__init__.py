"""Step times compared with torch.optim on this machine: ``gradcentral bench``."""

from gradcentral.bench.benchmark import Benchmark, Case, bench, describe_machine, iteration

__all__ = ["Benchmark", "Case", "bench", "describe_machine", "iteration"]
