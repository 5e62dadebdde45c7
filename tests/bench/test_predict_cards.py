"""The cards that stand for architectures, the published figures of each, and what is committed about them."""

import json
import re

import pytest
from sass_listing import code

from bench.static.compile import obstacle
from bench.static.predict import calibration, pages, report, run
from bench.static.predict.assumptions import CARDS, MACHINES, TABLE
from bench.static.predict.calls import losses
from bench.static.predict.multiprocessor import Multiprocessor
from bench.static.predict.pipes import decode
from fastcl.kernels.common.launch import ARCHITECTURES, MULTIPROCESSORS

if reason := obstacle():
    pytest.skip(f"bench.static: {reason}", allow_module_level=True)

# TFLOP/s of dense half-precision products with float32 sums, from NVIDIA's data sheets and white papers.
PEAKS = {80: 312, 86: 154.8, 89: 362, 100: 2250, 120: 503.8}


def test_every_architecture_is_modelled():
    assert set(CARDS) == set(MACHINES) == set(ARCHITECTURES)
    assert all(card.machine.multiprocessors == MULTIPROCESSORS[arch] for arch, card in CARDS.items())


@pytest.mark.parametrize("arch", PEAKS)
def test_rates_give_the_peaks_of_the_data_sheets(arch):
    card = MACHINES[arch]
    peak = card.multiprocessors * card.clock * max(card.tensor, card.hmma) * 1e-3
    assert peak == pytest.approx(PEAKS[arch], rel=0.015)
    assert card.roof <= 1.015 * PEAKS[arch]
    assert card.roof_mufu == pytest.approx(card.multiprocessors * card.clock * 16e-3, rel=0.02)


def test_whatever_a_card_does_not_share_with_the_h200_has_a_source():
    assert CARDS[90].table == tuple(row for row in TABLE if row.name not in ("tmem", "tmem_latency"))
    for card in CARDS.values():
        rows = {row.name: row for row in card.table}
        assert all(value.source and rows[value.name].source == value.source for value in card.values)
        assert len({value.name for value in card.values}) == len(card.values)
        for row in (row for row in TABLE if row.name in rows):
            if getattr(card.machine, row.name) != getattr(MACHINES[90], row.name):
                assert rows[row.name].source != row.source or row.name == "fma", (card.name, row.name)
            assert getattr(card.machine, row.name) not in rows[row.name].weak


@pytest.mark.parametrize(("arch", "each"), [(80, 8), (86, 16), (89, 16), (120, 16)])
def test_products_take_as_long_as_the_card_says(arch, each):
    """16 x 8 x 16 multiply-adds: 4,096 operations on each of the four schedulers."""
    lines = [f"HMMA.16816.F32 R{8 * k}, R200, R204, R{8 * k}" for k in range(16)]
    ops = decode(code(*lines)[0].code, MACHINES[arch])
    assert Multiprocessor(ops, 2, 4, MACHINES[arch]).cycles() == pytest.approx(16 * each, rel=0.01)


@pytest.mark.parametrize("arch", CARDS)
def test_the_committed_predictions_are_whole_and_called_predicted(arch):
    rows = run.committed(arch)
    whole = {report.key(row) for row in rows if "kernel" not in row}
    wanted = [one for one in losses(arch) if run.default(arch).search(one.name)]
    assert whole == {
        (x.objective, x.n, x.d, x.precision, x.by_hand, p, "") for x in wanted for p in ("fwd", "bwd", "both")
    }
    assert {row["arch"] for row in rows} == {f"sm_{arch}"} and not any("gpu_ms" in row for row in rows)
    text = (run.RESULTS / f"predicted-sm_{arch}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Predicted times, sm_{arch}, Triton {rows[0]['triton']}\n\nNothing here is measured")
    assert all(row.source in text for row in CARDS[arch].table)


@pytest.mark.parametrize("figure", calibration.FIGURES, ids=lambda one: f"sm_{one.arch} {one.name}")
def test_published_figures_are_within_the_stated_range_of_what_is_committed(figure):
    """The figures of sm_90 are predicted anew by a slow test, those of others only by the command."""
    text = (run.RESULTS / f"predicted-sm_{figure.arch}.md").read_text(encoding="utf-8")
    (line,) = (one for one in text.splitlines() if one.startswith(f"| {figure.name} |"))
    predicted = float(re.split(r" *\| *", line)[-3])
    assert calibration.Comparison(figure, predicted).holds, line


def test_the_tables_of_the_readme_hold_every_whole_loss_once():
    """Powers of two by rows and columns, widths between them by loss."""

    def records(arch: str, name: str, precision: str, n: int, d: int) -> list[dict]:
        case = {"arch": arch, "objective": name, "precision": precision, "n": n, "d": d}
        return [case | {"pass": one, "predicted_ms": d * k} for k, one in enumerate(("fwd", "bwd", "both"), 1)]

    arguments = [("sm_90", "ntxent", "fp16", 4096, 64), ("sm_90", "ntxent", "fp16", 65536, 64)]
    arguments += [("sm_80", "ntxent", "fp32", n, d) for n in (4096, 65536) for d in (64, 128)]
    arguments += [("sm_120", "clip", "fp16", 65536, 192), ("sm_80", "ntxent", "fp16", 65536, 320)]
    found = [one for each in arguments for one in records(*each)]
    assert pages.hopper(found).splitlines()[2:] == [
        "| fp16 | 65,536 | 64 + 128 = 192 |", "| fp16 | 4,096 | 64 + 128 = 192 |"
    ]  # fmt: skip
    assert pages.cards(found).splitlines()[2:] == [
        "| sm_80 | fp32 | 65,536 | 192 | 384 |", "| sm_80 | fp32 | 4,096 | 192 | 384 |"
    ]  # fmt: skip
    assert pages.between(found).splitlines() == [
        "|  | CLIP, fp16, 192 | NT-Xent, fp16, 320 |", "| --- | ---: | ---: |", "| sm_120 | 576 |  |",
        "| sm_80 |  | 960 |",
    ]  # fmt: skip


def test_committed_predictions_are_read_by_architecture(tmp_path):
    (tmp_path / "static").mkdir()
    for arch, kernel in ((120, {}), (80, {}), (90, {"kernel": "x"}), (89, {"by_hand": True})):
        text = json.dumps([{"arch": f"sm_{arch}"} | kernel])
        (tmp_path / "static" / f"predicted-sm_{arch}.json").write_text(text)
    assert [one["arch"] for one in pages.committed(tmp_path)] == ["sm_80", "sm_120"]
