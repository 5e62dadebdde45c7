"""Predictions as a gate: bounds, records, what counts as slower, the committed files, the command."""

import json
from dataclasses import replace

import pytest
import triton
from static_gate import gate

from bench.static.compile import obstacle
from bench.static.predict import calls, report, run
from bench.static.predict.assumptions import CARDS, MACHINES, OPTIMISTIC, TABLE
from bench.static.predict.calibration import FIGURES, Comparison
from bench.static.predict.calls import Loss
from bench.static.predict.launches import Prediction
from bench.static.predict.losses import Predicted, Step, bound
from bench.static.predict.work import Work

if reason := obstacle():
    pytest.skip(f"bench.static: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command refuses to predict interpreted kernels; nothing is compiled in this process."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


HOPPER = MACHINES[90]
LOSS = Loss("ntxent", 65536, 128, "fp16")


@pytest.mark.parametrize(
    ("loss", "forward", "both"),
    [
        (LOSS, 0.696, 3.48), (replace(LOSS, d=64), 0.551, 1.94), (replace(LOSS, d=512), 2.78, 11.13),
        (replace(LOSS, precision="fp32"), 2.09, 10.44), (Loss("clip", 131072, 128, "fp16"), 1.39, 6.96),
        (Loss("clip", 131072, 512, "fp16"), 5.57, 22.27),
    ],
)  # fmt: skip
def test_bounds_are_operations_at_the_roof(loss, forward, both):
    found = bound(loss, HOPPER)
    assert found["fwd"] == pytest.approx(forward, rel=2e-3) and found["both"] == pytest.approx(both, rel=2e-3)
    assert found["both"] == found["fwd"] + found["bwd"]


def predicted(ms: float, loss: Loss = LOSS) -> Predicted:
    """A loss whose backward kernel takes so long, twice."""

    def step(run: str, name: str) -> Step:
        return Step(run, name, (1,), name, Work(), 0)

    one = Prediction(0.5, {"tensor": 600.0, "l2": 2.0}, 1000.0, 2, 1.0)
    launches = [(step("fwd", "forward_kernel"), 1, one), (step("bwd", "backward_kernel"), 2, replace(one, ms=ms))]
    return Predicted(loss, launches, (0.25, 0.125), bound(loss, HOPPER))


def test_a_record_is_what_is_compared_later():
    rows = report.records([predicted(2.0)], 90, "3.8.0")
    assert len(rows) == 5 and len({report.key(row) for row in rows}) == 5
    assert all(row["bench"] == "predict" and row["arch"] == "sm_90" and "gpu_ms" not in row for row in rows)
    times = {row["pass"]: row["predicted_ms"] for row in rows if "kernel" not in row}
    assert times == {"fwd": 0.75, "bwd": 4.125, "both": 4.875}
    (kernel,) = (row for row in rows if row.get("kernel") == "backward_kernel")
    assert (kernel["predicted_ms"], kernel["launches"], kernel["programs_per_sm"]) == (4, 2, 2)
    assert kernel["binding"] == "tensor" and kernel["busy"] == {"tensor": 0.6}


def test_slower_than_committed_beyond_the_tolerance_is_named():
    before = report.records([predicted(2.0)], 90, "3.8.0")
    assert not report.slower(report.records([predicted(2.05)], 90, "3.8.0"), before)
    assert not report.slower(report.records([predicted(1.0)], 90, "3.8.0"), before)
    kernel, whole, both = report.slower(report.records([predicted(2.2)], 90, "3.8.0"), before)[::-1]
    assert "bwd backward_kernel: predicted 4.4 ms, committed 4 ms (+10.0%)" in kernel
    assert "both in all" in whole + both and "bwd in all" in whole + both
    assert not report.slower(report.records([predicted(2.2)], 90, "3.9.0"), before)  # another compiler
    assert not report.slower(report.records([predicted(2.2, Loss("clip", 8, 8, "fp16"))], 90, "3.8.0"), before)


class _Model:
    """Stands for the compiler and the model."""

    ms = 2.0
    triton = "3.8.0"

    def __init__(self, *_):
        pass

    def record(self, losses):
        return list(losses)

    def predict(self, losses, machine):
        return [predicted(self.ms, loss) for loss in losses]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Model", _Model)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(
        run, "compare", lambda *_: [Comparison(figure, figure.published[1] * 1.1) for figure in FIGURES]
    )
    return monkeypatch


