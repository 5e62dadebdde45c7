"""What the model assumes of a card: one table, each row with its source.

A row with a range is weak. The sensitivity of a prediction is what it does when such a row takes either end of its
range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

# What a prediction may be off by, from the comparison with published figures (`calibration.py`): measured over
# predicted time.
OPTIMISTIC = (1.0, 1.35)


@dataclass(frozen=True)
class Assumption:
    """A row of the table; `name` is a field of `Machine`."""

    name: str
    unit: str
    meaning: str
    source: str
    weak: tuple[float, ...] = ()  # other values that are as plausible


@dataclass(frozen=True)
class Machine:
    """A card. Rates are per multiprocessor and clock cycle, latencies in cycles. The defaults are an H200 (sm_90); 0 is
    for what a card does not have."""

    multiprocessors: float = 132
    clock: float = 1.755
    tensor: float = 4096
    hmma: float = 2560
    queue: float = 6
    tensor_latency: float = 30
    mufu: float = 16
    mufu_latency: float = 22
    fma: float = 128
    alu: float = 64
    shared: float = 128
    shared_latency: float = 29
    shuffle_latency: float = 24
    barrier: float = 22
    tmem: float = 0
    tmem_latency: float = 0
    l2: float = 34
    load_latency: float = 600
    start: float = 1000
    dram: float = 4.3
    gap: float = 1.5
    torch: float = 3
    roof: float = 790
    roof_mufu: float = 3.9

    def changed(self, changes: Mapping[str, float]) -> Machine:
        """The same card with other values.

        Raises:
            ValueError: a name is not in the table.
        """
        if unknown := set(changes) - {field.name for field in fields(self)}:
            raise ValueError(f"no assumption is called {', '.join(sorted(unknown))}")
        return replace(self, **changes)


_WHITEPAPER = "NVIDIA's white papers on H100 and A100"
_GUIDE = "CUDA C++ Programming Guide 12.6, table 4"
_ESTIMATE = "estimate"
TABLE = (
    Assumption("multiprocessors", "", "multiprocessors", _WHITEPAPER),
    Assumption("clock", "GHz", "clock under load", "estimate; the peak of 989 TFLOP/s is at 1.83", (1.6, 1.83)),
    Assumption("tensor", "flop", "WGMMA of half precision: m64nNk16 takes N / 2 cycles", _WHITEPAPER),
    Assumption("hmma", "flop", "HMMA, the older instruction", "estimate: 63 % of WGMMA"),
    Assumption("queue", "", "WGMMA that a warpgroup may have issued but not started", _ESTIMATE, (2,)),
    Assumption("tensor_latency", "cycles", "from a product's end to the end of a wait for it", _ESTIMATE, (60,)),
    Assumption("mufu", "", "exponentials and conversions", _GUIDE),
    Assumption("mufu_latency", "cycles", "of an exponential", _ESTIMATE),
    Assumption("fma", "", "float32 multiply-adds", _GUIDE),
    Assumption("alu", "", "integer, logic, comparison, packing", _GUIDE),
    Assumption("shared", "bytes", "shared memory: WGMMA operands, loads, stores, shuffles, copies from L2",
        "quack, AI/gpu_pipe_microbench_notes.md; conflicts are ignored", (110,)),
    Assumption("shared_latency", "cycles", "of a load from shared memory", _ESTIMATE),
    Assumption("shuffle_latency", "cycles", "of a shuffle", _ESTIMATE),
    Assumption("barrier", "cycles", "of a barrier after its last warp", _ESTIMATE, (40,)),
    Assumption("tmem", "bytes", "between tensor memory and registers", "sm_100 alone has it"),
    Assumption("tmem_latency", "cycles", "of a load from tensor memory or a store to it", "sm_100 alone has it"),
    Assumption("l2", "bytes", "read from L2 by one multiprocessor while all read", _ESTIMATE, (28, 40)),
    Assumption("load_latency", "cycles", "of a load from L2 or memory under load", _ESTIMATE, (350, 800)),
    Assumption("start", "cycles", "to start and to end a program, beyond its instructions", _ESTIMATE, (300, 2000)),
    Assumption("dram", "TB/s", "memory of the card", "measured by others on an H200, of 4.8"),
    Assumption("gap", "us", "from the end of a launch to the first program of the next", _ESTIMATE, (0.8, 3)),
    Assumption("torch", "us", "a small kernel of PyTorch around a loss, with its gap", _ESTIMATE, (2, 5)),
    Assumption("roof", "TFLOP/s", "of the bound: half-precision products",
        "cuBLAS on an H200: 766 to 786 (tilus, pull request 86)"),
    Assumption("roof_mufu", "10^12/s", "of the bound: exponentials", "16 a cycle; FlashAttention-3"),
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """What a card has in place of the H200's value of an assumption."""

    name: str
    value: float
    source: str
    weak: tuple[float, ...] = ()


