"""The HTML report: read back from synthetic run directories whose every number is known."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest
from small_runs import (
    SIX,
    SVG,
    XHTML,
    change_lines,
    lines,
    make_run,
    model_line,
    page_of,
    pair_line,
    tables_of,
    text_of,
)

from fastcl.errors import FastclError
from fastcl.report import drawing, figures, write_report
from fastcl.report.html import findings, identity_control, number
from fastcl.report.run import load_run


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("six"))


@pytest.fixture(scope="module")
def six_source(six: Path) -> str:
    return write_report(six).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def six_page(six_source: str) -> ElementTree.Element:
    return ElementTree.fromstring(six_source)


def test_page_is_well_formed_and_loads_nothing(six_source: str) -> None:
    page = ElementTree.fromstring(six_source)
    assert 'class="warning"' not in six_source
    assert len(list(page.iter(f"{SVG}svg"))) == len(figures.PLATES) == 8
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 100
    targets = re.findall(r'(?:url\(|href=")([^)"]*)', six_source)
    assert len(targets) > 50 and {target[1:] for target in targets} <= set(ids)
    assert not any(
        element.tag.split("}")[-1] in ("script", "link", "img", "iframe", "object") for element in page.iter()
    )
    assert not re.search(r"\ssrc=|@import", six_source)
    assert re.search(r"https?:|//", re.sub(r'xmlns(:\w+)?="[^"]*"', "", six_source)) is None


def test_tables_hold_the_last_numbers_with_the_reference_first(six_page: ElementTree.Element) -> None:
    pairs, per_model, facts, config = tables_of(six_page)
    names = [f"dcl – {model}" for model in SIX[1:]]
    assert list(pairs)[: len(names) + 1] == ["pair", *names] and len(pairs) == 1 + 15
    # exp(-.024), its powers 1.1 and 2, and 1.2 (1 - exp(-.096)); the reseeded twin: exp(-.03) ...
    assert pairs["dcl – nscl"] == ["0.9763", "0.9739", "0.9531", "0.1098", "CKA, debiased CKA, weight gap"]
    assert pairs["dcl – reseeded"] == ["0.9704", "0.9675", "0.9618", "0.1357", "is the floor"]
    assert pairs["dcl – identity"] == ["1", "1", "1", "0", "must be equal"]
    assert pairs["dcl – ce"][-1] == "none" and pairs["supcon – ce"][-1] == ""
    assert list(per_model) == ["model", *SIX]
    head = ["training loss", "DCL loss", "NSCL loss", "loss gap", "same-class mass", "NCC train", "NCC test"]
    assert per_model["model"] == [*head, "CDNV", "directional CDNV"]
    last = model_line(3, "ce")
    assert per_model["ce"] == [f"{value:.4f}" for name, value in last.items() if name not in ("epoch", "model")]
    assert facts["seed"] == ["17"] and facts["classes"] == ["10"] and facts["torch"] == ["2.11.0"]
    assert facts["throughput"] == ["1,002 images per second (median of 3 epochs; 6.0 s in total, all models together)"]
    assert config["batch_size"] == ["256"] and config["deterministic"] == ["yes"] and config["scale"] == ["0.5, 1.0"]


def test_findings_follow_from_the_numbers(six: Path) -> None:
    assert findings(load_run(six)) == [
        "Closest to dcl by CKA (0.9763), debiased CKA (0.9739), RSA (0.9531), weight gap (0.1098): nscl.",
        "nscl: inside the noise floor by CKA (0.9763; reseeded twin 0.9704), debiased CKA (0.9739; reseeded twin "
        "0.9675), weight gap (0.1098; reseeded twin 0.1357); outside the noise floor by RSA (0.9531; reseeded twin "
        "0.9618).",
        "supcon: outside the noise floor by CKA (0.8353; reseeded twin 0.9704), debiased CKA (0.8204; reseeded twin "
        "0.9675), RSA (0.7914; reseeded twin 0.9618), weight gap (0.6159; reseeded twin 0.1357).",
        "ce: outside the noise floor by CKA (0.5488; reseeded twin 0.9704), debiased CKA (0.5169; reseeded twin "
        "0.9675), RSA (0.4584; reseeded twin 0.9618), weight gap (1.0911; reseeded twin 0.1357).",
        "Identity control holds: CKA 1 and weight gap 0, exactly, at all 4 evaluations.",
        "Test accuracy of the nearest class centre: ce 0.8752, supcon 0.8670, nscl 0.8636, dcl 0.8631.",
    ]


def test_measures_may_disagree_on_the_closest_model(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change_lines(run, lambda row: row | {"weight_gap": 0.01} if row.get("pair") == ["dcl", "ce"] else row)
    closest = findings(load_run(run))[:2]
    assert closest[0].endswith("RSA (0.9531): nscl.") and closest[1] == "Closest to dcl by weight gap (0.0100): ce."


@pytest.mark.parametrize(("broken", "said"), [
    ({"cka": 1 - 2**-53}, "BROKEN: at epoch 2 CKA is 1.0000 (off by 1.1e-16) and the weight gap is 0"),
    ({"weight_gap": 3e-9}, "BROKEN: at epoch 2 CKA is 1 and the weight gap is 3.00e-09"),
    ({"cka": None}, "BROKEN: at epoch 2 CKA is – and the weight gap is 0"),
])  # fmt: skip
def test_a_broken_identity_control_is_called_broken(tmp_path: Path, broken, said) -> None:
    run = make_run(tmp_path)
    change_lines(run, lambda r: r | broken if r.get("pair") == ["dcl", "identity"] and r["epoch"] == 2 else r)
    assert identity_control(load_run(run)) == said


def test_the_page_warns_of_a_broken_identity_control_in_an_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["dcl", "nscl", "identity"], planned=12)
    change_lines(run, lambda r: r | {"weight_gap": 0.5} if r.get("pair") == ["dcl", "identity"] else r)
    page = page_of(run)
    warnings = [text_of(element) for element in page.iter() if element.get("class") == "warning"]
    assert len(warnings) == 2
    assert warnings[0].startswith("Unfinished run: the last complete evaluation is after epoch 3 of 12.")
    assert warnings[1] == "Identity control BROKEN: at epoch 0 CKA is 1 and the weight gap is 0.5000."
    assert {"BROKEN", "3 of 12"} <= {text_of(value) for value in page.iter(f"{XHTML}dd")}


def test_a_run_without_controls_claims_no_floor(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["dcl", "nscl"], timed=False)
    page = page_of(run)
    said = text_of(page)
    assert "This run has no reseeded twin" in said
    assert "band" not in said and "identity" not in said.lower() and "noise floor:" not in said
    assert not figures.alignment(load_run(run)).axes[0].collections[0].get_paths()
    pairs, _, facts, _ = tables_of(page)
    assert list(pairs) == ["pair", "dcl – nscl"] and len(pairs["dcl – nscl"]) == 4
    assert facts["throughput"] == ["not recorded"]


def test_only_the_initial_weights(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, ["dcl", "nscl"], epochs=0, planned=3))
    assert "Nothing has been trained yet" in text_of(page) and "Closest to" not in text_of(page)
    assert tables_of(page)[1]["dcl"][:5] == ["–"] * 5
    assert sum(text_of(text) == "no values" for text in page.iter(f"{SVG}text")) == 2 + 4 + 1


def test_a_cut_last_line_is_left_out_and_its_epoch_not_taken_for_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-20])
    record = load_run(run)
    assert record.epochs == [0, 1, 2, 3] and record.last_epoch == 2 and not record.finished
    assert record.pair_value("nscl", "dcl", "cka") == pair_line(2, "dcl", "nscl")["cka"]
    assert 3 in record.per_model["identity"] and 3 not in record.per_model["reseeded"]
    (run / "metrics.jsonl").write_text(text[:-1])  # the line is whole, only its newline is missing
    assert load_run(run).last_epoch == 3
    (run / "metrics.jsonl").write_text(text[:40] + "\n" + text)
    with pytest.raises(FastclError, match=r"metrics\.jsonl, line 1: not valid JSON"):
        load_run(run)


def test_of_two_records_of_one_epoch_the_later_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines([pair_line(3, "dcl", "nscl") | {"pair": ["nscl", "dcl"], "cka": 0.25}]))
    assert load_run(run).pair_value("dcl", "nscl", "cka") == 0.25


def test_values_that_are_not_numbers_show_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["dcl", "nscl"])
    change_lines(run, lambda r: r | {"loss": math.nan, "cdnv": None, "cdnv_directional": 0.0} if "model" in r else r)
    page = page_of(run)
    row = tables_of(page)[1]["nscl"]
    assert sum(text_of(text) == "no values" for text in page.iter(f"{SVG}text")) == 2 + 2
    assert row[0] == "not finite" and row[-2:] == ["–", "0"]


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path)
    (run / file).unlink()
    with pytest.raises(FastclError, match=re.escape(str(run / file))):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(("head", "message"), [
    ({"config": {}}, "config.train.epochs must be an integer, got None"),
    ({"config": {"train": {"epochs": "3"}}}, "config.train.epochs must be an integer, got '3'"),
    ({"reference": "simclr"}, "'reference' 'simclr' is not one of"),
    ({"reference": "identity"}, "'reference' 'identity' is not one of"),
    ({"models": ["dcl", "dcl"]}, "'models' must be distinct"),
    ({"models": ["dcl", "a\nb"]}, "'models' must be distinct printable names"),
    ({"data": None}, "'data' must be dict, got None"),
])  # fmt: skip
def test_a_broken_header_is_named(tmp_path: Path, head, message: str) -> None:
    run = make_run(tmp_path)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | head))
    with pytest.raises(FastclError, match=r"run\.json: " + re.escape(message)):
        write_report(run)


@pytest.mark.parametrize(("line", "message"), [
    ("[1, 2]", "must be a JSON object, got list"),
    ('{"model": "dcl"}', "'epoch' must be an integer, got None"),
    ('{"epoch": 1, "model": "moco"}', "['moco'] does not name 1 of the models"),
    ('{"epoch": 1, "pair": ["dcl", "moco"]}', "['dcl', 'moco'] does not name 2 of the models"),
    ('{"epoch": 1, "pair": [["dcl"], "ce"]}', "[['dcl'], 'ce'] does not name 2 of the models"),
    ('{"epoch": 1, "pair": ["ce", "ce"]}', "the pair ['ce', 'ce'] is one model twice"),
    ('{"epoch": 1, "pair": ["dcl", "ce"], "cka": "0.9"}', "'cka' must be a number or null, got '0.9'"),
])  # fmt: skip
def test_a_broken_record_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text(lines([pair_line(0, "dcl", "ce")]) + line + "\n")
    with pytest.raises(FastclError, match=r"metrics\.jsonl, line 2: " + re.escape(message)):
        write_report(run)


def test_a_run_without_evaluations_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(FastclError, match=r"metrics\.jsonl: no evaluation"):
        write_report(run)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    nasty = '<script>alert("1")</script> & \' id="x url(#y)'
    models = ["dcl", nasty, "_hidden", "$\\alpha$", "{reference}", "reseeded"]
    source = {"source": nasty, "classes": 10, "names": [nasty, "nul \0 and half \ud800"]}
    page = page_of(make_run(tmp_path, models, data=source, device=nasty, versions={nasty: nasty}))
    assert not list(page.iter(f"{XHTML}script")) and not list(page.iter(f"{SVG}script"))
    shown = {text_of(text) for text in page.iter(f"{SVG}text")}
    assert set(models[1:-1]) <= shown
    pairs, per_model, facts, _ = tables_of(page)
    assert f"dcl – {nasty}" in pairs and nasty in per_model
    assert facts["device"] == [nasty] and facts["source"] == [nasty]
    assert facts["names"] == [f"{nasty}, nul \\x00 and half \\ud800"]


@pytest.mark.parametrize("nasty", ("</title></style><script>alert(1)</script>", "{{ title }}{% raw %}{# x #}", "&amp;"))
def test_hostile_names_stay_text_wherever_the_page_has_them(tmp_path: Path, nasty: str) -> None:
    """The reference, named in captions and sentences; the source, which is in the title; keys of settings."""
    models = [nasty, "nscl", "identity", "reseeded"]
    run = make_run(tmp_path, models, data={"source": nasty, "classes": 10}, reference=nasty, versions={nasty: nasty})
    source = write_report(run).read_text(encoding="utf-8")
    page = ElementTree.fromstring(source)
    names = {element.tag.split("}")[-1] for element in page.iter()}
    assert "script" not in names and "alert(1)</script>" not in source
    titles = [text_of(element) for name in ("title", "h1") for element in page.iter(f"{XHTML}{name}")]
    assert titles == [f"fastcl report: {nasty}, {nasty} and its twins"] * 2
    pairs, per_model, facts, _ = tables_of(page)
    assert f"{nasty} – nscl" in pairs and nasty in per_model and facts["source"] == [nasty]
    assert facts[nasty] == [nasty] == facts["reference"]
    assert f"Closest to {nasty} by" in text_of(page)
    assert any(nasty in text_of(caption) for caption in page.iter(f"{XHTML}figcaption"))


def test_the_same_run_gives_the_same_bytes_whatever_matplotlib_is_set_to(six: Path, tmp_path: Path) -> None:
    first = write_report(six, tmp_path / "new" / "first.html").read_bytes()
    with matplotlib.rc_context(
        {"axes.facecolor": "red", "svg.fonttype": "path", "lines.linewidth": 9, "font.size": 20}
    ):
        before = dict(matplotlib.rcParams)
        assert write_report(six, tmp_path / "second.html").read_bytes() == first
        assert dict(matplotlib.rcParams) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "second.html"]


def test_pyplot_is_left_alone(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would raise
    assert "matplotlib.pyplot" not in {getattr(value, "__name__", "") for value in vars(figures).values()}
    assert drawing.svg(figures.PLATES[0], load_run(six)).startswith("<svg")


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", ["dcl"])
    out = tmp_path / "report.html"
    out.write_text("old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(FastclError, match=r"^--out: .*report\.html cannot be written \(No space left"):
        write_report(run, out)
    with pytest.raises(FastclError, match="^--out: .* cannot be written"):
        write_report(run, out / "below-a-file.html")
    assert out.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


@pytest.mark.parametrize(("value", "shown"), [
    (None, "–"), (0, "0"), (1.0, "1"), (0.99999999, "1.0000"), (-0.25, "-0.2500"), (0.00123, "0.0012"),
    (0.000987, "9.87e-04"), (-1e-9, "-1.00e-09"), (123456.0, "1.23e+05"), (math.inf, "not finite"),
])  # fmt: skip
def test_number(value, shown: str) -> None:
    assert number(value) == shown
