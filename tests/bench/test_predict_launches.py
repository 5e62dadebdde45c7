"""Predicted launches: the work of each program, programs over multiprocessors, whole losses without a GPU."""

import math

import pytest
import torch

from bench.static.predict import calls, schedule, work
from bench.static.predict.calls import Loss, record
from fastcl.kernels.contrastive.wide import Pairs


def launches(loss: Loss, kernel: str) -> list:
    call = record(loss, 90)
    return [one for one in call.forward + call.backward if one.kernel.__name__ == kernel]


def tiles(loss: Loss, kernel: str) -> tuple[dict[str, float], float]:
    """Tiles by kind and operations of all launches of a kernel."""
    total: dict[str, float] = {}
    flops = 0.0
    for launch in launches(loss, kernel):
        found = work.of_launch(launch, loss.classes)
        if found.skipped:
            continue
        count, each = found.uniform or (1, None)
        for k, kind in enumerate(found.tiles):
            number = count * (each[k] if each else sum(program[k] for program in found.programs))
            total[kind.kind] = total.get(kind.kind, 0) + number
            flops += number * kind.flops
    return total, flops


def test_class_ranges_are_those_of_the_kernels():
    n, classes = 1024, 10
    labels = [k * classes // n for k in range(n)]
    for start in range(0, n, 64):
        lo, hi = work.class_range(start, n, classes, 128)
        mine = labels[start // 128 * 128 : start // 128 * 128 + 128]
        same = [k for k in range(n) if labels[k] in mine]
        assert (lo, hi) == (same[0] // 128 * 128, math.ceil((same[-1] + 1) / 128) * 128)


@pytest.mark.parametrize("objective", ["ntxent", "clip"])
def test_the_work_of_plain_losses_is_what_the_readme_of_the_kernels_says(objective):
    loss = Loss(objective, 4096, 128, "fp16")
    pairs = loss.rows**2
    forward, flops = tiles(loss, "forward_kernel")
    near = 128 * loss.rows  # pairs in blocks on the diagonal
    share = 0.5 if objective == "ntxent" else 1
    assert flops == 2 * 128 * (share * (pairs - near) + near)
    assert forward["masked"] == near / 128 / 64
    backward = tiles(loss, "backward_kernel")[1]
    assert backward == 4 * 128 * pairs * (1 if objective == "ntxent" else 2)


def test_classes_split_precision_and_wide_rows_are_counted():
    n = 4096
    plain, supcon = Loss("nscl", n, 128, "fp16"), Loss("supcon", n, 128, "fp16")
    assert tiles(supcon, "backward_kernel")[1] > tiles(plain, "backward_kernel")[1] * 1.15
    assert tiles(plain, "backward_kernel")[1] == 4 * 128 * n * n
    assert tiles(Loss("ntxent", n, 128, "fp32"), "backward_kernel")[1] == 3 * 4 * 128 * n * n
    wide = Loss("ntxent", n, 512, "fp16")
    assert tiles(wide, "pair_weights_kernel")[1] == 2 * 512 * n * n
    assert tiles(wide, "product_kernel")[1] == 2 * 512 * n * n  # one block of pairs: no symmetry yet
    assert tiles(Loss("ntxent", n, 512, "fp32"), "product_kernel")[1] == 3 * 2 * 512 * n * n


def test_programs_of_masked_tiles_alone_take_four_at_a_time():
    loss = Loss("ntxent", 8192, 128, "fp16")
    plain, masked = launches(loss, "backward_kernel")
    counts = [work.of_launch(one, loss.classes) for one in (plain, masked)]
    assert [one.kind for one in counts[1].tiles] == ["masked"] and plain.grid[1] == masked.grid[1] > 1
    assert sorted({row[0] for row in counts[1].programs}) == [0, 128 // masked.arguments["TILE"].BLOCK_S.value]
    assert 0 not in {row[0] for row in counts[0].programs}


def test_recording_a_large_loss_touches_no_memory():
    call = record(Loss("supcon", 65536, 1024, "fp32"), 90)
    assert [one.kernel.__name__ for one in call.forward][:3] == ["layout_kernel", "prepare_kernel", "forward_kernel"]
    assert call.backward[-1].kernel.__name__ == "finalize_kernel" and call.torch == (10, 1)
    finalize = call.backward[-1]
    assert work.memory(finalize) >= 2 * 4 * 65536 * 1024
    assert len(set(calls.losses())) == len(list(calls.losses())) == 96 and len(list(calls.losses(80))) == 88


def test_memory_counts_each_tensor_once():
    x = torch.empty(1024, dtype=torch.float16)
    launch = type("Launch", (), {"arguments": {"a": x, "b": (x, (x, torch.empty(8))), "n": 3}})
    assert work.memory(launch) == 2048 + 32


def test_a_block_of_pairs_reads_the_rows_of_its_two_sides():
    z, w = torch.empty(1, 4096, 64, dtype=torch.float16), torch.empty(1, 256, 256, dtype=torch.float16)
    pairs = Pairs(w, 0, 0, 256)
    launch = type("Launch", (), {"arguments": {"z": z, "pairs": pairs, "t": torch.empty(()), "empty": torch.empty(0)}})
    assert work.memory(launch) == 2 * 256 * 256 + 2 * 256 * 64 * 2 + 4


def test_programs_go_to_whoever_is_free():
    per = (100.0, 60.0)  # alone 100 cycles a tile; two residents take 60 each, 120 for both
    assert schedule.finish([1.0], per, [0], 4) == 100
    assert schedule.finish([1.0] * 8, per, [0] * 8, 4) == pytest.approx(120)
    assert schedule.finish([1.0] * 9, per, [0] * 9, 4) == pytest.approx(220)
    assert schedule.finish([1.0] * 9, per, [10] * 9, 4) == pytest.approx(240)
    assert schedule.finish([1.0] * 9, per, [10] * 8 + [30], 4) == pytest.approx(260)  # only the last takes longer
    assert schedule.finish([3.0, 1.0, 1.0, 1.0], (100.0,), [0] * 4, 2) == pytest.approx(300)
    assert schedule.finish([1.0, 1.0, 1.0, 3.0], (100.0,), [0] * 4, 2) == pytest.approx(400)  # the long one last
    for programs in (1, 4, 7, 8, 9, 16, 17):
        alike = schedule.finish([2.0] * programs, per, [5] * programs, 4), schedule.uniform(programs, 2.0, per, 5, 4)
        assert alike[0] == pytest.approx(alike[1])
