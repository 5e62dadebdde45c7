"""The model beside published figures: kernels of the same kind, compiled here, on the loops they spend their time in.

The published kernels are not these very ones, and their tiles are not all stated: of several tiles the fastest
prediction counts, as tuning would choose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.harness.command import ROOT
from bench.static.compile import Job
from bench.static.jobs import Compiled, StaticError, compile_all
from bench.static.predict.assumptions import MACHINES, OPTIMISTIC, Machine
from bench.static.predict.launches import Kernel
from bench.static.predict.pipes import NotModelled

ARCH = 90
_MODULE = "bench.static.predict.calibration_kernels"


@dataclass(frozen=True)
class Figure:
    """A published rate.

    Attributes:
        published: TFLOP/s, from the least to the largest stated.
        tiles: R, S, D, warps, stages.
        card: what was measured, and what it does not share with the card that stands for its architecture.
    """

    name: str
    kernel: str
    published: tuple[float, float]
    source: str
    tiles: tuple[tuple[int, int, int, int, int], ...]
    arch: int = 90
    card: str = "H100"
    changes: Mapping[str, float] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        """The card that was measured."""
        return MACHINES[self.arch].changed(self.changes)


_D128 = ((128, 64, 128, 8, 3), (128, 32, 128, 4, 3), (128, 64, 128, 4, 2), (64, 64, 128, 4, 2))
_D64 = ((128, 64, 64, 4, 3), (128, 32, 64, 4, 3), (64, 64, 64, 4, 3))
_PRODUCTS = ((128, 128, 32, 8, 3), (128, 64, 32, 4, 4), (64, 128, 32, 4, 3))
_D128_TENSOR_MEMORY = ((128, 32, 128, 4, 3), (128, 64, 128, 8, 3), (128, 128, 128, 8, 3), (64, 64, 128, 4, 3))
_GEFORCE = {"hmma": 512}
FIGURES = (
    Figure("FlashAttention forward in Triton, D = 128", "attention_kernel", (487, 487),
        "facebookexperimental/triton, pull request 206", ((128, 128, 128, 8, 3), (128, 64, 128, 8, 3))),
    Figure("sigmoid attention forward in Triton, D = 128", "sigmoid_kernel", (515, 515),
        "triton-sigmoid (MSDLLCpapers)", ((64, 64, 128, 4, 3), (128, 32, 128, 4, 3), (128, 64, 128, 8, 3))),
    Figure("matrix product in Triton, tiles 128 x 256 x 64", "matmul_kernel", (600, 680),
        "Triton's tutorial on matrix products, range of reports", ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4))),
    Figure("FlashAttention-2 forward, D = 128", "attention_kernel", (184, 230),
        "arXiv 2307.08691, section 4.1 (up to 230); liangan1/GPU_travel (184 to 187)", _D128, 80, "A100"),
    Figure("FlashAttention-2 forward, D = 64", "attention_kernel", (81.9, 81.9),
        "gpu-mode/ring-attention, issue 10", _D64, 86, "RTX A5000", {"multiprocessors": 64, "clock": 1.695}),
    Figure("matrix product in Triton, 95.7 % of the tensor cores' rate", "matmul_kernel", (28.9, 28.9),
        "triton-lang/triton, issue 10851", _PRODUCTS, 89, "RTX 4060",
        {"multiprocessors": 24, "clock": 2.46, **_GEFORCE}),
    Figure("FlashAttention forward in Triton, D = 128", "attention_kernel", (594, 746),
        "arXiv 2603.05451 (1,605, up to 2.7 times Triton's); meta-pytorch/tritonbench, pull request 1014 (tutorial: "
        "671 to 746 from 8,192 rows on, perhaps with specialised warps)", _D128_TENSOR_MEMORY, 100, "B200"),
    Figure("matrix product in Triton, pipelined", "matmul_kernel", (840, 913),
        "facebookexperimental/triton, pull request 854 (column pipelined: one group of warps, copies by TMA, 750 W)",
        ((128, 256, 64, 8, 4), (128, 256, 64, 4, 4), (128, 128, 64, 8, 4)), 100, "B200"),
    Figure("FlashAttention-2 forward, D = 128", "attention_kernel", (187, 191),
        "gau-nernst/learn-cuda, 07_attention", _D128, 120, "RTX 5090",
        {"multiprocessors": 170, "clock": 2.407, **_GEFORCE}),
)  # fmt: skip


def jobs(arch: int) -> list[tuple[Figure, Job, float]]:
    """What to compile for an architecture, with the operations of a turn of its loop."""
    found = []
    for figure in (one for one in FIGURES if one.arch == arch):
        for r, s, d, warps, stages in figure.tiles:
            product = figure.kernel == "matmul_kernel"
            names = ("a", "b", "out") if product else ("q", "k", "v", "out")
            kinds: dict = dict.fromkeys(names, "*fp16") | {"n": "i32", "depth" if product else "scale": "i32"}
            if not product:
                kinds["scale"] = "fp32"
            constants = {"BLOCK_R": r, "BLOCK_S": s, "BLOCK_D" if product else "D": d}
            divisible = [name for name, kind in kinds.items() if kind != "fp32"]
            signature = kinds | dict.fromkeys(constants, "constexpr")
            job = Job(str(ROOT), _MODULE, figure.kernel, signature, constants, divisible, arch, warps, stages)
            found.append((figure, job, (2 if product else 4) * r * s * d))
    return found


@dataclass(frozen=True)
class Comparison:
    """A figure and the fastest prediction for it, in TFLOP/s."""

    figure: Figure
    predicted: float

    @property
    def optimism(self) -> tuple[float, float]:
        """Predicted over published rate, the least and the largest."""
        low, high = self.figure.published
        return self.predicted / high, self.predicted / low

    @property
    def holds(self) -> bool:
        """Whether a published rate lies in the range that the model may be off by."""
        least, most = self.optimism
        return least <= OPTIMISTIC[1] and most >= OPTIMISTIC[0]


def rate(compiled: Compiled, flops: float, figure: Figure) -> float:
    """Predicted TFLOP/s of a kernel's loop over tiles on the card of a figure.

    Raises:
        NotModelled: its code is not understood.
    """
    machine = figure.machine
    kernel = Kernel(compiled, figure.arch, machine)
    (body, *_) = kernel.paths.outer() or [frozenset()]
    if not body:
        raise NotModelled("no loop with products")
    cycles = kernel.timing(kernel.turn(body, flops)).cycles[-1]
    return flops / cycles * machine.multiprocessors * machine.clock * 1e-3


def compare(arch: int, python: str, workers: int) -> list[Comparison]:
    """All figures of an architecture beside their predictions.

    Raises:
        StaticError: a kernel does not compile.
    """
    wanted = jobs(arch)
    _, results = compile_all([job for _, job, _ in wanted], python, workers)
    best: dict[str, float] = {}
    for (figure, job, flops), result in zip(wanted, results, strict=True):
        if isinstance(result, str):
            raise StaticError(f"{job.kernel}: {result}")
        if result.facts.stack == 0:
            best[figure.name] = max(best.get(figure.name, 0.0), rate(result, flops, figure))
    return [Comparison(figure, best[figure.name]) for figure in FIGURES if figure.arch == arch]


def describe(found: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Rows of a table: kernel, card, source, published, predicted, predicted over published."""
    rows = []
    for one in found:
        low, high = one.figure.published
        published = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
        least, most = one.optimism
        optimism = f"{least:.2f}" if low == high else f"{least:.2f} to {most:.2f}"
        rows.append((one.figure.name, one.figure.card, one.figure.source, published, f"{one.predicted:.0f}", optimism))
    return rows
