"""The providers under pytest-benchmark on a CPU: `pytest bench --benchmark-only`."""

from functools import partial

import pytest
import torch

from bench.losses import run as losses

N, D = 2048, 128
CPU = torch.device("cpu")
CASES = [(objective, p) for objective in ("ntxent", "supcon") for p in losses.PROVIDERS if objective in p.objectives]


@pytest.mark.parametrize(("objective", "provider"), CASES, ids=lambda v: getattr(v, "name", v))
def test_forward_and_backward(benchmark, objective: str, provider: losses.Provider):
    if reason := provider.obstacle(CPU, objective):
        pytest.skip(reason)
    needed = 4 * provider.floats(N, D) / losses.GIB
    if needed > losses.MEMORY_GIB:
        pytest.skip(f"needs {needed:.3g} GiB, the limit is {losses.MEMORY_GIB} GiB")
    benchmark.group = objective
    run = partial(losses.passes, provider.loss, *losses.make_batch(N, D, CPU), objective)
    benchmark(run)
