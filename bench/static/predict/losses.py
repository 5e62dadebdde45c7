"""The predicted times of whole losses: their launches, one after the other, and the kernels of PyTorch around them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from bench.static.compile import Job
from bench.static.jobs import Result, StaticError, compile_all, job
from bench.static.predict import work
from bench.static.predict.assumptions import Machine
from bench.static.predict.calls import Loss, record
from bench.static.predict.launches import Kernel, Prediction, predict
from bench.static.predict.pipes import NotModelled
from fastcl.rowstats.triton.operand import NARROW

PASSES = ("fwd", "bwd")


@dataclass(frozen=True)
class Step:
    """A launch of a loss: where it stands, its kernel's job, what it does."""

    run: str  # the pass
    name: str
    grid: tuple[int, ...]
    key: str  # of its job
    work: work.Work
    memory: int


@dataclass
class Recorded:
    """A loss and its launches."""

    loss: Loss
    steps: list[Step]
    torch: tuple[int, int]


@dataclass
class Predicted:
    """A loss with the time of every launch.

    Attributes:
        launches: steps, how often each occurs, and one's prediction.
        torch_ms: of PyTorch's kernels, by pass.
    """

    loss: Loss
    launches: list[tuple[Step, int, Prediction]]
    torch_ms: tuple[float, float]
    bound: dict[str, float] = field(default_factory=dict)

    def ms(self, run: str) -> float:
        """Of a pass: "fwd", "bwd" or "both"."""
        if run == "both":
            return sum(map(self.ms, PASSES))
        launched = sum(count * one.ms for step, count, one in self.launches if step.run == run)
        return launched + self.torch_ms[PASSES.index(run)]

    def kernels(self) -> dict[tuple[str, str], float]:
        """Milliseconds by pass and kernel."""
        found: dict[tuple[str, str], float] = {}
        for step, count, one in self.launches:
            found[step.run, step.name] = found.get((step.run, step.name), 0.0) + count * one.ms
        return found


class Model:
    """Compiled kernels by the JSON of their jobs."""

    def __init__(self, arch: int, python: str, workers: int) -> None:
        self.arch, self.python, self.workers = arch, python, workers
        self.jobs: dict[str, Job] = {}
        self.results: dict[str, Result] = {}
        self.triton = ""

    def record(self, losses: Iterable[Loss]) -> list[Recorded]:
        """Record losses and compile what they launch."""
        found = [self.recorded(loss) for loss in losses]
        self.compile()
        return found

    def recorded(self, loss: Loss) -> Recorded:
        """A loss whose launches `compile` will compile."""
        call = record(loss, self.arch)
        steps = []
        for run, launches in zip(PASSES, (call.forward, call.backward), strict=True):
            for launch in launches:
                one = job(launch, self.arch)
                what = work.of_launch(launch, loss.classes)
                # Of masked tiles alone, whose share of the memory is small, the tiles' own copies tell the time.
                memory = 0 if one.kernel == "masked_weights_kernel" else work.memory(launch)
                steps.append(Step(run, one.kernel, launch.grid, self.add(one), what, memory))
        return Recorded(loss, steps, call.torch)

    def add(self, one: Job) -> str:
        """The key of a job that `compile` will compile."""
        key = json.dumps(asdict(one))
        self.jobs[key] = one
        return key

    def compile(self) -> None:
        """Compile all jobs that were added since the last time."""
        wanted = {key: one for key, one in self.jobs.items() if key not in self.results}
        if wanted:
            self.triton, results = compile_all(list(wanted.values()), self.python, self.workers)
            self.results |= zip(wanted, results, strict=True)

    def predict(self, recorded: Sequence[Recorded], machine: Machine) -> list[Predicted]:
        """The times of recorded losses on a machine.

        Raises:
            StaticError: a kernel does not compile, or the model does not understand its code.
        """
        kernels: dict[str, Kernel] = {}
        return [self.one(one, machine, kernels) for one in recorded]

    def one(self, recorded: Recorded, machine: Machine, kernels: dict[str, Kernel]) -> Predicted:
        """`predict` for one loss; kernels: those of other losses on this machine, by the keys of their jobs."""
        counts: dict[Step, int] = {}
        for step in recorded.steps:
            counts[step] = counts.get(step, 0) + 1
        found = []
        for step, count in counts.items():
            result = self.results[step.key]
            if isinstance(result, str):
                raise StaticError(f"{recorded.loss.name}: {step.name} does not compile: {result}")
            try:
                if step.key not in kernels:
                    kernels[step.key] = Kernel(result, self.arch, machine)
                found.append((step, count, predict(kernels[step.key], step.work, step.memory)))
            except NotModelled as error:
                raise StaticError(f"{recorded.loss.name}: {step.name} is not modelled: {error}") from error
        before, after = (count * machine.torch * 1e-3 for count in recorded.torch)
        return Predicted(recorded.loss, found, (before, after), bound(recorded.loss, machine))


def bound(loss: Loss, machine: Machine) -> dict[str, float]:
    """Least milliseconds of each pass at rates that others have reached, of products or of exponentials.

    With f = rows rows D: forward f if the candidates are the rows themselves, else 2 f; backward 4 f up to 256 columns
    and 3 f beyond, for two towers twice that. Split precision takes three products for one; the additional products of
    one class in half precision are not counted.
    """
    f = math.prod((loss.rows, loss.rows, loss.d)) / machine.roof * 1e-9 * (3 if loss.precision == "fp32" else 1)
    two_towers = loss.objective == "clip"
    exponentials = loss.rows**2 / machine.roof_mufu * 1e-9 * (1 if two_towers else 0.5)
    sides = 2 if two_towers else 1
    forward = max(f * sides, exponentials)
    backward = max(f * sides * (4 if loss.d <= NARROW else 3), exponentials)
    return {"fwd": forward, "bwd": backward, "both": forward + backward}
