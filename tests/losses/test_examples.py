"""The examples, each with two processes on the CPU: losses and weights are those of one process with whole batches."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from warm_commands import context, rank_environments

import fastcl
from bench.curves import PANELS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LIBRARIES = {"ddp": "torch", "fsdp2": "torch", "with_fabric": "lightning_fabric", "with_accelerate": "accelerate"}
pytestmark = pytest.mark.dist


def rank(name: str, environment: dict[str, str], folder: Path) -> None:
    """An example as torchrun runs it, but in float64; writes the losses and weights, or what it printed."""
    os.environ.update(environment)
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sys.stdout = sys.stderr = open(folder / f"{environment['RANK']}.log", "w", encoding="utf-8", buffering=1)
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    torch.save((found["losses"], found["weights"]), folder / f"{environment['RANK']}.pt")


def run(name: str, folder: Path) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and weights of both ranks."""
    processes = [context.Process(target=rank, args=(name, one, folder)) for one in rank_environments(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert [process.exitcode for process in processes] == [0, 0], said
    assert said.count("step 7: loss ") == 1, said  # the first rank alone tells
    return [torch.load(folder / f"{k}.pt") for k in range(2)]


@pytest.fixture(scope="module")
def one_process() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of one process, with a loop written here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        digits = importlib.import_module("digits")
        patch.delitem(sys.modules, "digits")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            model, data = digits.encoder(), digits.views()
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer, losses = torch.optim.SGD(model.parameters(), **digits.SGD), []
    for first, second, labels in DataLoader(data, digits.BATCH, drop_last=True):
        with fastcl.backend("dense"):
            loss = fastcl.nscl_loss(model(first), model(second), labels, digits.TEMPERATURE, gather_distributed=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_example_trains_as_one_process_does(name, one_process, tmp_path):
    if importlib.util.find_spec(LIBRARIES[name]) is None:
        pytest.skip(f"{LIBRARIES[name]} is not installed")
    losses, weights = one_process
    for got_losses, got_weights in run(name, tmp_path):
        assert got_losses == pytest.approx(losses, rel=1e-12)
        assert got_weights.keys() == weights.keys()
        for key, value in weights.items():
            assert (got_weights[key] - value).norm() <= 1e-12 * value.norm(), key


def test_every_example_is_run_and_short():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*LIBRARIES, *PANELS, "digits", "curves"}  # PANELS: tests/adapters/test_curves.py
    for name in scripts:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80 and ("gather_distributed=True" in text) == (name in LIBRARIES)
