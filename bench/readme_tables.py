"""The tables of README and docs, each a function of the results folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.data import report as data_report
from bench.harness import markdown as md
from bench.harness.figures import LOSSES
from bench.harness.records import Record, digits, duration, grouped, table
from bench.losses import report as losses_report
from bench.losses import splits
from bench.lost_ranks import lost_table
from bench.reproduction import report as reproduction
from bench.reproduction import rows
from bench.scaling import report as scaling
from bench.similarity import report as similarity_report
from bench.similarity import two_models
from bench.similarity.inputs import KEYS, Case
from bench.similarity.providers import ALL_THREE
from bench.theory import report as theory
from bench.training import report as training_report
from bench.training import waiting

NOT_MEASURED = "Not measured."
# Measured (n, d) of two models held in memory that are shown.
PAIRS = ((1000, 4096), (10_000, 512), (50_000, 512), (100_000, 512), (10_000, 2048))
OURS = ("fastcl linear", ALL_THREE, "fastcl rbf")
LIBRARIES = (ALL_THREE, "fastcl linear", "X'Y fp32", "authors' formulation", "torch-cka", "ckatorch", "rsatoolbox")


def read(*files: Path) -> list[Record]:
    """All records of the files that exist."""
    return [r for file in files if file.is_file() for r in json.loads(file.read_text(encoding="utf-8"))]


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
    head = ["N", "objective", "D", *names, *bound, "faster than the best other", "MiB, fastcl",
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
    return losses([r for r in records if r["objective"] == "ntxent"])


def _cell(r: Record | None) -> str:
    if r is None:
        return ""
    return digits(duration(r)) if r["wall_ms"] else reason_word(r)


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


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
    at = [r for r in records if r["provider"] in LIBRARIES and (r["section"], r["n"], r["d"]) == ("pair", 10_000, 512)]
    rows = []
    for r in max(grouped(at, "date").values(), key=len):
        time = digits(r["wall_ms"]) if r["wall_ms"] else r["reason"].partition(": ")[2] or r["reason"]
        rows.append([r["provider"], r["computes"], time, _mib(r["peak_bytes"])])
    return table(("n = 10,000, d = 512", "measures", "ms", "MiB"), rows)


def pairs_of_twins(records: Sequence[Record]) -> str:
    """twin_stats compared with the calls it replaces and with the losses alone."""
    names, rows = (two_models.TOGETHER, two_models.APART, two_models.ALONE), []
    whole = [r for r in records if r["section"] == two_models.SECTION and r["pass"] == "both"]
    for (n, precision), chosen in grouped(whole, "n", "precision").items():
        at = {r["provider"]: r for r in chosen}
        rows.append([f"{n:,}", precision, *(_cell(at.get(name)) for name in names)])
    return table(("rows", "precision", *names), rows)


def views(records: Sequence[Record]) -> str:
    """Images per second and core-ms per image by size, and the share of a training step spent waiting."""
    timed = [r for r in records if r["section"] == "views" and r["samples_ms"]]
    sizes = {r["size"]: f"{r['size']} pixels ({r['source']})" for r in timed}
    waits = {r["provider"]: f"{100 * waiting.share_of(r):.1f} %" for r in records
             if r["section"] == waiting.SECTION and not r["reason"]}  # fmt: skip
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
    return training_report.steps_table([r for r in records if r["section"] == "steps"])


def micro_step(records: Sequence[Record]) -> str:
    """Peak memory of a step in parts, of one part alone and of the whole batch."""
    return training_report.memory_table([r for r in records if r["section"] == "memory"])


def training_runs(records: Sequence[Record]) -> str:
    """Alignment and accuracy at the end of the runs, and the effect of the networks' precision."""
    head, rows = ("run", "model", "CKA with dcl", "debiased CKA", "RSA", "nearest centre", "ridge probe"), []
    done = [r for r in records if not r["reason"]]
    for r in (r for r in done if r["section"] == "runs"):
        run = f"temperature {r['temperature']:g}, {r['precision']}, {r['epochs']} epochs"
        rows += [(run, model, *cells) for model, *cells in training_report.models(r)]
    for r in (r for r in done if r["section"] == "precision"):
        run = f"two precisions, {r['epochs']} epochs"
        rows += [(run, f"{models}: {what}", *cells, "", "") for models, what, *cells in training_report.compared(r)]
    return table(head, rows)


def omniglot(results: Path) -> str:
    """Alignment with the reference after the run's last epoch."""
    file = results / "omniglot" / "metrics.jsonl"
    if not file.is_file():
        return NOT_MEASURED
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    last = [r for r in rows if r["epoch"] == rows[-1]["epoch"]]
    accuracy = {r["model"]: r["ncc_test"] for r in last if "model" in r}
    reference = next(iter(accuracy))
    head = (f"with `{reference}` at the end", "CKA", "debiased CKA", "RSA", "weight gap", "nearest centre")
    body = [[f"`{reference}`", "", "", "", "", f"{accuracy[reference]:.3f}"]]
    for r in (r for r in last if r.get("pair", [""])[0] == reference):
        name = r["pair"][1]
        body.append([f"`{name}`", *(f"{r[key]:.4f}" for key in ("cka", "cka_debiased", "rsa", "weight_gap")),
                     f"{accuracy[name]:.3f}"])  # fmt: skip
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
              "training": (training_steps, training_runs)}  # fmt: skip
    text += [make(found[name]) for name, makes in tables.items() if found[name] for make in makes]
    return "\n\n".join(part.strip() for part in text)


def split_products(results: Path) -> str:
    """Error and price of each way to split float32 rows; the same on every machine."""
    records = read(results / "splits.json")
    return splits.report(records) if records else NOT_MEASURED


def theory_covered(results: Path) -> str:
    """Slack of every bound in settings that the theorem covers."""
    records = theory.read(results)
    return theory.covered(records) if records else NOT_MEASURED


def theory_outside(results: Path) -> str:
    """What failed in the others."""
    records = theory.read(results)
    return theory.outside(records) if records else NOT_MEASURED


def _of_cpu(make: Callable[[Sequence[Record]], str], *files: str) -> Callable[[Path], str]:
    def made(results: Path) -> str:
        records = read(*(results / "cpu" / file for file in files))
        return f"{conditions(records)}\n\n{make(records)}" if records else NOT_MEASURED

    return made


def _reproduced(make: Callable[[Path], str], results: Path) -> str:
    folder = reproduction.committed(results)
    return make(folder) if (folder / rows.FILE).is_file() else NOT_MEASURED


TABLES: dict[str, Callable[[Path], str]] = {
    "omniglot": omniglot,
    "losses": _of_cpu(losses, "losses.json"),
    "ntxent": _of_cpu(ntxent, "losses.json"),
    "similarity": _of_cpu(similarity, "similarity.json", "stream/similarity.json"),
    "libraries": _of_cpu(libraries, "similarity.json"),
    "twins": _of_cpu(pairs_of_twins, "stream/similarity.json"),
    "views": _of_cpu(views, "data.json"),
    "micro-step": _of_cpu(micro_step, "training/training.json"),
    "lost-ranks": _of_cpu(lost_table, "lost_ranks.json"),
    "gpu": gpu,
    "splits": split_products,
    "theory": theory_covered,
    "theory-outside": theory_outside,
    "scaling-formulas": scaling.formulas,
    "scaling-assumed": scaling.assumed,
    "scaling-hidden": scaling.hidden,
    "scaling": scaling.numbers,
    **{name: partial(_reproduced, make) for name, make in reproduction.TABLES.items()},
}
