"""Ways to split float32 rows for tensor cores: what is computed is the loss, and the kernels' way is the cheapest."""

from pathlib import Path

import pytest
import torch

from bench.harness.records import read
from bench.losses import plain, splits

RECORDS = read(Path(__file__).resolve().parents[2] / "bench" / "results" / "splits.json")
SMALL = splits.Case(64, 32, plain.TEMPERATURE, 0.1)


def test_without_rounding_it_is_the_gradient_of_ntxent():
    rows = torch.nn.functional.normalize(splits.unit_rows(SMALL)).requires_grad_()
    want = plain.ntxent(rows, torch.arange(32))
    want.backward()
    loss, gradient = splits.ntxent(rows.detach(), SMALL.temperature, None)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, rows.grad, rtol=1e-10, atol=1e-15)


def test_more_parts_are_closer():
    rows = splits.unit_rows(SMALL)
    exact = rows @ rows.T
    error = {name: (splits.multiply(rows, rows.T, way) - exact).norm().item() for name, way in splits.WAYS.items()}
    assert error["fp16, one product"] > error["fp16, remainder of one side"] > error["fp16, remainders in fp8"]
    assert error["fp16, remainders in fp8"] > error["bf16, three products"] > error["fp16, three products"] > 0
    assert error["fp16, three products"] > error["bf16, six products"] > 0
    assert error["tf32, one product"] == pytest.approx(error["fp16, one product"], rel=0.05)  # 11 bits both


def test_the_kernels_way_is_the_cheapest_within_the_stated_error():
    worst = {way: max(r["gradient_error"] for r in RECORDS if r["way"] == way) for way in splits.WAYS}
    fit = [way for way in splits.WAYS if worst[way] <= splits.ALLOWED]
    assert min(fit, key=lambda way: splits.WAYS[way].cost) == splits.KERNELS
    assert {(r["n"], r["d"], r["temperature"], r["noise"]) for r in RECORDS} == set(splits.CASES)


def test_the_committed_errors_are_found_again():
    case = splits.CASES[4]
    (kept,) = (r for r in RECORDS if r["way"] == splits.KERNELS and all(r[k] == v for k, v in case._asdict().items()))
    found = splits.errors(case, splits.WAYS[splits.KERNELS])
    assert found == pytest.approx((kept["loss_error"], kept["gradient_error"]), rel=0.05)
