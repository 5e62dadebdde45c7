"""The tables of README and docs, each a function of the results folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.data import report as data_report
from bench.data import waiting
from bench.harness import markdown as md
from bench.harness.figures import LOSSES
from bench.harness.records import Record, digits, duration, grouped, having, read, table
from bench.losses import host, splits
from bench.losses import report as losses_report
from bench.lost_ranks import lost_table
from bench.reproduction import report as reproduction
from bench.reproduction import rows
from bench.scaling import report as scaling
from bench.similarity import report as similarity_report
from bench.similarity import two_models
from bench.similarity.inputs import KEYS, Case
from bench.similarity.providers import ALL_THREE
from bench.static.predict import pages
from bench.theory import report as theory
from bench.training import report as training_report
from fastcl.report.run import PAIR_MEASURES, load_run

NOT_MEASURED = "Not measured."
# Measured (n, d) of two models held in memory that are shown.
PAIRS = ((1000, 4096), (10_000, 512), (50_000, 512), (100_000, 512), (10_000, 2048))
OURS = ("fastcl linear", ALL_THREE, "fastcl rbf")
LIBRARIES = (ALL_THREE, "fastcl linear", "X'Y fp32", "authors' formulation", "torch-cka", "ckatorch", "rsatoolbox")


def conditions(records: Sequence[Record]) -> str:
    """Device, versions and date of a run in one line."""
    first = records[0]
    versions = (f"{name} {first['versions'][name]}" for name in ("torch", "triton") if name in first["versions"])
    return f"{first['device']}; {', '.join(versions)}; {first['date'][:10]}."


def reason_word(r: Record) -> str:
    """Why a time is missing, in one word: "time", "memory" or "failed"; empty if it could not be timed at all."""
    reason = r["reason"]
    if reason is None or md.never(reason):
        return ""
    if not reason.startswith("failed"):
        if "needs" in reason or "memory" in reason:
            return "memory"
        if "limit" in reason:
            return "time"
    return "failed"


def losses(records: Sequence[Record]) -> str:
    """ms of every timed provider; one row per objective, width, number of rows and run."""
    both = [r for r in records if r["pass"] == "both" or r["reason"]]
    ours, order = losses_report.ours(records), list(dict.fromkeys(r["objective"] for r in both))
    names = [name for name in LOSSES if any(r["provider"] == name and r["wall_ms"] for r in both)]
    bound = ["of the bound"] if any(r["bound_ms"] for r in both) else []
    head = ["N", "objective", "D", *names, *bound, "best other, times fastcl", "MiB, fastcl",
            "MiB, least of the others"]  # fmt: skip
    rows = []
    groups = grouped(both, "objective", "d", "n", "date")  # a date identifies a run, whose times are comparable
    for key in sorted(groups, key=lambda key: (order.index(key[0]), *key[1:])):
        at = {r["provider"]: r for r in groups[key]}
        mine, others = at.get(ours), [r for name, r in at.items() if name in names and not name.startswith("fastcl")]
        if mine is None or not mine["wall_ms"]:
            continue
        best = min((duration(r) for r in others if r["wall_ms"]), default=None)
        small = min((r["peak_bytes"] for r in others if r["wall_ms"] and r["peak_bytes"] is not None), default=None)
        rows.append([
            f"{key[2]:,}", key[0], f"{key[1]:,}", *(_cell(at.get(name)) for name in names),
            *(_share(losses_report.share(mine)) for _ in bound), md.times(best / duration(mine) if best else None),
            _mib(mine["peak_bytes"]), _mib(small),
        ])  # fmt: skip
    return table(head, rows)


def ntxent(records: Sequence[Record]) -> str:
    """The table of `losses` for NT-Xent only."""
    return losses(having(records, objective="ntxent"))


def _cell(r: Record | None) -> str:
    if r is None:
        return ""
    return digits(duration(r)) if r["wall_ms"] else reason_word(r)


_share, _mib = partial(md.percent, form=".0f"), partial(md.mib, form=",.0f")


def similarity(records: Sequence[Record]) -> str:
    """fastcl and the fastest dense Gram form with the same measures, for the cases shown."""
    head = ("what", "measures", "ms", "of the bound", "best dense Gram form", "faster by", "MiB, fastcl", "MiB, dense")
    rows = []
    pairs = (r for r in records if r["section"] != two_models.SECTION)
    for (*fields, _), at in grouped(pairs, *KEYS, "date").items():
        case = Case(*fields)
        if case.section == "pair" and not ((case.n, case.d) in PAIRS and any(r["dense"] for r in at)):
            continue
        names = OURS if case.section == "pair" else (ALL_THREE,)
        for mine in (r for r in at if r["provider"] in names and r["wall_ms"]):
            rival = similarity_report.best_dense(at, mine)
            as_much = (r for r in at if r["dense"] and set(mine["measures"]) <= set(r["measures"]))
            dense = digits(rival["wall_ms"]) if rival else next(filter(None, map(reason_word, as_much)), "")
            rows.append([
                str(case), mine["computes"], digits(mine["wall_ms"]), _share(similarity_report.share(mine)), dense,
                md.times(rival["wall_ms"] / mine["wall_ms"] if rival else None), _mib(mine["peak_bytes"]),
                _mib(rival["peak_bytes"] if rival else None),
            ])  # fmt: skip
    return table(head, rows)


def libraries(records: Sequence[Record]) -> str:
    """Other ways to compute a measure at n = 10,000, d = 512, from the run that has most of them."""
    at = [r for r in having(records, section="pair", n=10_000, d=512) if r["provider"] in LIBRARIES]
    rows = []
    for r in max(grouped(at, "date").values(), key=len):
        time = digits(r["wall_ms"]) if r["wall_ms"] else r["reason"].partition(": ")[2] or r["reason"]
        rows.append([r["provider"], r["computes"], time, _mib(r["peak_bytes"])])
    return table(("n = 10,000, d = 512", "measures", "ms", "MiB"), rows)


def pairs_of_twins(records: Sequence[Record]) -> str:
    """twin_stats compared with the calls it replaces and with the losses alone."""
    names, rows = (two_models.TOGETHER, two_models.APART, two_models.ALONE), []
    whole = having(records, **{"section": two_models.SECTION, "pass": "both"})
    for (n, precision), chosen in grouped(whole, "n", "precision").items():
        at = {r["provider"]: r for r in chosen}
        rows.append([f"{n:,}", precision, *(_cell(at.get(name)) for name in names)])
    return table(("rows", "precision", *names), rows)


def views(records: Sequence[Record]) -> str:
    """Images per second and core-ms per image by size, and the share of a training step spent waiting."""
    timed = [r for r in having(records, section="views") if r["samples_ms"]]
    sizes = {r["size"]: f"{r['size']} pixels ({r['source']})" for r in timed}
    waits = {r["provider"]: f"{100 * waiting.share_of(r):.1f} %"
             for r in having(records, section=waiting.SECTION, reason=None)}  # fmt: skip
    rows = []
    for (name,), chosen in grouped(timed, "provider").items():
        at = {r["size"]: r for r in chosen}
        rows.append([name, *(_rate(at.get(size)) for size in sizes), waits.get(name, "")])
    return table(("images/s / core-ms an image", *sizes.values(), "a step of training waits"), rows, left=1)


def _rate(r: Record | None) -> str:
    if r is None:
        return ""
    cores = sorted(ms / r["images"] for ms in r["cores_ms"])
    return f"{data_report.rate(r):,.0f}" + (f" / {digits(cores[len(cores) // 2])}" if cores else "")


def training_steps(records: Sequence[Record]) -> str:
    """The parts of a training step."""
    return training_report.steps_table(having(records, section="steps"))


def micro_step(records: Sequence[Record]) -> str:
    """Peak memory of a step in parts, of one part alone and of the whole batch."""
    return training_report.memory_table(having(records, section="memory"))


def training_speed(records: Sequence[Record]) -> str:
    """Images/s of whole steps beside other loops."""
    return training_report.speed_tables(having(records, section="speed"))


def training_runs(records: Sequence[Record]) -> str:
    """Alignment and accuracy at the end of the runs, and the effect of the networks' precision."""
    head, rows = ("run", "model", "CKA with dcl", "debiased CKA", "RSA", "nearest centre", "ridge probe"), []
    for r in having(records, section="runs", reason=None):
        run = f"temperature {r['temperature']:g}, {r['precision']}, {r['epochs']} epochs"
        rows += [(run, model, *cells) for model, *cells in training_report.models(r)]
    for r in having(records, section="precision", reason=None):
        run = f"two precisions, {r['epochs']} epochs"
        rows += [(run, f"{models}: {what}", *cells, "", "") for models, what, *cells in training_report.compared(r)]
    return table(head, rows)


