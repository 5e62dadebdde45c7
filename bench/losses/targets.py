"""Targets of the losses on an H200, checked against records of one or more runs of bench.losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.harness.markdown import Target, outcome
from bench.harness.records import Record, digits
from bench.losses.providers import CHUNKED, FUSED

CARD = "H200"
TIMES_MS = {  # NT-Xent, forward and backward on the device, by (rows, width)
    (65536, 128): 5.5, (65536, 256): 10.5, (65536, 512): 15.5, (65536, 1024): 30, (4096, 128): 0.06,
    (1048576, 512): 4200,
}  # fmt: skip
WALL_MS = {(4096, 128): 0.15}  # for an eager call
LARGE, LARGE_GIB = (1048576, 512), 8
ROWS, WIDTH = 65536, 128
RELATIVE = {"nscl": 1.1, "supcon": 1.1, "ntxent+supcon": 1.1, "clip": 2.1 / 4}  # at most, times NT-Xent on equal rows
FASTER = {"Inf-CL": 10.0, "PyTorch in bf16": 2.0}  # at least, against these providers at FASTER_AT
FASTER_AT = ((65536, 256), (65536, 512))
HALF = ("chunked bf16", "torch.compile bf16", "flex_attention bf16")
PLAIN = ("plain PyTorch", "plain PyTorch bf16", *HALF)


def targets(records: Sequence[Record]) -> Iterator[Target]:
    """Rows of the target table: target, where, found, reached. Runs on other devices are ignored.

    Clip's target is 2.1 times NT-Xent's time at equal work; its two towers of n / 2 rows have a quarter of the pairs.
    Times are compared only within a run, identified by its date.
    """
    timed = [r for r in records if r["pass"] == "both" and r["gpu_ms"] and CARD in r["device"]]
    fused = [r for r in timed if r["provider"] == FUSED]

    def first(n: int, d: int) -> Record | None:
        return next((r for r in fused if _case(r) == ("ntxent", n, d)), None)

    def slower(rivals: Sequence[str], n: int, d: int) -> float | None:
        """Time of the fastest rival relative to ours."""
        return min((
            r["gpu_ms"] / ours["gpu_ms"] for r in timed for ours in fused
            if r["provider"] in rivals and r["date"] == ours["date"] and _case(r) == _case(ours) == ("ntxent", n, d)
        ), default=None)  # fmt: skip

    for (n, d), limit in TIMES_MS.items():
        yield _most(f"ntxent in {limit:g} ms on the device", n, d, _value(first(n, d), "gpu_ms"), limit, " ms")
    for (n, d), limit in WALL_MS.items():
        yield _most(f"ntxent in {limit:g} ms on the wall clock", n, d, _value(first(n, d), "wall_ms"), limit, " ms")
    peak = _value(first(*LARGE), "peak_bytes")
    yield _most(f"ntxent within {LARGE_GIB} GiB", *LARGE, None if peak is None else peak / 2**30, LARGE_GIB, " GiB")
    for objective, limit in RELATIVE.items():
        cases = (objective, ROWS, WIDTH), ("ntxent", ROWS, WIDTH)
        shares = (
            r["gpu_ms"] / base["gpu_ms"] for r in fused for base in fused
            if r["date"] == base["date"] and (_case(r), _case(base)) == cases
        )  # fmt: skip
        share = next(shares, None)
        yield _most(f"{objective} in at most {limit:g} times ntxent's time", ROWS, WIDTH, share, limit, "x")
    for n, d in FASTER_AT:
        rivals = {"Inf-CL": ("Inf-CL",), "PyTorch in bf16": HALF}
        for name, limit in FASTER.items():
            yield _least(f"{limit:g} times as fast as {name}", n, d, slower(rivals[name], n, d), limit)
    for n, d in sorted({(r["n"], r["d"]) for r in fused if r["objective"] == "ntxent" and r["n"] >= 512}):
        ratio = slower(PLAIN, n, d)
        if ratio is not None:
            yield _least("as fast as the best PyTorch", n, d, ratio, 1)


def ours(records: Sequence[Record]) -> str:
    """The provider that represents fastcl: the Triton kernels if they were timed."""
    return FUSED if any(r["provider"] == FUSED and r["wall_ms"] for r in records) else CHUNKED


def _case(r: Record) -> tuple[str, int, int]:
    return r["objective"], r["n"], r["d"]


def _value(r: Record | None, key: str) -> float | None:
    return None if r is None else r[key]


def _most(what: str, n: int, d: int, found: float | None, limit: float, unit: str) -> Target:
    return what, f"N = {n:,}, D = {d:,}", *outcome(found, lambda x: f"{digits(x)}{unit}", lambda x: x <= limit)


def _least(what: str, n: int, d: int, found: float | None, limit: float) -> Target:
    return what, f"N = {n:,}, D = {d:,}", *outcome(found, lambda x: f"{digits(x)}x", lambda x: x >= limit)