def test_the_command_fails_until_slower_predictions_are_accepted(stub, tmp_path, capsys):
    assert run.main(["--only", "d=128"]) == 0  # nothing is committed yet
    assert run.main(["--accept"]) == 0
    first = (tmp_path / "predicted-sm_90.json").read_text()
    assert (
        len(json.loads(first)) == 5 * 96 and "Nothing here is measured" in (tmp_path / "predicted-sm_90.md").read_text()
    )
    stub.setattr(_Model, "ms", 2.2)
    assert run.main(["--only", "ntxent.*d=128", "--json", str(tmp_path / "new.json")]) == 1
    assert "error: ntxent fp16 n=65536 d=128 bwd backward_kernel: predicted 4.4 ms" in capsys.readouterr().err
    assert (tmp_path / "predicted-sm_90.json").read_text() == first
    assert len(json.loads((tmp_path / "new.json").read_text())) == 5 * 6
    assert run.main(["--only", "ntxent.*d=128", "--accept"]) == 0
    merged = json.loads((tmp_path / "predicted-sm_90.json").read_text())
    assert len(merged) == 5 * 96 and sum(row["predicted_ms"] == 4.4 for row in merged) == 6
    assert run.main(["--only", "ntxent.*d=128"]) == 0
    stub.setattr(run, "compare", lambda *_: [Comparison(FIGURES[0], 2000.0)])
    assert run.main(["--only", "ntxent.*d=128"]) == 1 and "out of range" in capsys.readouterr().err


def test_the_sensitivity_changes_each_weak_assumption(stub, capsys):
    assert run.main(["--only", "ntxent.*d=128", "--sensitivity"]) == 0
    found = capsys.readouterr().out.partition("## If an assumption is wrong")[2]
    rows = [line for line in found.splitlines() if line.startswith("| ")][3:]
    assert len(rows) == sum(len(row.weak) for row in TABLE) and all("+0% | 0 of 66 |" in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], "invalid choice: 'sm_75'"),
        (["--only", "["], "is no regular expression"),
        (["--only", "nothing"], "no loss has 'nothing' in its name, such as 'ntxent fp16 n=4,096 d=64'"),
        (["--workers", "0"], "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_predicted_is_said(arguments, message, capsys):
    try:
        status = run.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_losses_that_change_places_are_counted():
    base = [predicted(2.0), predicted(4.0), predicted(8.0)]
    text = report.sensitivity(base, {"l2 28 bytes": [predicted(6.0), predicted(4.0), predicted(9.0)]})
    assert text.splitlines()[-1] == "| l2 28 bytes | +164% | +0% | +12% | 1 of 3 |"


def test_a_comparison_holds_within_the_range_stated():
    low, high = OPTIMISTIC
    figure = replace(FIGURES[0], published=(100, 120))
    for predicted_rate, holds in ((99, False), (100, True), (120 * high, True), (120 * high + 1, False)):
        assert Comparison(figure, predicted_rate).holds == holds
    assert low == 1 and high < 1.5


def test_the_committed_predictions_are_whole_and_called_predicted():
    rows = run.committed(90)
    whole = {report.key(row) for row in rows if "kernel" not in row}
    passes = ("fwd", "bwd", "both")
    expected = {(x.objective, x.n, x.d, x.precision, x.by_hand, p, "") for x in calls.losses() for p in passes}
    assert whole == expected and len({report.key(row) for row in rows}) == len(rows)
    # The bound is that of a card under load, whose clock falls; the model knows only the clock without load.
    card = MACHINES[90]
    unthrottled = card.roof * 1e12 / (card.multiprocessors * card.clock * 1e9 * card.tensor)
    assert all(row["predicted_ms"] >= unthrottled * row["bound_ms"] for row in rows if "kernel" not in row)
    slower = [row for row in rows if "kernel" not in row and not row.get("by_hand")]
    assert all(row["predicted_ms"] >= row["bound_ms"] for row in slower)
    times = {report.key(row): row["predicted_ms"] for row in rows}
    for d, most in ((128, 4.2), (256, 8)):
        by_hand, plain = (times["ntxent", 65536, d, "fp16", on, "both", ""] for on in (True, False))
        assert by_hand < min(most, plain)
    text = (run.RESULTS / "predicted-sm_90.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Predicted times, sm_90, Triton {rows[0]['triton']}\n\nNothing here is measured")
    assert all(row.source in text for row in CARDS[90].table) and "## If an assumption is wrong" in text


# Losses whose launches the static gate compiles anyway, and the published figures.
@pytest.mark.slow
def test_no_kernel_is_predicted_to_be_slower_than_committed(tmp_path):
    if triton.__version__ != (was := run.committed(90)[0]["triton"]):
        pytest.skip(f"predictions are committed for Triton {was}; this is {triton.__version__}")
    done = gate("--predict", "--only", r"^ntxent fp(16|32) n=4,096 d=(64|128|256)$", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 0, done.stderr
    assert all(figure.name in done.stdout for figure in FIGURES if figure.arch == 90)
    rows = json.loads((tmp_path / "x.json").read_text())
    committed = {report.key(row) for row in run.committed(90)}
    assert len(rows) > 6 * 8 and {report.key(row) for row in rows} <= committed