def omniglot(results: Path) -> str:
    """Alignment with the reference after the run's last epoch."""
    if not (results / "omniglot").is_dir():
        return NOT_MEASURED
    run = load_run(results / "omniglot", with_steps=False)
    head = (f"with `{run.reference}` at the end", *PAIR_MEASURES.values(), "nearest centre")
    body = []
    for name in run.models:
        pair = (run.pair_value(run.reference, name, key) for key in PAIR_MEASURES)
        cells = ("" if value is None else f"{value:.4f}" for value in pair)
        body.append([f"`{name}`", *cells, f"{run.model_value(name, 'ncc_test'):.3f}"])
    return table(head, body, left=1)


def gpu(results: Path) -> str:
    """Everything that bench.gpu measured, or "Not measured."."""
    folder = results / "gpu"
    found = {name: read(*sorted(folder.glob(f"{name}*/{name}.json")))
             for name in ("losses", "similarity", "data", "training")}  # fmt: skip
    first = next(filter(None, found.values()), None)
    if first is None:
        return NOT_MEASURED
    reports = {"losses": losses_report, "similarity": similarity_report, "data": data_report,
               "training": training_report}  # fmt: skip
    text = [conditions(first), md.target_table(row for name, of in reports.items() for row in of.targets(found[name]))]
    if (folder / "losses" / "losses.svg").is_file():
        text.append("![NT-Xent on the GPU: time and memory](../bench/results/gpu/losses/losses.svg)")
    tables = {"losses": (losses,), "similarity": (similarity, libraries), "data": (views,),
              "training": (training_steps, training_speed, training_runs)}  # fmt: skip
    text += [make(found[name]) for name, makes in tables.items() if found[name] for make in makes]
    return "\n\n".join(part.strip() for part in text)


