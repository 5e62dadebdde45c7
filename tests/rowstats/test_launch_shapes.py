"""How many programs share a block of rows and how many blocks a wave has: by the table, not by the card."""

import pytest

from fastcl.kernels.common.launch import Config, config, evened, shares, waves

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


def test_square_blocks_of_pairs_fill_the_multiprocessors_where_their_number_is_known():
    assert evened(90, 2, 90) == 66  # 132 programs
    assert [evened(64, each, 90) for each in (1, 2, 3, 4)] == [64, 64, 44, 64]
    assert evened(90, 2, 75) == 90 and evened(1, 2, 90) == 1


def test_slots_are_those_of_the_architecture():
    found = config("backward", 90, "none", 128, 4096)
    assert found is not None and found.slots % 132 == 0
    assert Config(64, 64, 64, 4, 1).slots == 528
