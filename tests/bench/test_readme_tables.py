"""The tables of README and docs are what the results say, and what a table says is what its records hold."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import make_run

from bench import readme, readme_tables
from bench.data import report as data_report
from bench.harness import figures
from bench.harness.clocks import Sample
from bench.harness.records import read, record
from bench.losses import report as losses_report
from bench.losses.providers import FUSED, PROVIDERS
from bench.similarity import report as similarity_report
from bench.similarity.providers import ALL_THREE

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}
H200 = {"device": "NVIDIA H200", "versions": VERSIONS, "date": "2026-11-28T12:00"}


def test_the_pages_are_up_to_date(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in readme.PAGES)
    assert all(f"<!-- table: {name} -->" in text for name in readme_tables.TABLES)


@pytest.mark.parametrize("name, body", (
    ("losses", lambda rows: losses_report.body(rows, losses_report.ours(rows), "losses.svg")),
    ("similarity", lambda rows: similarity_report.body(rows, "similarity.svg", torch.device("cpu"))),
    ("stream/similarity", lambda rows: similarity_report.body(rows, None, torch.device("cpu"))),
    ("data", data_report.body),
))  # fmt: skip
def test_committed_reports_say_what_their_records_do(name, body):
    file = ROOT / "bench" / "results" / "cpu" / name
    made = body(read(file.with_suffix(".json"))).split()
    assert len(made) > 200 and file.with_suffix(".md").read_text(encoding="utf-8").split()[-len(made) :] == made


def test_only_what_is_between_the_marks_changes(monkeypatch, tmp_path, capsys):
    frame = "before\n<!-- table: a -->\n{}\n<!-- end -->\nbetween\n<!-- table: b -->\n{}\n<!-- end -->\nafter\n"
    text, wanted = frame.format("old\n| x |", ""), frame.format("\n| R |\n", "\n\\1\n")
    tables = {"a": lambda results: f"\n| {results.name} |\n", "b": lambda results: r"\1"}
    monkeypatch.setattr(readme, "TABLES", tables)
    assert readme.rendered(text, Path("R"), "P") == wanted == readme.rendered(wanted, Path("R"), "P")
    with pytest.raises(ValueError, match="P has tables that nobody makes: c"):
        readme.rendered(text.replace("table: b", "table: c"), Path("R"), "P")
    for broken in (text.replace("<!-- end -->", "", 1), text + "<!-- end -->", text.replace("<!-- table: b -->", "")):
        with pytest.raises(ValueError, match="P has . marks"):
            readme.rendered(broken, Path("R"), "P")
    (tmp_path / "README.md").write_text(wanted)
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(readme, "PAGES", ("README.md", "page.md"))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", Path("R"))
    drawn = []
    monkeypatch.setattr(readme, "draw", drawn.append)
    assert readme.main(["--check"]) == 1
    assert capsys.readouterr().err == "out of date: page.md; run python -m bench.readme\n"
    assert (tmp_path / "page.md").read_text() == text
    assert not drawn and readme.main([]) == 0 == readme.main(["--check"]) and drawn == [Path("R")]
    assert [(tmp_path / page).read_text() for page in readme.PAGES] == [wanted, wanted]


def test_every_figure_is_drawn_beside_its_records(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "gpu" / "losses").mkdir(parents=True)
    rows = [loss(FUSED, n, 64, 1.0, bound=0.5) for n in (512, 4096)] + [loss("Inf-CL", 512, 64, 9.0)]
    (tmp_path / "gpu" / "losses" / "losses.json").write_text(json.dumps(rows))
    (tmp_path / "losses.json").write_text(json.dumps(rows[:1]))  # one size: nothing to draw
    make_run(tmp_path / "run", epochs=2)
    readme.draw(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.svg")) == [
        "gpu/losses/losses.svg", "run/alignment.svg", "run/drift.svg"
    ]  # fmt: skip
    text = (tmp_path / "gpu" / "losses" / "losses.svg").read_text()
    assert all(word in text for word in ("NT-Xent", "D = 64; NVIDIA H200", "fastcl fp16", "Inf-CL", "bound"))
    text = (tmp_path / "run" / "alignment.svg").read_text()
    assert text.startswith('<svg style="background:#fff" ') and "var(--" not in text and "debiased CKA" in text


def loss(provider, n, d, gpu=None, objective="ntxent", wall=None, peak=2**20, bound=None, reason=None, facts=H200):
    samples = () if reason else (Sample(wall or gpu, gpu),)
    case = {"objective": objective, "n": n, "d": d}
    return record("losses", provider, case, facts, "both", samples, None, peak, bound, reason=reason)


def outcome(records, what, where):
    (found,) = ((f, reached) for w, at, f, reached in losses_report.targets(records) if (w, at) == (what, where))
    return found


def test_targets_of_the_losses_are_reached_or_not():
    at, wide = "N = 65,536, D = 128", "N = 65,536, D = 256"
    records = [
        loss(FUSED, 65536, 128, 5.5), loss("plain PyTorch bf16", 65536, 128, 5.4), loss(FUSED, 65536, 256, 12.0),
        loss("Inf-CL", 65536, 256, 120.0), loss("chunked bf16", 65536, 256, 30.0),
        loss("flex_attention bf16", 65536, 256, 23.0), loss(FUSED, 65536, 128, 6.0, "nscl"),
        loss(FUSED, 65536, 128, 6.1, "supcon"), loss(FUSED, 65536, 128, 2.75, "clip"),
        loss(FUSED, 4096, 128, 0.05, wall=0.2), loss(FUSED, 2**20, 512, 4000.0, peak=9 * 2**30),
    ]  # fmt: skip
    assert outcome(records, "ntxent in 5.5 ms on the device", at) == ("5.5 ms", "yes")
    assert outcome(records, "ntxent in 10.5 ms on the device", wide) == ("12 ms", "no")
    assert outcome(records, "ntxent in 15.5 ms on the device", "N = 65,536, D = 512") == ("not measured", "")
    assert outcome(records, "as fast as the best PyTorch", at) == ("0.982x", "no")
    assert outcome(records, "as fast as the best PyTorch", wide) == ("1.92x", "yes")
    assert outcome(records, "10 times as fast as Inf-CL", wide) == ("10x", "yes")
    assert outcome(records, "2 times as fast as PyTorch in bf16", wide) == ("1.92x", "no")
    assert outcome(records, "nscl in at most 1.1 times ntxent's time", at) == ("1.09x", "yes")
    assert outcome(records, "supcon in at most 1.1 times ntxent's time", at) == ("1.11x", "no")
    assert outcome(records, "clip in at most 0.525 times ntxent's time", at) == ("0.5x", "yes")
    assert outcome(records, "ntxent+supcon in at most 1.1 times ntxent's time", at) == ("not measured", "")
    small, large = "N = 4,096, D = 128", "N = 1,048,576, D = 512"
    assert outcome(records, "ntxent in 0.06 ms on the device", small) == ("0.05 ms", "yes")
    assert outcome(records, "ntxent in 0.15 ms on the wall clock", small) == ("0.2 ms", "no")
    assert outcome(records, "ntxent in 4200 ms on the device", large) == ("4000 ms", "yes")
    assert outcome(records, "ntxent within 8 GiB", large) == ("9 GiB", "no")
    others = [r | {"device": "NVIDIA A100"} for r in records]
    assert {row[2:] for row in losses_report.targets(others)} == {("not measured", "")}
    failed = loss(FUSED, 65536, 128, reason="out of memory: 9 GiB")
    assert outcome([failed], "ntxent in 5.5 ms on the device", at) == ("not measured", "")


def test_the_table_of_losses_compares_with_the_best_other():
    rows = [
        loss(FUSED, 4096, 64, 2.0, bound=0.5, peak=3 * 2**20), loss("fastcl fp32", 4096, 64, 1.0, peak=2**20),
        loss("plain PyTorch", 4096, 64, 8.0, peak=7 * 2**20), loss("chunked bf16", 4096, 64, 5.0, peak=9 * 2**20),
        loss(FUSED, 512, 64, 2.0, bound=0.5), loss("plain PyTorch", 512, 64, reason="skipped: needs 9 GiB, the limit"),
        loss("lightly", 512, 64, reason="lightly is not installed"),
        loss("chunked bf16", 512, 64, reason="skipped: one call takes 9 s, the limit is 1 s"),
    ]  # fmt: skip
    text = readme_tables.losses(rows)
    head, _, small, large = text.splitlines()
    assert head.startswith("| N | objective | D | fastcl fp16 | fastcl fp32 | plain PyTorch | chunked bf16 | of")
    assert small == "| 512 | ntxent | 64 | 2 |  | memory | time | 25 % |  | 1 |  |"
    assert large == "| 4,096 | ntxent | 64 | 2 | 1 | 8 | 5 | 25 % | 2.5x | 3 | 7 |"


@pytest.mark.parametrize(("reason", "word"), [
    ("out of memory: tried to", "memory"), ("skipped: needs 12 GiB, the limit is 1 GiB", "memory"),
    ("its process was killed, most likely for want of memory", "memory"), ("has no clip", ""), (None, ""),
    ("failed: OutOfResources: shared memory, needs 256 KiB", "failed"),
    ("timed on CUDA only", ""), ("kornia is not installed", ""), ("failed: ValueError: odd", "failed"),
    ("over the limit of 10 s by its time on fewer rows", "time"),
    ("skipped: one call takes 9 s, the limit is 1 s", "time"),
])  # fmt: skip
def test_a_reason_is_a_word(reason, word):
    assert readme_tables.reason_word({"reason": reason}) == word


def test_times_of_two_runs_do_not_meet_in_a_row():
    at = "N = 65,536, D = 256"
    later = H200 | {"date": "2026-11-28T13:00"}
    rows = [
        loss(FUSED, 65536, 256, 5.0), loss("plain PyTorch", 65536, 256, 20.0),
        loss(FUSED, 65536, 256, 9.0, facts=later), loss("flex_attention bf16", 65536, 256, 27.0, facts=later),
        loss(FUSED, 65536, 128, reason="out of memory: x"), loss(FUSED, 65536, 128, 3.0, facts=later),
    ]  # fmt: skip
    found = readme_tables.losses(rows).splitlines()[2:]
    assert found == [
        "| 65,536 | ntxent | 128 | 3 |  |  |  | 1 |  |",
        "| 65,536 | ntxent | 256 | 5 | 20 |  | 4x | 1 | 1 |",
        "| 65,536 | ntxent | 256 | 9 |  | 27 | 3x | 1 | 1 |",
    ]
    assert outcome(rows, "ntxent in 10.5 ms on the device", at) == ("5 ms", "yes")
    assert outcome(rows, "2 times as fast as PyTorch in bf16", at) == ("3x", "yes")
    assert outcome(rows, "as fast as the best PyTorch", at) == ("3x", "yes")
    rows += [loss(FUSED, 65536, 128, 3.1, "nscl"), loss(FUSED, 65536, 128, 3.25, "supcon", facts=later)]
    narrow = "N = 65,536, D = 128"
    assert outcome(rows, "nscl in at most 1.1 times ntxent's time", narrow) == ("not measured", "")
    assert outcome(rows, "supcon in at most 1.1 times ntxent's time", narrow) == ("1.08x", "yes")


def test_every_provider_of_ntxent_but_the_specification_has_a_line():
    assert {p.name for p in PROVIDERS if "ntxent" in p.objectives} - set(figures.LOSSES) == {"fastcl dense"}


def test_figures_show_the_time_on_the_device_and_mib(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_draw", lambda file, title, records, lines, memory: drawn.extend((lines, memory)))
    figures.losses([loss(FUSED, n, 64, 1.0, wall=7.0, peak=5, bound=0.5) for n in (512, 4096)], tmp_path)
    lines, memory = drawn
    assert [(line.label, line.points) for line in lines] == [
        (FUSED, {512: 1.0, 4096: 1.0}), ("bound", {512: 0.5, 4096: 0.5})
    ]  # fmt: skip
    assert [line.points for line in memory.lines] == [dict.fromkeys((512, 4096), 5 / 2**20)]
    assert memory.title == "peak memory beyond the inputs (MiB)"


def statistic(provider, n, measures, ms, dense=False, section="pair", bound=None, reason=None):
    case = {"section": section, "n": n, "d": 512, "models": 2, "dtype": "float32", "chunk": None,
            "measures": measures, "computes": ", ".join(measures), "dense": dense}  # fmt: skip
    samples = () if reason else (Sample(ms, None),)
    return record("similarity", provider, case, H200, "fwd", samples, None, 2**20, bound, reason=reason)


def test_the_table_of_similarities_compares_with_what_returns_as_much():
    both, cka = ["CKA", "RSA"], ["CKA"]
    rows = [
        statistic(ALL_THREE, 10_000, both, 4.0, bound=1.0), statistic("fastcl linear", 10_000, cka, 2.0),
        statistic("dense Gram fp32", 10_000, both, 20.0, True),
        statistic("dense Gram fp32 (linear)", 10_000, cka, 9.0, True), statistic("X'Y fp32", 10_000, cka, 1.0),
        statistic(ALL_THREE, 100_000, both, 40.0),
        statistic("dense Gram fp32", 100_000, both, None, True, reason="skipped: needs 83 GiB"),
        statistic(ALL_THREE, 7_000, both, 1.0),
    ]  # fmt: skip
    lines = readme_tables.similarity(rows).splitlines()[2:]
    assert lines == [
        "| n = 10,000, d = 512, float32 | CKA, RSA | 4 | 25 % | 20 | 5x | 1 | 1 |",
        "| n = 10,000, d = 512, float32 | CKA | 2 |  | 9 | 4.5x | 1 | 1 |",
        "| n = 100,000, d = 512, float32 | CKA, RSA | 40 |  | memory |  | 1 |  |",
    ]
    rows.append(statistic("ckatorch", 10_000, cka, None, reason="over the limit of 10 s: one call takes 16 s"))
    other = statistic("ckatorch", 10_000, cka, 8.0) | {"date": "2027"}
    assert readme_tables.libraries([other, *rows]).splitlines()[2:] == [
        f"| {ALL_THREE} | CKA, RSA | 4 | 1 |", "| fastcl linear | CKA | 2 | 1 |",
        "| X'Y fp32 | CKA | 1 | 1 |", "| ckatorch | CKA | one call takes 16 s | 1 |"
    ]  # fmt: skip


def test_a_table_for_a_card_names_what_was_not_measured(tmp_path):
    assert readme_tables.gpu(tmp_path) == "Not measured."
    for name, records in (
        ("losses", [loss(FUSED, 65536, 128, 5.0)]), ("losses-widths", [loss(FUSED, 65536, 256, 11.0)]),
    ):  # fmt: skip
        (tmp_path / "gpu" / name).mkdir(parents=True)
        (tmp_path / "gpu" / name / "losses.json").write_text(json.dumps(records))
    text = readme_tables.gpu(tmp_path)
    assert text.startswith("NVIDIA H200; torch 2.11.0, triton 3.6.0; 2026-11-28")
    assert "| ntxent in 5.5 ms on the device | N = 65,536, D = 128 | 5 ms | yes |" in text
    assert "| ntxent in 10.5 ms on the device | N = 65,536, D = 256 | 11 ms | no |" in text
    assert "| 65,536 | ntxent | 256 | 11 |" in text and "losses.svg" not in text
    assert "| fastcl triton: 1,000,000 images/s, two views of each | 32 pixels, CUDA | not measured |  |" in text
    (tmp_path / "gpu" / "losses" / "losses.svg").write_text("")
    assert "(../bench/results/gpu/losses/losses.svg)" in readme_tables.gpu(tmp_path)


def test_a_machine_without_results_has_not_measured(tmp_path):
    for name, table in readme_tables.TABLES.items():
        if not name.startswith("scaling"):  # computed from predictions
            assert table(tmp_path) == "Not measured.", name
