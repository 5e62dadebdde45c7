"""The targets of the losses on an H200, checked against records of several runs of bench.losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.providers import CHUNKED, FUSED
from bench.records import Record, digits

CARD = "H200"
TIMES_MS = {  # of NT-Xent, forward and backward on the device, by rows and width
    (65536, 128): 5.5, (65536, 256): 10.5, (65536, 512): 15.5, (65536, 1024): 30, (4096, 128): 0.06,
    (1048576, 512): 4200,
}  # fmt: skip
WALL_MS = {(4096, 128): 0.15}  # of an eager call
LARGE, LARGE_GIB = (1048576, 512), 8
ROWS, WIDTH = 65536, 128
RELATIVE = {"nscl": 1.1, "supcon": 1.1, "ntxent+supcon": 1.1, "clip": 2.1 / 4}  # of NT-Xent's time at most, same rows
FASTER = {"Inf-CL": 10.0, "PyTorch in bf16": 2.0}  # than these at least, at FASTER_AT
FASTER_AT = ((65536, 256), (65536, 512))
HALF = ("chunked bf16", "torch.compile bf16", "flex_attention bf16")
PLAIN = ("plain PyTorch", "plain PyTorch bf16", *HALF)

Row = tuple[str, str, str, str]


def targets(records: Sequence[Record]) -> Iterator[Row]:
    """Rows of a table: target, where, found, reached. What a run on another device found reaches no target.

    Clip's target is 2.1 times NT-Xent's time at equal work; its two towers of n / 2 rows have a quarter of the pairs.
    """
    both = {
        (r["provider"], r["objective"], r["n"], r["d"]): r
        for r in records if r["pass"] == "both" and r["gpu_ms"] and CARD in r["device"]
    }  # fmt: skip

    def time(provider: str, n: int, d: int, objective: str = "ntxent") -> float | None:
        found = both.get((provider, objective, n, d))
        return found["gpu_ms"] if found else None

    for (n, d), limit in TIMES_MS.items():
        yield _most(f"ntxent in {limit:g} ms on the device", n, d, time(FUSED, n, d), limit, " ms")
    for (n, d), limit in WALL_MS.items():
        found = both.get((FUSED, "ntxent", n, d))
        yield _most(f"ntxent in {limit:g} ms on the wall clock", n, d, found and found["wall_ms"], limit, " ms")
    large = both.get((FUSED, "ntxent", *LARGE))
    peak = large["peak_bytes"] / 2**30 if large and large["peak_bytes"] is not None else None
    yield _most(f"ntxent within {LARGE_GIB} GiB", *LARGE, peak, LARGE_GIB, " GiB")
    for objective, limit in RELATIVE.items():
        share = _ratio(time(FUSED, ROWS, WIDTH, objective), time(FUSED, ROWS, WIDTH))
        yield _most(f"{objective} in at most {limit:g} times ntxent's time", ROWS, WIDTH, share, limit, "x")
    for n, d in FASTER_AT:
        rivals = {"Inf-CL": ("Inf-CL",), "PyTorch in bf16": HALF}
        for name, limit in FASTER.items():
            best = min((t for rival in rivals[name] if (t := time(rival, n, d))), default=None)
            yield _least(f"{limit:g} times as fast as {name}", n, d, _ratio(best, time(FUSED, n, d)), limit)
    for n, d in sorted({(n, d) for _, objective, n, d in both if objective == "ntxent" and n >= 512}):
        best = min((t for rival in PLAIN if (t := time(rival, n, d))), default=None)
        if best is not None:
            yield _least("as fast as the best PyTorch", n, d, _ratio(best, time(FUSED, n, d)), 1)


def ours(records: Sequence[Record]) -> str:
    """The provider that stands for fastcl: the kernels where they were timed."""
    return FUSED if any(r["provider"] == FUSED and r["wall_ms"] for r in records) else CHUNKED


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _most(what: str, n: int, d: int, found: float | None, limit: float, unit: str) -> Row:
    return _row(what, n, d, found, unit, found is not None and found <= limit)


def _least(what: str, n: int, d: int, found: float | None, limit: float) -> Row:
    return _row(what, n, d, found, "x", found is not None and found >= limit)


def _row(what: str, n: int, d: int, found: float | None, unit: str, reached: bool) -> Row:
    outcome = ("not measured", "") if found is None else (f"{digits(found)}{unit}", "yes" if reached else "no")
    return what, f"N = {n:,}, D = {d:,}", *outcome
