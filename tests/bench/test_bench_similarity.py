"""The benchmark of the pair statistics measures what it says: values, errors, reasons, targets; never how fast."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastcl
from bench.harness import ceilings, figures
from bench.harness.clocks import Peak
from bench.harness.records import record
from bench.harness.suite import Run
from bench.similarity import report as similarity_report
from bench.similarity import run as similarity
from bench.similarity import two_models as twins
from bench.similarity.inputs import TINY, Case
from bench.similarity.providers import ALL_THREE, DRAWN, PROVIDERS, TOLERANCES, Provider, least

CPU = torch.device("cpu")
BY_NAME = {p.name: p for p in PROVIDERS}
PACKAGES = {"torch-cka": ["torch-cka"], "ckatorch": ["ckatorch", "ckatorch unbiased"], "rsatoolbox": ["rsatoolbox"]}


PEAK_OF = similarity.Similarity.peak


def without(packages):
    modules = {BY_NAME[name].module for names in packages.values() for name in names}
    found = importlib.util.find_spec
    return lambda name, *rest: None if name in modules else found(name, *rest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[list[dict], str]:
    """Records and report of the tiny mode, where no package is installed."""
    folder = tmp_path_factory.mktemp("similarity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", without(PACKAGES))
        # A process of its own for one of them: to start it takes seconds.
        patch.setattr(similarity.Similarity, "peak", lambda self, entry: PEAK_OF(self, entry)
                      if (entry.provider.name, self.case) == (ALL_THREE, TINY[0]) else Peak(2**20, 0.0))  # fmt: skip
        patch.setattr(twins.TwoModels, "peak", lambda *args: Peak(2**20, 0.0))
        assert similarity.main(["--out", str(folder), "--device", "cpu", "--tiny", "--repeats", "2"]) == 0
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    return json.loads((folder / "similarity.json").read_text()), (folder / "similarity.md").read_text()


def test_a_tiny_run_writes_every_provider_of_every_case(finished):
    found, _ = finished
    pairs = [r for r in found if r["section"] != "twins"]
    keys = {(r["section"], r["n"], r["provider"]) for r in pairs}
    assert keys == {(c.section, c.n, p.name) for c in TINY for p in PROVIDERS if p.name != DRAWN or c.chunk}
    assert len(keys) == len(pairs)
    for r in pairs:
        if not r["reason"]:
            assert r["bench"] == "similarity" and len(r["samples_ms"]) == 2 and r["wall_ms"] > 0
            assert r["error"] <= TOLERANCES[r["precision"]] and r["difference"] <= 1e-4
            assert list(r["values"]) == r["measures"] and r["versions"]["fastcl"] == fastcl.__version__
            assert all(len(v) == r["models"] * (r["models"] - 1) // 2 for v in r["values"].values())
        if not r["reason"] and r["provider"] == ALL_THREE:
            # Both kernels take X'Y, X'X and Y'Y (10 products for four models).
            work = 2 * 2 * r["n"] * r["d"] ** 2 * {2: 3, 4: 10}[r["models"]]
            assert r["tflops"] == pytest.approx(work / r["wall_ms"] * 1e-9)
    timed = [r for r in found if r["section"] == "twins"]
    keys = {(name, which) for name in twins.PROVIDERS for which in ("fwd", "bwd", "both")}
    assert {(r["provider"], r["pass"]) for r in timed} == keys


def test_the_report_names_conditions_labels_absent_packages_and_targets(finished):
    found, text = finished
    for fact in (found[0]["device"], torch.__version__, "Tiny sizes", "median", "## Four models, all pairs"):
        assert fact in text
    assert all(f"{name} is not installed: {', '.join(names)}" in text for name, names in PACKAGES.items())
    assert "timed on CUDA only: dense Gram tf32, " in text
    section = text.split("### n = 60, d = 8, float32\n")[1].split("###")[0]
    assert "| fastcl linear | CKA, debiased CKA |" in section
    assert "| X'Y fp64 | CKA |" in section
    assert "| authors' formulation | CKA, RSA (CKA of at most 10,000 rows) |" in section
    assert DRAWN not in section and f"| {DRAWN} | nothing |" in text
    assert text.count("| not measured |  |") == 3 and "on an H200" in text
    assert "### n = 32, d = 8" in text and "| twin_stats | fp32 |" in text


def changed(monkeypatch, name: str, **fields) -> None:
    providers = [replace(p, **fields) if p.name == name else p for p in PROVIDERS]
    monkeypatch.setattr(similarity.Similarity, "table", tuple(providers))


def small(tmp_path, *more: str) -> list[str]:
    names = (ALL_THREE, "fastcl linear", "dense Gram fp32")
    fixed = ["--out", str(tmp_path), "--device", "cpu", "--sections", "pair", "--repeats", "1"]
    return [*fixed, "--providers", *names, *more]


@pytest.fixture
def no_memory(monkeypatch):
    """Without processes of their own and a large product; a call takes as many milliseconds as it has rows."""
    monkeypatch.setattr(ceilings, "of_host", lambda tiny: ceilings.Ceilings(1e12, 1e12, 1e12))
    monkeypatch.setattr(similarity.Similarity, "peak", lambda self, entry: Peak(7, 1e-3 * self.case.n))


@pytest.mark.parametrize(("value", "reason", "ours"), [
    (0.001, "off by 0.001", True), (torch.nan, "off by nan", True), (None, "no rows", True), (None, "no rows", False),
])  # fmt: skip
def test_a_provider_that_fails_or_is_wrong_is_named_and_the_others_are_timed(
    no_memory, tmp_path, monkeypatch, capsys, value, reason, ours
):
    def broken(features):
        if value is None:
            raise NotImplementedError("no rows\nof that kind")
        found = BY_NAME["dense Gram fp32"].measure(features)
        return found | {"RSA": [v + value for v in found["RSA"]]}

    changed(monkeypatch, "dense Gram fp32", measure=broken, ours=ours)
    assert similarity.main(small(tmp_path, "--sizes", "16x4", "20x4")) == ours
    found = json.loads((tmp_path / "similarity.json").read_text())
    reasons = {(r["n"], r["provider"]): r["reason"] for r in found if r["reason"]}
    assert list(reasons) == [(16, "dense Gram fp32"), (20, "dense Gram fp32")]
    assert all(text.startswith("failed: ") and reason in text for text in reasons.values())
    assert len(found) == 6 and all(r["wall_ms"] for r in found if not r["reason"])
    assert ("error: pair, n = 16, d = 4, float32: dense Gram fp32: " in capsys.readouterr().err) == ours
    assert (
        f"| dense Gram fp32 | CKA, debiased CKA, RSA | {reasons[16, 'dense Gram fp32']} |"
        in (tmp_path / "similarity.md").read_text()
    )


def test_what_does_not_fit_is_over_the_limit_and_not_extrapolated(no_memory, tmp_path):
    # 0.2 s beyond what no size makes longer, for 2.5 times the products at 1000 rows; 500 are the first of their width.
    arguments = small(tmp_path, "--sizes", "400x4", "1000x4", "500x5", "--seconds", "0.45")
    assert similarity.main(arguments) == 0
    found = {(r["n"], r["provider"]): r for r in json.loads((tmp_path / "similarity.json").read_text())}
    assert found[400, ALL_THREE]["reason"] is None
    assert found[1000, ALL_THREE]["reason"] == "over the limit of 0.45 s by its time on fewer rows"
    assert found[1000, ALL_THREE]["peak_bytes"] is None and found[500, ALL_THREE]["peak_bytes"] == 7
    assert found[500, ALL_THREE]["reason"] == "over the limit of 0.45 s: one call takes 0.5 s"
    assert similarity.main(small(tmp_path, "--sizes", "400x4", "--memory", "0.001")) == 0
    found = {r["provider"]: r["reason"] for r in json.loads((tmp_path / "similarity.json").read_text())}
    # 1.1 matrices and twice the features of both models.
    assert found["dense Gram fp32"] == "skipped: needs 0.00134 GiB, the limit is 0.001 GiB"


def made(provider: Provider, case: Case, wall: float, peak: int, device: str = "a CPU") -> dict:
    keys = ("section", "n", "d", "models", "dtype", "chunk")
    full = {key: getattr(case, key) for key in keys} | {
        "measures": list(provider.measures), "computes": provider.label, "dense": provider.dense, "error": 0.0,
        "difference": 0.0, "device": device, "date": "2026",
    }  # fmt: skip
    return record("similarity", provider.name, full, {}, "fwd", peak_bytes=peak, bound_ms=1.0) | {
        "wall_ms": wall,
        "samples_ms": [wall],
    }


@pytest.mark.parametrize(("wall", "peak", "device", "ms", "expected"), [
    (4.0, 40, "NVIDIA H200", 59.0, ["| 5x | yes |", "| 4 % | yes |", "| 59 ms | yes |"]),
    (5.0, 60, "NVIDIA H200", 61.0, ["| 4x | no |", "| 6 % | no |", "| 61 ms | no |"]),
    (4.0, 40, "NVIDIA H100", 59.0, ["| 5x | yes |", "| 4 % | yes |", "| not measured |  |"]),
])  # fmt: skip
def test_targets_compare_with_the_fastest_dense_form_that_has_the_same_measures(wall, peak, device, ms, expected):
    case, card = similarity_report.DENSE_TARGET, similarity_report.CARD_TARGET
    found = [made(BY_NAME[name], case, *rest) for name, *rest in (
        (ALL_THREE, wall, peak), ("dense Gram fp32", 20.0, 1000), ("dense Gram fp64", 30.0, 100),
        ("dense Gram fp32 (linear)", 10.0, 500), ("fastcl linear", 2.0, 10), ("X'Y fp32", 1.0, 5))]  # fmt: skip
    text = similarity_report.body([*found, made(BY_NAME[ALL_THREE], card, ms, 1, device)], None, CPU)
    lines = text.split("## Targets")[1].splitlines()[4:7]
    assert all(line.endswith(end) for line, end in zip(lines, expected, strict=True))
    # CKA alone is compared with the Gram form that has no RSA.
    assert "| fastcl linear | CKA, debiased CKA | 2 (2-2) | 0.0 | 0.0e+00 | 0.0e+00 |  | 50 % | 5x |" in text
    assert "| X'Y fp32 | CKA | 1 (1-1) | 0.0 | 0.0e+00 | 0.0e+00 |  | 100 % | 10x |" in text


def test_the_bound_is_the_slowest_of_products_exponentials_and_memory():
    case = Case("pair", 100, 10)
    # X'Y takes 2 n d d, half of X'X and of Y'Y n d d each; half of a Gram matrix n n d, and n n / 2 exponentials.
    inner, gaussian, size = 4 * 100 * 10**2, 2 * 100**2 * 10, 2 * 100 * 10 * 4
    even = ceilings.Ceilings(1e3, 1e12, 1e12)
    assert least(case, {"linear"}, even) == pytest.approx((inner, inner))
    assert least(case, {"linear", "cosine"}, even) == pytest.approx((2 * inner, 2 * inner))
    assert least(case, {"linear", "cosine", "rbf"}, even) == pytest.approx((gaussian, gaussian))
    assert least(case, {"rbf"}, ceilings.Ceilings(1e12, 1e12, 1e3))[1] == pytest.approx(100**2)
    assert least(case, {"cosine"}, ceilings.Ceilings(1e12, 1e3, 1e12))[1] == pytest.approx(size)
    halves = replace(case, dtype="bfloat16", models=4)
    assert least(halves, {"linear"}, ceilings.Ceilings(1e12, 1e3, 1e12))[1] == pytest.approx(size)
    assert least(replace(case, models=4), {"cosine"}, even)[0] == 6 * 2 * 100 * 10**2 + 4 * 100 * 10**2
    # Few samples: Gram matrices take less, once for all kernels.
    assert least(Case("pair", 5, 10), {"linear", "cosine"}, even)[0] == 2 * 5**2 * 10
    assert least(case, set(), even) == (0, None)


def test_the_figure_shows_the_width_with_most_sizes(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [made(BY_NAME[name], Case("pair", n, d), 1.0 * n, 1000 * n)
            for name in (ALL_THREE, "dense Gram fp32", "fastcl cosine")
            for n, d in ((100, 8), (1000, 8), (100, 4))]  # fmt: skip
    assert figures.similarity(rows, tmp_path) == "similarity.svg"
    text = (tmp_path / "similarity.svg").read_text()
    assert "d = 8; a CPU" in text and "time (ms)" in text and "fastcl PairAccumulator: CKA, debiased CKA, RSA" in text
    assert "fastcl cosine" not in text
    assert figures.similarity(rows[:1], tmp_path) is None
    assert set(figures.SIMILARITY) <= set(BY_NAME)


def test_a_twin_that_disagrees_is_named_and_the_others_are_timed(monkeypatch):
    def wrong(batch):
        loss, rsa = twins._together(batch)
        return loss, rsa + 0.01

    monkeypatch.setitem(twins.PROVIDERS, twins.TOGETHER, wrong)
    monkeypatch.setattr(twins.TwoModels, "peak", lambda *args: Peak(7, 0.0))
    args = SimpleNamespace(tiny=True, repeats=1, seconds=60, memory=1, device=CPU)
    run = Run("similarity", args, {}, str)
    for case in twins.cases(args):
        twins.TwoModels(run, case).measure()
    assert (
        len(run.failed) == 1 and run.failed[0].startswith("twins, n=32, d=8: twin_stats: ") and "RSA" in run.failed[0]
    )
    (reason,) = (r["reason"] for r in run.found if r["provider"] == twins.TOGETHER)
    assert reason.startswith("failed: ") and "RSA" in reason
    assert {r["provider"] for r in run.found if not r["reason"]} == {twins.APART, twins.ALONE}
