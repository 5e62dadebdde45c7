"""The report: findings, tables, figures and settings of a run in one HTML file that loads nothing else."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from fastcl.errors import FastclError, shown
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_output
from fastcl.io.run_names import FILES, FOLDERS, REPORT
from fastcl.report.coupling import CERTIFICATES, certificates
from fastcl.report.drawing import Plate, svg
from fastcl.report.evaluations import FEW_SHOTS, about, read_evaluations
from fastcl.report.figures import PLATES
from fastcl.report.heat_maps import LAYERS
from fastcl.report.run import IDENTITY, MODEL_MEASURES, PAIR_MEASURES, RESEEDED, Number, Run, known, load_run

# Characters that HTML or UTF-8 cannot represent.
UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run as one self-contained HTML file (figures inline; the same run gives the same bytes).

    Args:
        run_dir: the directory of a run, finished or not: run.json, metrics.jsonl, and pairs.jsonl, timing.jsonl,
            layers.json and evaluation.json if present.
        out: the file to write, atomically; None: ``report.html`` in ``run_dir``.

    Returns:
        The path of the written file.

    Raises:
        FastclError: a file of the run is missing or invalid, or ``out`` cannot be written, is a link or is one of the
            run's other files; ``out`` is checked before anything is drawn.
    """
    run_dir = Path(run_dir)
    out = run_dir / REPORT if out is None else Path(out)
    run = load_run(run_dir)
    check_output(out, "--out", [run_dir / name for name in (*FILES, *FOLDERS)])
    page = _page(run)
    try:
        write_atomic(out, page)
    except FastclError as error:
        raise FastclError(f"--out: {error}") from error
    return out


def number(value: Number) -> str:
    """Four decimals; exactly 0 or 1 without, small and large values in scientific notation, None as a dash."""
    if value is None:
        return "–"
    if not known(value):
        return "not finite"
    if value in (0, 1):
        return f"{value:.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def findings(run: Run) -> list[str]:
    """The results of the last evaluation in plain sentences."""
    if run.last_epoch == 0:
        lines = ["Nothing has been trained yet: at epoch 0 all models have the same initial weights."]
    else:
        lines = _closest(run) + [_floor_line(run, model) for model in run.others if RESEEDED in run.models]
    if IDENTITY in run.models:
        lines.append(f"Identity control {identity_control(run)}.")
    scores = {m: run.model_value(m, "ncc_test") for m in (run.reference, *run.others)}
    scores = {m: score for m, score in scores.items() if known(score)}
    if scores:
        ranked = sorted(scores, key=lambda m: -scores[m])
        lines.append(
            "Test accuracy of the nearest class centre: " + ", ".join(f"{m} {number(scores[m])}" for m in ranked) + "."
        )
    return lines


def _closest(run: Run) -> list[str]:
    """The model closest to the reference by each measure; measures with the same winner share a sentence."""
    winners: dict[str, list[str]] = {}
    for measure, name in PAIR_MEASURES.items():
        values = {m: run.pair_value(run.reference, m, measure) for m in run.others}
        values = {m: value for m, value in values.items() if known(value)}
        if values:
            best = min(values.values()) if measure == "weight_gap" else max(values.values())
            tied = " and ".join(m for m, value in values.items() if value == best)
            winners.setdefault(tied, []).append(f"{name} ({number(best)})")
    return [f"Closest to {run.reference} by {', '.join(by)}: {model}." for model, by in winners.items()]


def _floor_line(run: Run, model: str) -> str:
    inside, outside = [], []
    for measure, name in PAIR_MEASURES.items():
        within = run.inside_floor(model, measure)
        if within is not None:
            value = number(run.pair_value(run.reference, model, measure))
            text = f"{name} ({value}; reseeded twin {number(run.noise_floor(measure))})"
            (inside if within else outside).append(text)
    parts = [
        f"{side} the noise floor by {', '.join(by)}" for side, by in (("inside", inside), ("outside", outside)) if by
    ]
    return f"{model}: {'; '.join(parts) or 'not compared with the noise floor'}."