def _of(find: Callable[[Path], Any], make: Callable[[Any], str]) -> Callable[[Path], str]:
    """The table of what is found in the results, if anything is."""

    def made(results: Path) -> str:
        found = find(results)
        return make(found) if found else NOT_MEASURED

    return made


def _of_cpu(make: Callable[[Sequence[Record]], str], *files: str) -> Callable[[Path], str]:
    """The table of some records, below the conditions of their run."""
    return _of(
        lambda results: read(*(results / "cpu" / file for file in files)),
        lambda records: f"{conditions(records)}\n\n{make(records)}",
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "omniglot": omniglot,
    "losses": _of_cpu(losses, "losses.json"),
    "ntxent": _of_cpu(ntxent, "losses.json"),
    "similarity": _of_cpu(similarity, "similarity.json", "stream/similarity.json"),
    "libraries": _of_cpu(libraries, "similarity.json"),
    "twins": _of_cpu(pairs_of_twins, "stream/similarity.json"),
    "views": _of_cpu(views, "data.json"),
    "micro-step": _of_cpu(micro_step, "training/training.json"),
    "training-speed": _of_cpu(training_speed, "training/training.json"),
    "lost-ranks": _of_cpu(lost_table, "lost_ranks.json"),
    "gpu": gpu,
    "host": _of_cpu(host.report, "host.json"),
    "splits": _of(lambda results: read(results / "splits.json"), splits.report),
    **{name: _of(pages.committed, make) for name, make in pages.TABLES.items()},
    "theory": _of(theory.read, theory.covered),
    "theory-outside": _of(theory.read, theory.outside),
    "scaling-formulas": scaling.formulas,
    "scaling-assumed": scaling.assumed,
    "scaling-hidden": scaling.hidden,
    "scaling": scaling.numbers,
    "reproduction-conditions": _of(reproduction.about, reproduction.conditions),
    **{name: _of(rows.committed, make) for name, make in reproduction.TABLES.items()},
}
