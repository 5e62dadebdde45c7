"""The providers under pytest-benchmark on a CPU: `pytest bench --benchmark-only`."""

from functools import partial

import pytest
import torch

from bench.harness.records import MEMORY_GIB, over_memory
from bench.losses import run as losses

N, D = 2048, 128
CPU = torch.device("cpu")
CASES = [(objective, p) for objective in ("ntxent", "supcon") for p in losses.PROVIDERS if objective in p.objectives]


@pytest.mark.parametrize(("objective", "provider"), CASES, ids=lambda v: getattr(v, "name", v))
def test_forward_and_backward(benchmark, objective: str, provider: losses.Provider):
    if reason := provider.obstacle(CPU, objective):
        pytest.skip(reason)
    if reason := over_memory(provider.floats(N, D), MEMORY_GIB):
        pytest.skip(reason)
    benchmark.group = objective
    run = partial(losses.passes, provider.loss, *losses.make_batch(N, D, CPU), objective)
    benchmark(run)