def identity_control(run: Run) -> str:
    """Whether the identity twin equalled the reference at every evaluation: CKA exactly 1, weight gap exactly 0."""
    series = run.pair_series(run.reference, IDENTITY)
    if not series:
        return "not evaluated"
    for epoch in sorted(series):
        cka, gap = series[epoch]["cka"], series[epoch]["weight_gap"]
        if cka != 1 or gap != 0:
            off = f" (off by {abs(cka - 1):.1e})" if known(cka) and cka != 1 else ""
            return f"BROKEN: at epoch {epoch} CKA is {number(cka)}{off} and the weight gap is {number(gap)}"
    return f"holds: CKA 1 and weight gap 0, exactly, at all {len(series)} evaluations"


class Table(NamedTuple):
    """Cells as text: `head` names the columns, the first cell of a row names the row. `kind` is a CSS class."""

    head: list[str]
    rows: list[list[str]]
    kind: str = "numbers"


def rendered(template: str, package: str, **values: Any) -> bytes:
    """A page in UTF-8. Characters that HTML cannot represent are escaped.

    Args:
        template: name of the template in the package; it may include the report's own files.
        package: the package that has it.
        values: what the template asks for.
    """
    places = ChoiceLoader([PackageLoader(package, "."), PackageLoader("fastcl.report", ".")])
    templates = Environment(
        loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    page = templates.get_template(template).render(**values)
    return UNWRITABLE.sub(lambda letter: shown(letter[0]), page).encode()


def _page(run: Run) -> bytes:
    facts = Table(["fact", "value"], outline(run.facts | {"throughput": _throughput(run)}), "text")
    return rendered(
        "page.html.j2",
        "fastcl.report",
        title=f"fastcl report: {run.data.get('source', shown(run.path.name))}, {run.reference} and its twins",
        warning="" if run.finished else _progress(run),
        guide=_guide(run),
        key_numbers=_key_numbers(run),
        epoch=run.last_epoch,
        findings=findings(run),
        figures=_figures(run),
        pairs=_pair_table(run),
        certificates=_certificate_table(run),
        about_certificates=CERTIFICATES,
        models=_model_table(run),
        evaluation=_evaluation(run),
        facts=facts,
        config=Table(["setting", "value"], outline(run.config), "text"),
    )


def _evaluation(run: Run) -> dict[str, Any] | None:
    """The section on probes; None if none has run."""
    found = {model: record.evaluation for model, record in read_evaluations(run).items()}
    if not found:
        return None
    from fastcl.evaluation.comparison import Split, accuracy_rows, remarks

    splits: dict[str, Split] = {"held-out images": "test", "training images": "train"}
    return {
        "about": about(run),
        "remarks": remarks(found),
        "tables": {name: Table(["probe", *found], accuracy_rows(found, split)) for name, split in splits.items()},
        "figures": _figures(run, (FEW_SHOTS,)),
    }


def _figures(run: Run, wanted: Iterable[Plate] = (*PLATES, LAYERS)) -> list[dict[str, str]]:
    classes = run.data.get("classes")
    chance = f"{1 / classes:.2g}" if isinstance(classes, int) and classes > 0 else "1 / (number of classes)"
    plates = [plate for plate in wanted if plate.shown(run)]  # a broken file is found before any is drawn
    return [
        {
            "title": plate.title,
            "caption": plate.caption.format(reference=run.reference, chance=chance)
            + (plate.band if RESEEDED in run.models else "")
            + plate.note(run),
            "svg": svg(plate, run),
        }
        for plate in plates
    ]


def _progress(run: Run) -> str:
    return (
        f"Unfinished run: the last complete evaluation is after epoch {run.last_epoch} of {run.planned_epochs}. "
        "Everything below covers what had been written by then."
    )


def _guide(run: Run) -> str:
    text = (
        "Several copies of one network were trained side by side from the same initial weights, on the same views of "
        f"the same images in the same order; only the loss differs{' (ce adds a linear head)' * ('ce' in run.models)}. "
        f"Every copy is compared with {run.reference}, the reference: "
        "an alignment of 1 means that both representations are the same up to rotation and scale. "
    )
    if RESEEDED in run.models:
        text += (
            "How close is close? The reseeded twin has the reference's loss and initial weights but saw other random "
            "views. The grey band (the noise floor) spans the range from it to perfect agreement: a model inside the "
            "band is as close to the reference as a rerun of the reference; outside it, the loss made a larger "
            "difference than other views did. The floor is a single rerun, not a confidence interval. "
        )
    else:
        text += "This run has no reseeded twin, so there is no noise floor to tell small differences from chance. "
    if IDENTITY in run.models:
        text += (
            "The identity twin repeats the reference exactly and must coincide with it; if not, the experiment is "
            "broken."
        )
    return text


def _key_numbers(run: Run) -> dict[str, str]:
    rate = run.images_per_second()
    items = {"epochs": f"{run.last_epoch} of {run.planned_epochs}"}
    items |= {f"CKA of {m}": number(run.pair_value(run.reference, m, "cka")) for m in run.others}
    items |= {"noise floor (CKA)": number(run.noise_floor("cka"))} if RESEEDED in run.models else {}
    items |= {"identity control": identity_control(run).split(":")[0]} if IDENTITY in run.models else {}
    items |= {f"test accuracy of {run.reference}": number(run.model_value(run.reference, "ncc_test"))}
    items |= {"images / second": _rate(rate)} if rate is not None else {}
    return items


def _pair_table(run: Run) -> Table:
    ordered = [(run.reference, m) for m in run.models if m != run.reference]
    rest = [m for m in run.models if m != run.reference]
    ordered += [(a, b) for at, a in enumerate(rest) for b in rest[at + 1 :]]
    rows = [[f"{a} – {b}", *(number(run.pair_value(a, b, measure)) for measure in PAIR_MEASURES)] for a, b in ordered]
    head = ["pair", *PAIR_MEASURES.values()]
    if RESEEDED in run.models:
        head.append("inside the noise floor by")
        for row, (a, b) in zip(rows, ordered, strict=True):
            inside = [name for measure, name in PAIR_MEASURES.items() if run.inside_floor(b, measure)]
            control = {IDENTITY: "must be equal", RESEEDED: "is the floor"}.get(b, ", ".join(inside) or "none")
            row.append(control if a == run.reference else "")
    return Table(head, rows)


def _certificate_table(run: Run) -> Table:
    head, rows = certificates(run)
    return Table(head, [[name, *map(number, values)] for name, values in rows.items()])


def _model_table(run: Run) -> Table:
    rows = [[m, *(number(run.model_value(m, measure)) for measure in MODEL_MEASURES)] for m in run.models]
    return Table(["model", *MODEL_MEASURES.values()], rows)


def _throughput(run: Run) -> str:
    rate = run.images_per_second()
    if rate is None:
        return "not recorded"
    seconds = sum(row["seconds"] for row in run.timing if known(row["seconds"]))
    epochs = f"median of {len(run.timing)} epochs; {seconds:,.1f} s in total, all models together"
    return f"{_rate(rate)} images per second ({epochs})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def outline(tree: dict[str, Any], depth: int = 0) -> list[list[str]]:
    """One row per setting, in order; the settings of a section are indented below its name."""
    rows = []
    for name, value in tree.items():
        section = isinstance(value, dict)
        rows.append(["\u2003" * depth + name, "" if section and value else _plain(value)])
        rows += outline(value, depth + 1) if section else []
    return rows


def _plain(value: Any) -> str:
    if value in ([], {}):
        return "none"
    if isinstance(value, list):
        return ", ".join(_plain(one) for one in value)
    if value is None:
        return "–"
    if isinstance(value, float) and len(str(value)) > 8:
        return f"{value:.6g}"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
