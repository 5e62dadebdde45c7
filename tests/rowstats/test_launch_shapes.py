"""How many programs share a block of rows and how many blocks a wave has: by the table, not by the card."""

import pytest

from fastcl.kernels.common.launch import Config, cdiv, config, shares, square, waves

SLOTS = 3 * 132


@pytest.mark.parametrize(
    ("blocks", "tiles", "count"),
    [
        (64, 64, 6),  # 384 of 396 slots at a time
        (1024, 1024, 3),  # 7.8 rounds of a third; with one program for a block 2.6 rounds take as long as 3
        (396, 100, 1), (16384, 16384, 1), (1, 1, 1), (0, 5, 1),
    ],
)  # fmt: skip
def test_programs_of_equal_blocks_fill_the_slots(blocks, tiles, count):
    assert shares(blocks, tiles, SLOTS) == count


def test_programs_of_falling_blocks_are_few_once_the_short_ones_fill_the_gaps():
    assert [shares(n // 128, n // 64, 264, True) for n in (1024, 4096, 16384, 65536)] == [8, 8, 3, 1]


@pytest.mark.parametrize("falling", (False, True))
def test_waves_end_together(falling):
    assert waves(30, 38, 480, 264, falling) == (30, shares(30, 480, 264, falling))
    wave, count = waves(8192, 38, 16384, 264, falling)
    assert 28 < wave <= 38 and wave * count / 264 > 0.98  # 38 blocks would leave half of a second round idle
    assert waves(5, 1, 3, 264, falling) == (1, 1)


def ends(r: int, s: int | None, size: int, each: int, slots: int) -> int:
    """When the products of all blocks of pairs end, one launch after the other."""
    pieces = [[min(size, n - k) for k in range(0, n, size)] for n in (r, r if s is None else s)]
    total = 0
    for i, x in enumerate(pieces[0]):
        for j, y in enumerate(pieces[1]):
            if s is not None or i < j:
                total += cdiv((x + y) * each, slots) * max(x, y)
            elif i == j:
                total += cdiv(x * each, slots) * x
    return total


def test_square_blocks_of_pairs_fill_the_slots_and_leave_no_ragged_end():
    assert square(512, None, 90, 2, 132) == 66  # 2 x 132 programs
    assert square(128, None, 64, 8, 168) == 45  # 64 take as many rounds as 84 would, 63 leave a block of 2
    assert square(256, 256, 90, 6, 168) == 90
    assert square(40, None, 64, 8, 168) == 40 and square(30, 50, 64, 8, 168) == 50 and square(64, 1, 64, 1, 1) == 64


@pytest.mark.parametrize(("r", "s"), ((512, None), (100, None), (91, 300), (180, 180)))
@pytest.mark.parametrize("slots", (132, 168, 252, 564))
@pytest.mark.parametrize("each", (2, 3, 8))
def test_a_square_block_of_pairs_is_the_largest_that_is_nearly_as_fast_as_any(r, s, slots, each):
    found = square(r, s, 90, each, slots)
    times = {size: ends(r, s, size, each, slots) for size in range(46, 91)}
    nearly = [size for size, end in times.items() if end <= 1.03 * min(times.values())]
    assert found == max(nearly)


def test_slots_are_those_of_the_architecture():
    found = config("backward", 90, "none", 128, 4096)
    assert found is not None and found.slots % 132 == 0
    assert Config(64, 64, 64, 4, 1).slots == 528


@pytest.mark.parametrize("mode", ("none", "peers"))
def test_rows_for_wide_rows_alone_are_not_taken_by_narrow_ones(mode: str) -> None:
    kernels = "forward_plain", "forward_masked"
    assert [config(kernel, 100, mode, 256, 65536) for kernel in kernels] == [None, None]
    assert all(config(kernel, 100, mode, d, 65536) for kernel in kernels for d in (257, 512))
