"""The tables and the figure of docs/scaling.md; every number is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.harness.figures import Line, Panel, drawn
from bench.harness.records import digits, table
from bench.scaling import times
from bench.scaling.formulas import METHODS, Setting
from bench.scaling.times import NETWORK, NODE, Rates, Time, link_of, rates, time_of

RING = "Inf-CL's ring"
SHOWN = ("fastcl", RING, "open_clip, local_loss and gather_with_grad", "open_clip, gather_with_grad")
WORLDS = (8, 64, 1024)
SETTINGS = [Setting(samples, world) for world in WORLDS for samples in sorted((65_536, 4_096 * world))]
LOOKS = (("#0072B2", "o", "-"), ("#CC79A7", "P", "--"), ("#D55E00", "s", "--"), ("#E69F00", "^", "--"))
STYLES = dict(zip(SHOWN, LOOKS, strict=True))
MANY = Setting(262_144, 64)
FIGURE = "scaling.svg"


def seconds(name: str, s: Setting, rate: Rates) -> Time:
    """Times of a method on the link of its number of GPUs."""
    link = link_of(s.world)
    return time_of(METHODS[name].cost(s), link.ring if name == RING else link.gathers, rate)


def formulas(_results: Path) -> str:
    """What each method costs a rank."""
    head = ("loss", "averaged gradient", "bytes sent", "bytes held", "operations")
    rows = ((name, m.gradient, *map(_shown, (m.sent, m.held, m.operations))) for name, m in METHODS.items())
    return table(head, rows, left=5)


def _shown(formula: str) -> str:
    return formula.replace(" * ", " ").replace("*", " ")


def numbers(results: Path) -> str:
    """The same in numbers, with times, for several batches and numbers of GPUs."""
    head = ("GPUs", "samples", "a GPU", "loss", "sent, MB", "held, MB", "operations, 10^12", "computing, ms",
            "sending, ms", "seen of it, ms", "together, ms")  # fmt: skip
    rate, rows = rates(results), []
    for s in SETTINGS:
        for name in SHOWN:
            cost, time = METHODS[name].cost(s), seconds(name, s, rate)
            amounts = cost.sent / 1e6, cost.held / 1e6, cost.operations / 1e12, *time, time.total
            rows.append((f"{s.world:,}", f"{s.samples:,}", f"{s.own:,}", name, *map(_number, amounts)))
    return table(head, rows, left=4)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else digits(value)


def hidden(results: Path) -> str:
    """From how many samples a GPU on the gather is hidden, or is less than what it serves."""
    rate = rates(results)
    head = ("link", "GB/s", *(f"hidden, {w:,} GPUs" for w in WORLDS), "shorter than the products it serves")
    rows = []
    for link in (NODE, NETWORK, times.ONE_CARD):
        settings = [Setting(0, world) if link_of(world) is NODE or link is not NODE else None for world in WORLDS]
        found = ["" if s is None else f"{times.least_hidden(s, link, rate):,.0f}" for s in settings]
        rows.append((link.name, f"{link.gathers:g}", *found, f"{times.least_longer(Setting(0, 1), link, rate):,.0f}"))
    return table(head, rows, left=1)


def assumed(results: Path) -> str:
    """The rates behind the times."""
    rate, few = rates(results), Setting(2_048, 1)
    large, small = (sum(times.predicted(results, rows)) for rows in (times.SIZE, 2 * few.samples))
    alone = time_of(METHODS["fastcl"].cost(few), 1, rate).computing
    fast = time_of(METHODS[RING].cost(MANY), NETWORK.gathers, rate)
    return (
        f"D = 512, b = 2. Products: {digits(1e-9 / rate.forward)} TFLOP/s forward (R) and "
        f"{digits(1e-9 / rate.backward)} backward (S), from the predicted {digits(large)} ms of the CLIP loss of "
        f"{times.SIZE // 2:,} samples on one sm_90. Those of {few.samples:,} samples are predicted to take "
        f"{digits(small)} ms, {digits(small / alone)} times as long as these rates say: they hold for large batches. "
        f"Links: a GPU sends {NODE.gathers:g} GB/s if there are up to 8; beyond, {NETWORK.gathers:g} GB/s in a gather, "
        f"and {NETWORK.ring:g} GB/s in a ring, where all that passes between two nodes goes through one network card. "
        f"At {NETWORK.gathers:g} GB/s the ring of {MANY.world} GPUs would send for {digits(fast.sending)} ms with "
        f"{MANY.samples:,} samples, and {digits(fast.seen)} ms of that would be seen."
    )


def draw(results: Path) -> None:
    """Write the figure: against the samples on 64 GPUs, and against the GPUs with 262,144 samples."""
    rate = rates(results)
    measures: dict[str, Callable[[str, Setting], float]] = {
        "sent (MB)": lambda name, s: METHODS[name].cost(s).sent / 1e6,
        "held (MB)": lambda name, s: METHODS[name].cost(s).held / 1e6,
        "computing + exposed sending (ms)": lambda name, s: seconds(name, s, rate).total,
    }
    samples = {s.samples: s for s in (Setting(4_096 * 4**k, 64) for k in range(7))}
    worlds = {s.world: s for s in (Setting(262_144, 8 * 2**k) for k in range(8))}
    panels = []
    for x, settings in (("samples, 64 GPUs", samples), ("GPUs, 262,144 samples", worlds)):
        row = []
        for title, of in measures.items():
            points = {name: {at: of(name, s) for at, s in settings.items()} for name in SHOWN}
            row.append(Panel(x, title, [Line(name, STYLES[name], points[name]) for name in SHOWN]))
        panels.append(row)
    drawn(results / "static" / FIGURE, "CLIP loss on each of several GPUs, D = 512, 2 bytes a number: computed", panels)
