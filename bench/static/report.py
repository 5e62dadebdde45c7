"""The gate's report on compiled kernels: limits of the architectures, findings, records, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bench.harness.records import digits, table
from bench.static.compile import Facts, Job

Result = Facts | str  # a string says why there is no kernel
KIB = 1024
_REGISTERS = 65536  # per multiprocessor, in four equal parts
_TENSOR_MEMORY = 512  # columns
_RESERVED = KIB  # bytes of shared memory reserved per program


@dataclass(frozen=True)
class Limits:
    """Limits of an architecture: KiB of shared memory per program and per multiprocessor, warps and programs on one."""

    shared: int
    shared_all: int
    warps: int
    programs: int
    tensor: str  # family of its tensor-core instructions, a key of `sass.TENSOR`


LIMITS = {
    80: Limits(163, 164, 64, 32, "HMMA"),
    86: Limits(99, 100, 48, 16, "HMMA"),
    89: Limits(99, 100, 48, 24, "HMMA"),
    90: Limits(227, 228, 64, 32, "HGMMA"),
    100: Limits(227, 228, 64, 32, "UTCMMA"),
    120: Limits(99, 100, 48, 24, "HMMA"),
}


@dataclass(frozen=True)
class Finding:
    """Why a launch does not pass; the name is a key of `FINDINGS`."""

    name: str
    detail: str


FINDINGS = {
    "compile": "Triton or ptxas fails",
    "spill": "registers spill to local memory",
    "shared": "shared memory over the limit of the architecture",
    "tensor memory": "more columns than sm_100 has",
    "tensor core": "a tl.dot, but none of the instructions that the architecture is fast by",
    "serialised": "WGMMA wait for each other",
    "hazard": "a register is written, or shared memory released, that a WGMMA in flight may still read",
}


def findings(job: Job, result: Result) -> list[Finding]:
    """What is wrong with a compiled job; empty if it is clean."""
    if isinstance(result, str):
        return [Finding("compile", " ".join(result.split())[:500])]
    facts, limits, found = result, LIMITS[job.arch], []
    if facts.stack or facts.local:
        found.append(Finding("spill", f"{facts.stack} bytes a thread, {facts.local} instructions"))
    if facts.shared > limits.shared * KIB:
        found.append(Finding("shared", f"{facts.shared} bytes, the limit is {limits.shared * KIB}"))
    if facts.tensor_memory > _TENSOR_MEMORY:
        found.append(Finding("tensor memory", f"{facts.tensor_memory} columns, the limit is {_TENSOR_MEMORY}"))
    if facts.dot and not facts.tensor[limits.tensor]:
        others = ", ".join(f"{count} {name}" for name, count in facts.tensor.items() if count)
        found.append(Finding("tensor core", f"no {limits.tensor}; instead {others or 'no tensor-core instruction'}"))
    if facts.messages or 2 * facts.broken >= max(facts.chained, 1):
        detail = f"{facts.waits} waits, {facts.tensor['HGMMA']} HGMMA"
        found.append(Finding("serialised", "; ".join([detail, *facts.messages])))
    if facts.hazards:
        found.append(Finding("hazard", "; ".join(facts.hazards[:3])))
    return found


def occupancy(facts: Facts, arch: int) -> int:
    """Number of programs that fit on a multiprocessor at a time."""
    limits = LIMITS[arch]
    per_warp = math.ceil(facts.registers / 8) * 8 * 32
    by_registers = _REGISTERS // 4 // per_warp * 4 // facts.warps
    by_shared = limits.shared_all * KIB // (facts.shared + _RESERVED)
    found = min(by_registers, by_shared, limits.warps // facts.warps, limits.programs)
    if facts.tensor_memory:
        found = min(found, _TENSOR_MEMORY // facts.tensor_memory)
    return found


def exponentials(job: Job, facts: Facts) -> float | None:
    """Exponentials per element of a tile of resident by streamed rows; None without a loop over such tiles, or if
    several consumers share them."""
    constants = {path.rpartition(".")[2]: value for path, value in job.constants.items()}
    sides = [constants.get(name) for name in ("BLOCK_R", "BLOCK_S")]
    if facts.exponentials is None or None in sides or "CONSUMERS" in constants:
        return None
    return facts.exponentials * facts.warps * 32 / math.prod(sides)


def record(job: Job, cases: list[str], result: Result, triton: str) -> dict[str, Any]:
    """One flat record: the job, the facts (null if it did not compile) and the findings."""
    found = {
        "bench": "static", "triton": triton, "arch": f"sm_{job.arch}", "module": job.module, "kernel": job.kernel,
        "signature": job.signature, "constants": job.constants, "divisible": job.divisible, "num_warps": job.warps,
        "num_stages": job.stages, "cases": cases,
    }  # fmt: skip
    failed = isinstance(result, str)
    found |= dict.fromkeys(Facts.__dataclass_fields__) if failed else asdict(result)
    found["programs_per_sm"] = None if failed else occupancy(result, job.arch)
    found["exponentials_per_element"] = None if failed else exponentials(job, result)
    found["findings"] = [asdict(finding) for finding in findings(job, result)]
    return found


_HEAD = (
    "launch", "case", "registers", "spill B", "shared KiB", "of", "programs/SM", "tensor", "exp/element", "findings"
)  # fmt: skip


_LEGEND = """\
Registers and spilled bytes are those of a thread, shared memory that of a program, in KiB of what the architecture
allows it; programs/SM is how many of them a multiprocessor holds. exp/element counts the exponentials per element of a
tile of resident by streamed rows. D is the padded width; R, S, M, K and N are rows of a block, w warps, s stages; a
name with a minus is something that the call does not have.
"""


def report(records: list[dict[str, Any]], triton: str, only: str = "") -> str:
    """Markdown: a table per architecture, then every finding in full.

    Args:
        only: the expression that selected the cases.
    """
    chosen = f"Only cases with {only!r} in their names. " if only else ""
    parts = [f"# Compiled launches, Triton {triton}\n\n{chosen}{summary(records)}\n\n{_LEGEND}"]
    for arch in dict.fromkeys(r["arch"] for r in records):
        mine = [r for r in records if r["arch"] == arch]
        parts.append(f"\n## {arch}\n\n{table(_HEAD, [_row(r) for r in mine])}")
    bad = [(r, finding) for r in records for finding in r["findings"]]
    if bad:
        lines = (f"- {r['arch']} {launch_name(r)} ({_cases(r)}): **{f['name']}**: {f['detail']}\n" for r, f in bad)
        parts.append("\n## Findings\n\n" + "".join(lines))
    return "".join(parts)


def summary(records: list[dict[str, Any]]) -> str:
    """One line: number of launches, and numbers with findings."""
    names = [name for r in records for name in {f["name"] for f in r["findings"]}]
    bad = sum(bool(r["findings"]) for r in records)
    which = ", ".join(f"{name}: {names.count(name)}" for name in FINDINGS if name in names)
    noun = "launch" if len(records) == 1 else "launches"
    return f"{len(records)} {noun}, {bad} with findings" + (f" ({which})." if bad else ".")


def launch_name(r: dict[str, Any]) -> str:
    """Kernel, tile, warps, stages and set flags of a record; a minus marks arguments that are None."""
    constants = [(path.rpartition(".")[2], value) for path, value in r["constants"].items()]
    words = [r["kernel"]]
    for name, value in constants:
        if name == "D" or name.startswith("BLOCK_"):
            words.append(f"{name.removeprefix('BLOCK_')}{value}")
    words.append(f"w{r['num_warps']} s{r['num_stages']}")
    words += [value for name, value in constants if name == "TERM" and value != "exponential"]
    words += dict.fromkeys(name for name, value in constants if value is True)
    words += dict.fromkeys(f"-{name}" for name, value in constants if value is None)
    return " ".join(words)


def _row(r: dict[str, Any]) -> Iterable[str]:
    limits = LIMITS[int(r["arch"].removeprefix("sm_"))]
    tail = [", ".join(f["name"] for f in r["findings"]) or "-"]
    if r["registers"] is None:
        return [launch_name(r), _cases(r), *["-"] * (len(_HEAD) - 3), *tail]
    tensor = " ".join(f"{count} {name}" for name, count in r["tensor"].items() if count)
    per_element = r["exponentials_per_element"]
    return [
        launch_name(r), _cases(r), str(r["registers"]), str(r["stack"]), f"{r['shared'] / KIB:.1f}", str(limits.shared),
        str(r["programs_per_sm"]), tensor or "-", "-" if per_element is None else digits(per_element), *tail,
    ]  # fmt: skip


def _cases(r: dict[str, Any]) -> str:
    more = len(r["cases"]) - 1
    return r["cases"][0] + (f" and {more} more" if more else "")
