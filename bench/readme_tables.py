"""The tables of README and docs, each a function of the results folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.data import report as data_report
from bench.harness.figures import LOSSES
from bench.harness.markdown import target_table
from bench.harness.records import Record, digits, duration, table
from bench.losses import targets as loss_targets
from bench.similarity import report as similarity_report
from bench.similarity import two_models
from bench.similarity.inputs import KEYS, Case
from bench.similarity.providers import ALL_THREE
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
    if reason is None or reason.startswith(("has no ", "timed on ")) or reason.endswith(" is not installed"):
        return ""
    if reason.startswith("failed"):
        return "failed"
    if "needs" in reason or "memory" in reason:
        return "memory"
    return "time" if "limit" in reason else "failed"


def losses(records: Sequence[Record]) -> str:
    """ms of every timed provider; one row per objective, width, number of rows and run."""
    both = [r for r in records if r["pass"] == "both" or r["reason"]]
    ours = loss_targets.ours(records)
    names = [name for name in LOSSES if any(r["provider"] == name and r["wall_ms"] for r in both)]
    bound = any(r["bound_ms"] for r in both)
    head = ["N", "objective", "D", *names, *(["of the bound"] if bound else []), "faster than the best other",
            "MiB, fastcl", "MiB, least of the others"]  # fmt: skip
    rows = []
    for key in sorted({_row_key(r) for r in both}, key=_in_order(both)):
        at = {r["provider"]: r for r in both if _row_key(r) == key}
        mine = at.get(ours)
        others = [r for name, r in at.items() if name in names and not name.startswith("fastcl") and r["wall_ms"]]
        if mine is None or not mine["wall_ms"]:
            continue
        best = min(map(duration, others), default=None)
        small = min((r["peak_bytes"] for r in others if r["peak_bytes"] is not None), default=None)
        share = [f"{100 * mine['bound_ms'] / duration(mine):.0f} %" if mine["bound_ms"] else ""] if bound else []
        objective, d, n, _ = key
        rows.append([
            f"{n:,}", objective, f"{d:,}", *(_cell(at.get(name)) for name in names), *share,
            "" if best is None else f"{digits(best / duration(mine))}x", _mib(mine["peak_bytes"]), _mib(small),
        ])  # fmt: skip
    return table(head, rows)


def ntxent(records: Sequence[Record]) -> str:
    """The table of `losses` for NT-Xent only."""
    return losses([r for r in records if r["objective"] == "ntxent"])


def _row_key(r: Record) -> tuple[str, int, int, str]:
    return r["objective"], r["d"], r["n"], r["date"]  # a date identifies a run, whose times are comparable


def _in_order(records: Sequence[Record]) -> Callable[[tuple[str, int, int, str]], tuple[int, int, int, str]]:
    objectives = list(dict.fromkeys(r["objective"] for r in records))
    return lambda key: (objectives.index(key[0]), *key[1:])


def _cell(r: Record | None) -> str:
    if r is None:
        return ""
    return digits(duration(r)) if r["wall_ms"] else reason_word(r)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def similarity(records: Sequence[Record]) -> str:
    """fastcl and the fastest dense Gram form with the same measures, for the cases shown."""
    head = ("what", "measures", "ms", "of the bound", "best dense Gram form", "faster by", "MiB, fastcl", "MiB, dense")
    rows = []
    keys = (*KEYS, "date")
    for case in dict.fromkeys(tuple(r[key] for key in keys) for r in records if r["section"] != "twins"):
        at = [r for r in records if tuple(r.get(key) for key in keys) == case]
        compared = (at[0]["n"], at[0]["d"]) in PAIRS and any(r["dense"] for r in at)
        if at[0]["section"] == "pair" and not compared:
            continue
        names = OURS if at[0]["section"] == "pair" else (ALL_THREE,)
        for mine in (r for r in at if r["provider"] in names and r["wall_ms"]):
            rival = similarity_report.best_dense(at, mine)
            dense = digits(rival["wall_ms"]) if rival else _dense_reason(at, mine)
            ratio = f"{digits(rival['wall_ms'] / mine['wall_ms'])}x" if rival else ""
            share = "" if mine["bound_ms"] is None else f"{100 * mine['bound_ms'] / mine['wall_ms']:.0f} %"
            memory = [_mib(r["peak_bytes"]) if r else "" for r in (mine, rival)]
            what = str(Case(*case[:-1])), mine["computes"]
            rows.append([*what, digits(mine["wall_ms"]), share, dense, ratio, *memory])
    return table(head, rows)


def _dense_reason(records: Sequence[Record], mine: Record) -> str:
    found = [r for r in records if r["dense"] and set(mine["measures"]) <= set(r["measures"])]
    return next((word for r in found if (word := reason_word(r))), "")


def libraries(records: Sequence[Record]) -> str:
    """Other ways to compute a measure at n = 10,000, d = 512, from the run that has most of them."""
    at = [
        r for r in records
        if r["section"] == "pair" and (r["n"], r["d"]) == (10_000, 512) and r["provider"] in LIBRARIES
    ]  # fmt: skip
    runs = [r["date"] for r in at]
    chosen = (r for r in at if r["date"] == max(runs, key=runs.count))
    rows = [[r["provider"], r["computes"], _cell_with_reason(r), _mib(r["peak_bytes"])] for r in chosen]
    return table(("n = 10,000, d = 512", "measures", "ms", "MiB"), rows)


def _cell_with_reason(r: Record) -> str:
    return digits(r["wall_ms"]) if r["wall_ms"] else r["reason"].partition(": ")[2] or r["reason"]


def pairs_of_twins(records: Sequence[Record]) -> str:
    """twin_stats compared with the calls it replaces and with the losses alone."""
    names = (two_models.TOGETHER, two_models.APART, two_models.ALONE)
    whole = (r for r in records if r["section"] == "twins" and r["pass"] == "both")
    both = {(r["n"], r["precision"], r["provider"]): r for r in whole}
    rows = [
        [f"{n:,}", precision, *(_cell(both.get((n, precision, name))) for name in names)]
        for n, precision in dict.fromkeys(key[:2] for key in both)
    ]
    return table(("rows", "precision", *names), rows)


def views(records: Sequence[Record]) -> str:
    """Images per second and core-ms per image by size, and the share of a training step spent waiting."""
    timed = [r for r in records if r["section"] == "views" and r["samples_ms"]]
    sizes = list(dict.fromkeys(r["size"] for r in timed))
    names = {r["size"]: f"{r['size']} pixels ({r['source']})" for r in timed}
    at = {(r["provider"], r["size"]): r for r in timed}
    waits = {r["provider"]: f"{100 * waiting.share_of(r):.1f} %" for r in records
             if r["section"] == waiting.SECTION and not r["reason"]}  # fmt: skip
    rows = [
        [name, *(_rate(at.get((name, size))) for size in sizes), waits.get(name, "")]
        for name in dict.fromkeys(r["provider"] for r in timed)
    ]
    return table(("images/s / core-ms an image", *names.values(), "a step of training waits"), rows, left=1)


def _rate(r: Record | None) -> str:
    if r is None:
        return ""
    cores = [ms / r["images"] for ms in r["cores_ms"]]
    return f"{data_report.rate(r):,.0f}" + (f" / {digits(sorted(cores)[len(cores) // 2])}" if cores else "")


def training_steps(records: Sequence[Record]) -> str:
    """The parts of a training step."""
    return training_report.steps_table([r for r in records if r["section"] == "steps"])


def training_runs(records: Sequence[Record]) -> str:
    """Alignment and accuracy at the end of the runs, and the effect of the networks' precision."""
    head = ("run", "model", "CKA with dcl", "debiased CKA", "RSA", "nearest centre", "ridge probe")
    rows = []
    for r in (r for r in records if r["section"] == "runs" and not r["reason"]):
        run = f"temperature {r['temperature']:g}, {r['precision']}, {r['epochs']} epochs"
        rows += [(run, model, *cells) for model, *cells in training_report.models(r)]
    for r in (r for r in records if r["section"] == "precision" and not r["reason"]):
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
    found = {name: read(folder / name / f"{name}.json") for name in ("data", "training")}
    all_losses, found["similarity"] = (
        read(*sorted(folder.glob(f"{name}*/{name}.json"))) for name in ("losses", "similarity")
    )
    first = next((records for records in (all_losses, *found.values()) if records), None)
    if first is None:
        return NOT_MEASURED
    checked = [*loss_targets.targets(all_losses), *similarity_report.targets(found["similarity"]),
               *data_report.targets(found["data"]), *training_report.targets(found["training"])]  # fmt: skip
    text = [conditions(first), target_table(checked)]
    if (folder / "losses" / "losses.svg").is_file():
        text.append("![NT-Xent on the GPU: time and memory](../bench/results/gpu/losses/losses.svg)")
    tables = ((losses, all_losses), (similarity, found["similarity"]),
              (libraries, found["similarity"]), (views, found["data"]),
              (training_steps, found["training"]), (training_runs, found["training"]))  # fmt: skip
    text += [make(records) for make, records in tables if records]
    return "\n\n".join(part.strip() for part in text)


def _of_cpu(make: Callable[[Sequence[Record]], str], *files: str) -> Callable[[Path], str]:
    def made(results: Path) -> str:
        records = read(*(results / "cpu" / file for file in files))
        return f"{conditions(records)}\n\n{make(records)}" if records else NOT_MEASURED

    return made


TABLES: dict[str, Callable[[Path], str]] = {
    "omniglot": omniglot,
    "losses": _of_cpu(losses, "losses.json"),
    "ntxent": _of_cpu(ntxent, "losses.json"),
    "similarity": _of_cpu(similarity, "similarity.json", "stream/similarity.json"),
    "libraries": _of_cpu(libraries, "similarity.json"),
    "twins": _of_cpu(pairs_of_twins, "stream/similarity.json"),
    "views": _of_cpu(views, "data.json"),
    "gpu": gpu,
}
