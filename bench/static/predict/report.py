"""Records and tables of predictions. Every number in them is predicted; none is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.harness.records import Record, digits, table
from bench.static.predict import calibration
from bench.static.predict.assumptions import CARDS, OPTIMISTIC
from bench.static.predict.calls import CLASSES, TEMPERATURE
from bench.static.predict.losses import PASSES, Predicted

TOLERANCE = 0.03  # by which a kernel may get slower than committed
_TILED = (
    "forward_kernel", "backward_kernel", "forward_hopper_kernel", "backward_hopper_kernel",
    "wide_forward_hopper_kernel", "weights_hopper_kernel", "masked_weights_kernel", "pair_weights_kernel",
    "product_kernel",
)  # fmt: skip

Key = tuple[str, int, int, str, bool, str, str]


def records(found: Iterable[Predicted], arch: int, triton: str) -> list[Record]:
    """A record for each pass of each loss, and one for each of its kernels: all launches of it together."""
    rows = []
    for one in found:
        loss = one.loss
        case = {"bench": "predict", "objective": loss.objective, "n": loss.n, "d": loss.d, "precision": loss.precision}
        case |= {"by_hand": True} if loss.by_hand else {}
        card = {"arch": f"sm_{arch}", "triton": triton}
        for run in (*PASSES, "both"):
            times = {"predicted_ms": round(one.ms(run), 5), "bound_ms": round(one.bound[run], 5)}
            rows.append(case | {"pass": run} | times | card)
        for (run, name), ms in one.kernels().items():
            times = {"predicted_ms": round(ms, 5)}
            rows.append(case | {"pass": run, "kernel": name} | times | _kernel(one, run, name) | card)
    return rows


def _kernel(found: Predicted, run: str, name: str) -> Record:
    mine = [(count, p) for step, count, p in found.launches if (step.run, step.name) == (run, name)]
    cycles = sum(count * p.cycles for count, p in mine)
    busiest = max((p for _, p in mine), key=lambda p: p.ms)
    shares: dict[str, float] = {}
    for count, p in mine:
        for pipe, busy in p.pipes.items():
            shares[pipe] = shares.get(pipe, 0.0) + count * busy / cycles
    return {
        "launches": sum(count for count, _ in mine),
        "programs_per_sm": busiest.programs,
        "binding": busiest.binding,
        "busy": {pipe: round(share, 2) for pipe, share in shares.items() if share >= 0.01},
        "flops_over_needed": round(busiest.surplus, 3),
    }


def key(record: Record) -> Key:
    """What a prediction is of; without a kernel it is that of a whole pass."""
    of_loss = (record[name] for name in ("objective", "n", "d", "precision"))
    return (*of_loss, record.get("by_hand", False), record["pass"], record.get("kernel", ""))  # pyright: ignore[reportReturnType]


def slower(found: Sequence[Record], committed: Sequence[Record]) -> list[str]:
    """Kernels and passes that are predicted to take longer than committed, beyond the tolerance.

    What was not committed, or for another Triton, is not compared.
    """
    before = {key(one): one for one in committed}
    lines = []
    for one in found:
        old = before.get(key(one))
        if old is None or (old["triton"], old["arch"]) != (one["triton"], one["arch"]):
            continue
        if one["predicted_ms"] > old["predicted_ms"] * (1 + TOLERANCE):
            ratio = one["predicted_ms"] / old["predicted_ms"] - 1
            lines.append(
                f"{_loss(one)} {one['precision']} n={one['n']} d={one['d']} {one['pass']} "
                f"{one.get('kernel', 'in all')}: predicted {one['predicted_ms']:.4g} ms, committed "
                f"{old['predicted_ms']:.4g} ms ({ratio:+.1%})"
            )
    return lines


def _loss(record: Record) -> str:
    return record["objective"] + (", by hand" if record.get("by_hand") else "")


def assumptions(arch: int) -> str:
    """The table of assumptions in Markdown."""
    machine, rows = CARDS[arch].machine, []
    for row in CARDS[arch].table:
        others = ", ".join(f"{other:g}" for other in row.weak)
        value = f"{getattr(machine, row.name):g} {row.unit}".strip()
        rows.append((row.name, row.meaning, value, others, row.source))
    return table(("assumption", "of what", "value", "also plausible", "source"), rows, left=5)


def comparison(found: Sequence[calibration.Comparison]) -> str:
    """The published figures beside predictions, in Markdown."""
    head = ("kernel", "card", "source", "published TFLOP/s", "predicted", "predicted / published")
    return table(head, calibration.describe(found))


def _losses(rows: Sequence[Record]) -> str:
    whole = {key(one): one for one in rows if "kernel" not in one}
    head = ("loss", "precision", "D", "N", "forward", "backward", "both", "bound", "share of the bound")
    lines = []
    for one in whole.values():
        if one["pass"] != "both":
            continue
        fwd, bwd = (whole[(*key(one)[:5], run, "")] for run in PASSES)
        times = (fwd["predicted_ms"], bwd["predicted_ms"], one["predicted_ms"], one["bound_ms"])
        share = one["bound_ms"] / one["predicted_ms"]
        lines.append(
            (_loss(one), one["precision"], str(one["d"]), f"{one['n']:,}", *map(digits, times), f"{share:.0%}")
        )
    return table(head, lines)


def _kernels(rows: Sequence[Record]) -> str:
    head = ("loss", "kernel", "launches", "programs/SM", "predicted ms", "held by", "tensor", "shared", "mufu", "issue",
            "L2")  # fmt: skip
    lines = []
    for one in rows:
        if one.get("kernel") not in _TILED or one["n"] < 65536:
            continue
        busy = (f"{one['busy'].get(pipe, 0):.0%}" for pipe in ("tensor", "shared", "mufu", "issue", "l2"))
        name = f"{_loss(one)} {one['precision']} D={one['d']}"
        surplus = one["flops_over_needed"]
        kernel = one["kernel"] + (f", {surplus:.2g} times the products" if surplus > 1.01 else "")
        lines.append(
            (name, kernel, str(one["launches"]), str(one["programs_per_sm"]), digits(one["predicted_ms"]),
             one["binding"], *busy)
        )  # fmt: skip
    return table(head, lines) if lines else "None was asked for; --json has the kernels of all losses.\n"


def sensitivity(base: Sequence[Predicted], changed: Mapping[str, Sequence[Predicted]]) -> str:
    """What changes if one assumption does, in Markdown: the time of both passes, and the order of the losses by their
    share of the bound."""
    losses = (
        f"{one.loss.objective} {one.loss.precision} D={one.loss.d}" + ", by hand" * one.loss.by_hand for one in base
    )
    lines = [("predicted ms", *(digits(one.ms("both")) for one in base), "")]
    pairs = len(base) * (len(base) - 1) // 2
    for name, found in changed.items():
        ratios = (f"{a.ms('both') / b.ms('both') - 1:+.0%}" for a, b in zip(found, base, strict=True))
        lines.append((name, *ratios, f"{_swapped(found, base)} of {pairs}"))
    return table(("assumption", *losses, "pairs that swap ranks"), lines, left=1)


def _swapped(found: Sequence[Predicted], base: Sequence[Predicted]) -> int:
    before, after = ([one.bound["both"] / one.ms("both") for one in ones] for ones in (base, found))
    return sum(
        (before[i] - before[j]) * (after[i] - after[j]) < 0 for i in range(len(before)) for j in range(i)
    )  # fmt: skip


def markdown(rows: Sequence[Record], compared: Sequence[calibration.Comparison], weak: str | None) -> str:
    """The whole report.

    Args:
        weak: the table of the sensitivity, None if it was not computed.
    """
    low, high = OPTIMISTIC
    arch, triton = int(rows[0]["arch"].removeprefix("sm_")), rows[0]["triton"]
    card = CARDS[arch]
    machine = card.machine
    figures = "One published figure was" if len(compared) == 1 else f"{len(compared)} published figures were"
    trust = f"{figures} compared, below: how far off these may be is not known."
    if arch == calibration.ARCH:
        trust = f"Expect {low:.1f} to {high:.2f} times as long."
    by_hand = ' "By hand": with kernels\nthat are off by default.' if any(one.get("by_hand") for one in rows) else ""
    text = f"""\
# Predicted times, sm_{arch}, Triton {triton}

Nothing here is measured: a cycle model of the {card.name} read the compiled code (`bench/static/predict/`).
{trust} Losses of N float32 rows (clip: N / 2 in each tower), temperature
{TEMPERATURE:g}, {CLASSES} classes of equal size; predicted milliseconds of all launches of an eager call, without the
time of the host. The bound is that of the operations at {machine.roof:g} TFLOP/s and
{machine.roof_mufu:g} x 10^12 exponentials/s.{by_hand}

## Losses

{_losses(rows)}
## Kernels over tiles, N = 65,536

Shares of the time for which a pipe is busy. "Held by latency": none is busy for half of it.

{_kernels(rows)}
## Assumptions

{assumptions(arch)}
"""
    if compared:
        text += f"## Published figures\n\nTFLOP/s of kernels of the same kind.\n\n{comparison(compared)}\n"
    if weak:
        text += f"""\
## If an assumption is wrong

NT-Xent, N = 65,536, forward and backward: how the time changes, and how many
pairs of these losses swap ranks by their share of the bound.

{weak}
"""
    return text.rstrip("\n") + "\n"
