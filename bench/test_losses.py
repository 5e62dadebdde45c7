"""The providers under pytest-benchmark: `pytest bench --benchmark-only`."""

from functools import partial

import pytest
import torch

from bench import losses

N, D = 2048, 128
CASES = [(objective, p) for objective in ("ntxent", "supcon") for p in losses.PROVIDERS if objective in p.objectives]


@pytest.mark.parametrize(("objective", "provider"), CASES, ids=lambda v: getattr(v, "name", v))
def test_forward_and_backward(benchmark, objective: str, provider: losses.Provider):
    needed = 4 * provider.floats(N, D) / losses.GIB
    if needed > losses.MEMORY_GIB:
        pytest.skip(f"needs {needed:.3g} GiB, the limit is {losses.MEMORY_GIB} GiB")
    benchmark.group = objective
    run = partial(losses.passes, provider.loss, *losses.make_batch(N, D, torch.device("cpu")), objective)
    benchmark(run)