@dataclass(frozen=True)
class Card:
    """The card that stands for an architecture; `values`: what it does not share with the H200."""

    name: str
    values: tuple[Value, ...] = ()

    @property
    def machine(self) -> Machine:
        """Its rates and latencies."""
        return Machine().changed({one.name: one.value for one in self.values})

    @property
    def table(self) -> tuple[Assumption, ...]:
        """The table of its assumptions, but for what it does not have."""
        own = {one.name: one for one in self.values}
        return tuple(
            replace(row, source=own[row.name].source, weak=own[row.name].weak) if row.name in own else row
            for row in TABLE
            if getattr(self.machine, row.name)
        )


def _card(name: str, multiprocessors: float, clock: float, tensor: float, *values: Value) -> Card:
    """A card without WGMMA, of which `values` says the rest."""
    sheet = f"data sheet of the {name}"
    exponentials = 16 * multiprocessors * clock * 1e-3
    defaults = (
        Value("multiprocessors", multiprocessors, sheet),
        Value("clock", clock, f"{sheet}: boost", (round(0.85 * clock, 2),)),
        Value("tensor", tensor, "there is no WGMMA: as hmma"),
        Value("hmma", tensor, f"{sheet}: its peak of half precision with float32 sums"),
        Value("roof", round(tensor * multiprocessors * clock * 1e-3, 1), "the peak: no rate of a product is known"),
        Value("roof_mufu", round(exponentials, 2), "16 a cycle"),
    )
    own = {one.name: one for one in values}
    return Card(name, (*(own.pop(one.name, one) for one in defaults), *own.values()))


# Cards for workstations and servers have half-precision products with float32 sums at the full rate, GeForce at half.
_GEFORCE = Value("hmma", 1024, "data sheet: the peak; 512 on GeForce", (512,))


def _small_l2(measured: str) -> Value:
    """The L2 of the cards for graphics: all that others have measured is 15 to 18 bytes at the clock they give."""
    return Value("l2", 16, f"measured by others: {measured}", (14, 18))


