"""Process-wide defaults of PyTorch, a dtype and a device, reach nothing that fastcl computes.

The lint keeps factory calls explicit; the runs find what no lint sees: integers that are divided, library calls.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from default_runs import flattened, kernels, launches, losses, measures, sheet, similarities, views
from test_structure import complaints
from tiny_run import results, tiny_config

from fastcl.train import Lockstep

FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def implicit(text: str, path: Path) -> list[str]:
    """Factories of torch that are called without a dtype and a device, or handed on without."""
    tree, explicit, found = ast.parse(text), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
            called = node.args[0] if ast.unparse(node.func) == "partial" else node.func
            both = (called.body, called.orelse) if isinstance(called, ast.IfExp) else (called,)
            explicit.update(map(id, both))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and id(node) not in explicit:
            if node.attr in FACTORIES:
                found.append(f"{path}:{node.lineno}: torch.{node.attr} without dtype= and device=")
        elif isinstance(node, ast.Call) and ast.unparse(node) == "torch.Generator()":
            found.append(f"{path}:{node.lineno}: torch.Generator without a device")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = FACTORIES.intersection(alias.name for alias in node.names)
            found += [f"{path}:{node.lineno}: {name} must be called as torch.{name}" for name in sorted(names)]
    return found


def test_factories_name_their_dtype_and_device():
    path = Path("fastcl/x.py")
    for source in (
        "torch.empty(3, device=d)", "torch.zeros(3, dtype=t)", "torch.tensor(1.0)", "f(torch.arange)",
        "(torch.empty if a else torch.zeros)(3, device=d)", "partial(torch.empty, dtype=t)", "torch.Generator()",
        "from torch import zeros", "f(torch.ones(2), dtype=t, device=d)",
        "torch.full(2, torch.rand(1), dtype=t, device=d)",
    ):  # fmt: skip
        assert implicit(source, path), source
    for source in (
        "torch.empty(3, dtype=t, device=d)", "partial(torch.empty, dtype=t, device=d)", "x.new_zeros(3)",
        "(torch.empty if a else torch.zeros)(3, dtype=t, device=d)", "torch.ones_like(x)", 'torch.Generator("cpu")',
    ):  # fmt: skip
        assert not implicit(source, path), source
    assert not (found := complaints(implicit, "fastcl", "kernels")), found


RUNS = {
    "dense": partial(losses, "dense"),
    "chunked": partial(losses, "chunked"),
    "similarities": similarities,
    "kernels": kernels,
    "launches": launches,
    "torchvision": partial(views, "torchvision"),
    "dali": partial(views, "dali"),
    "measures": measures,
    "sheet": sheet,
}
DEFAULTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64, "meta": "meta"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[[str], list]:
    """Function from the name of a run to what it computes under PyTorch's own defaults."""
    return lru_cache(lambda name: result(name, tmp_path_factory.mktemp("plain")))


def result(name: str, folder: Path) -> list:
    run = RUNS[name]
    return flattened(run(folder) if run in (measures, sheet) else run())


@contextmanager
def process_wide(default: torch.dtype | str) -> Iterator[None]:
    try:
        torch.set_default_device(default) if isinstance(default, str) else torch.set_default_dtype(default)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", RUNS)
def test_defaults_change_no_bit(name, default, plain, tmp_path):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install fastcl[dali])")
    expected = plain(name)
    with process_wide(DEFAULTS[default]):
        found = result(name, tmp_path)
    assert found == expected


def test_a_run_trains_under_plain_defaults(tmp_path):
    config = tiny_config(train__epochs=1, train__models=["dcl", "ce"], model__cifar_stem=True)
    Lockstep(config, tmp_path / "plain").run()
    with process_wide(torch.bfloat16), process_wide("meta"):
        Lockstep(config, tmp_path / "other").run()
        assert torch.get_default_device().type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
    assert results(tmp_path / "other") == results(tmp_path / "plain")