_MEASURED = "SemiAnalysisAI/microbench-blackwell"
_B200 = (
    Value("multiprocessors", 148, "data sheet of the B200"),
    Value("clock", 1.85, "estimate; the peak of 2,250 TFLOP/s is at 1.856. Others: 1.965 at most, less under load",
        (1.6, 1.96)),
    Value("tensor", 8192, f"{_MEASURED}, umma_throughput: UTCHMMA of 128 or of 64 rows takes half a cycle a column"),
    Value("hmma", 2048, f"{_ESTIMATE}; gau-nernst/learn-cuda, 02e_matmul_sm100: 383 TFLOP/s, 1,400", (1400,)),
    Value("queue", 64, f"{_ESTIMATE}; {_MEASURED}: 256 in a row are issued as fast as they run", (4,)),
    Value("tensor_latency", 120, f"{_MEASURED}, umma_latency: 104 with the first operand in tensor memory, 120 with "
        "64 rows in shared memory, 136 with 128; from the product's end", (104, 136)),
    Value("shared", 128, f"{_MEASURED}, umma_throughput: operands; conflicts are ignored", (110,)),
    Value("tmem", 512, f"{_ESTIMATE}: a register of each thread in a cycle", (256,)),
    Value("tmem_latency", 30, _ESTIMATE, (15, 150)),
    Value("alu", 64, "CUDA C++ Best Practices Guide 13.4, 12.1.1; 128 integer sums", (128,)),
    Value("l2", 48, f"{_ESTIMATE}; gau-nernst/learn-cuda, 02e_matmul_sm100, v4: 1,054 TFLOP/s with tiles of 128 x 128, "
        "60 by TMA", (34, 60)),
    Value("load_latency", 700, f"{_ESTIMATE}; Chips and Cheese, Nvidia's B200: 150 ns from the near half of L2; "
        f"{_MEASURED}: 1,150 from the card's memory", (450, 1100)),
    Value("dram", 6.7, f"{_MEASURED}, ldgsts_throughput, of 7.7"),
    Value("roof", 1400, "cuBLAS on a B200: 1,359 to 1,414 (gau-nernst/learn-cuda, 02e_matmul_sm100)"),
    Value("roof_mufu", 4.38, "16 a cycle; FlashAttention-4, arXiv 2603.05451"),
)  # fmt: skip


CARDS = {
    80: _card("A100", 108, 1.41, 2048,
        Value("fma", 64, _GUIDE),
        Value("l2", 36, "measured by others: gpu-benches, gpu-l2-cache/a100_80.txt: 5.4 TB/s; white paper: 5,120 in "
            "all, 47 for each", (28, 40, 47)),
        Value("dram", 1.7, f"{_ESTIMATE}, of 2.04; gpu-benches, the same file: 1.73"),
        Value("roof", 280, f"{_ESTIMATE}: 90 % of the peak"), Value("roof_mufu", 2.4, "16 a cycle")),
    86: _card("RTX A6000", 84, 1.8, 1024, _GEFORCE,
        Value("clock", 1.8, "data sheet: boost; others have seen 1.5 under load", (1.5,)),
        _small_l2("gpu-benches, gpu-cache/a40.txt: 2.43 TB/s on an A40 (84 at 1.73 GHz), 16.7"),
        Value("dram", 0.69, f"{_ESTIMATE}, of 0.768")),
    89: _card("L40S", 142, 2.52, 1024, _GEFORCE,
        _small_l2("gpu-benches, gpu-cache/l40.txt: 5.71 TB/s on an L40 (142 at 2.49 GHz), 16.1; gpu-l2-cache: 14.7"),
        Value("dram", 0.78, f"{_ESTIMATE}, of 0.864; gpu-benches, gpu-l2-cache/l40.txt: 0.80 on an L40")),
    90: Card("H200"),
    100: Card("B200", _B200),
    120: _card("RTX PRO 6000 Blackwell", 188, 2.6, 1024,
        Value("clock", 2.6, "data sheet: 125 TFLOP/s of float32; others have seen 2.2 to 2.35 under load", (2.2,)),
        replace(_GEFORCE, source="others: 504 TFLOP/s at 2.617 GHz, 360 to 390 measured; 512 on GeForce"),
        _small_l2("Chips and Cheese, Blackwell: Nvidia's Massive GPU: 8.7 TB/s, 17.8 at 2.6 GHz"),
        Value("alu", 64, "CUDA C++ Best Practices Guide 13.4, 12.1.1: shifts and logic 64, integer sums 128", (128,)),
        Value("dram", 1.6, f"{_ESTIMATE}, of 1.79; others have measured 1.46 for a copy", (1.46,))),
}  # fmt: skip
MACHINES = {arch: card.machine for arch, card in CARDS.items()}
