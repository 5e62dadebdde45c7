"""Predicted kernels: which loop is whose, how often loops turn, what runs besides, and a launch's time."""

import pytest
from sass_listing import compiled

from bench.static.predict.assumptions import MACHINES
from bench.static.predict.launches import Kernel, predict
from bench.static.predict.pipes import NotModelled
from bench.static.predict.work import Feed, Tiles, Work

HOPPER = MACHINES[90]
PRODUCT = "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0"  # 64 cycles, 262,144 operations
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
ONE = 2 * 64 * 128 * 16
LOAD = "LDG.E R4, desc[UR4][R8.64] {1, 3, 7, 0}"
USE = "FFMA R1, R4, R3, R4 {4, 7, 7, 8}"

TWO_LOOPS = (
    LOAD, USE,
    ".L_x_1:", "ISETP.GE.AND P0, PT, R8, R9, PT", PRODUCT, PRODUCT, WAIT, "FSEL R1, R2, R3, P0", "@P0 BRA `(.L_x_1)",
    ".L_x_2:", PRODUCT, WAIT, "@P0 BRA `(.L_x_2)",
    "STG.E desc[UR4][R2.64], R1", "EXIT",
)  # fmt: skip


@pytest.fixture
def kernel(tmp_path):
    def make(*lines: str, **changes) -> Kernel:
        return Kernel(compiled(tmp_path, *lines, **changes), 90, HOPPER)

    return make


def test_the_masked_loop_is_the_one_that_selects(kernel):
    found = kernel(*TWO_LOOPS)
    plain, masked = found.bodies(("plain", "masked"))
    assert min(plain) > min(masked) and found.bodies(("plain",)) == [plain] and found.bodies(("masked",)) == [masked]
    low = found.bodies(("plain", "low"))
    assert low == [masked, plain]  # of a product they come in order
    with pytest.raises(NotModelled, match="0 loops with products"):
        kernel("EXIT").bodies(("plain",))


def test_loops_over_columns_turn_until_the_tile_has_its_operations(kernel):
    found = kernel(
        "MOV R1, R2", ".L_x_1:", PRODUCT, ".L_x_2:", PRODUCT, PRODUCT, "@P1 BRA `(.L_x_2)",
        WAIT, "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    (body,) = found.bodies(("plain",))
    assert sum(one.opcode.startswith("HGMMA") for one in found.turn(body, 9 * ONE)) == 9
    timing = found.tile(Tiles("plain", 9 * ONE), True, ("plain",))
    assert timing.pipes["tensor"] == 9 * 64 and timing.surplus == 1
    assert timing.cycles[-1] == pytest.approx(9 * 64, rel=0.06) and len(timing.cycles) == found.resident == 4
    assert found.tile(Tiles("plain", 6 * ONE), True, ("plain",)).surplus == pytest.approx(7 / 6)


def test_a_loop_into_which_columns_were_flattened_takes_its_long_way_once_a_tile(kernel):
    found = kernel(
        "MOV R1, R2", ".L_x_1:", PRODUCT, WAIT, "@P1 BRA `(.L_x_2)", "MUFU.EX2 R1, R1", "FADD R1, R1, R2",
        ".L_x_2:", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    (body,) = found.bodies(("plain",))
    for count in (1, 4):
        turn = [one.opcode for one in found.turn(body, count * ONE)]
        assert sum(one.startswith("HGMMA") for one in turn) == count and turn.count("MUFU.EX2") == 1
    assert found.tile(Tiles("plain", 4 * ONE), True, ("plain",)).surplus == 1


def test_a_program_of_one_tile_is_one_way_and_the_masked_one_is_another(kernel):
    found = kernel(
        "ISETP.GE.AND P0, PT, R8, R9, PT", "@P0 BRA `(.L_x_2)",
        ".L_x_1:", PRODUCT, "@P1 BRA `(.L_x_1)", WAIT, "EXIT",
        ".L_x_2:", PRODUCT, PRODUCT, WAIT, "FSEL R1, R2, R3, P0", "EXIT",
    )  # fmt: skip

    def products(tile: Tiles) -> int:
        return sum(one.opcode.startswith("HGMMA") for one in found.straight(tile))

    assert products(Tiles("plain", 8 * ONE)) == 8 and products(Tiles("masked", 2 * ONE)) == 2
    launch = predict(found, Work((Tiles("plain", 8 * ONE),), uniform=(1320, (1.0,)), loop=False), 0)
    assert launch.pipes["tensor"] == 1320 * 8 * 64 / 132
    assert launch.cycles == pytest.approx(3 * HOPPER.start + 10 * 8 * 64, rel=0.1)  # 10 on each, 4 at a time


def test_what_runs_outside_the_loops_is_paid_once_for_each_program(kernel):
    found = kernel(*TWO_LOOPS)
    fixed = found.fixed(found.bodies(("plain", "masked")))
    assert fixed == pytest.approx(HOPPER.start + HOPPER.load_latency, rel=0.05)
    tiles = Tiles("plain", ONE), Tiles("masked", 2 * ONE)
    short = predict(found, Work(tiles, programs=((1, 1),) * 132), 0)
    long = predict(found, Work(tiles, programs=((1001, 1),) * 132), 0)
    turn = found.tile(tiles[0], True, ("plain", "masked")).cycles[0]
    assert long.cycles - short.cycles == pytest.approx(1000 * turn)
    assert short.cycles > fixed and short.programs == 4 and short.binding == "latency"
    assert long.ms == pytest.approx(long.cycles / 1.755e6 + HOPPER.gap * 1e-3)


def test_a_launch_is_never_faster_than_the_memory_of_the_card(kernel):
    found = predict(kernel(*TWO_LOOPS), Work((Tiles("plain", ONE),), programs=((1,),)), 4_300_000_000)
    assert found.ms == pytest.approx(1 + HOPPER.gap * 1e-3) and found.binding == "memory"


def test_rows_take_rounds_and_a_program_that_is_not_needed_returns(kernel):
    rows = kernel(LOAD, USE, "EXIT", dot=False, registers=32)
    alone = predict(rows, Work(uniform=(1, ())), 0)
    assert alone.cycles == pytest.approx(HOPPER.start + HOPPER.load_latency, rel=0.05)
    assert rows.resident == 16
    assert predict(rows, Work(uniform=(132 * 16, ())), 0).cycles == pytest.approx(alone.cycles)
    assert predict(rows, Work(uniform=(132 * 16 * 3, ())), 0).cycles == pytest.approx(3 * alone.cycles)
    looped = kernel(".L_x_1:", LOAD, USE, "@P0 BRA `(.L_x_1)", "EXIT", registers=32)
    more = predict(looped, Work(uniform=(1, ()), turns=5), 0)
    assert more.cycles == pytest.approx(HOPPER.start + 5 * HOPPER.load_latency, rel=0.05)
    skipped = predict(rows, Work(uniform=(10**4, ()), skipped=True), 10**9)
    assert skipped.cycles == 5 * (HOPPER.start + HOPPER.load_latency) and skipped.binding == "latency"


def test_a_kernel_that_does_not_fit_is_not_modelled(kernel):
    with pytest.raises(NotModelled, match="no program fits"):
        kernel("EXIT", shared=300 * 1024)


def consumer(name: int, *tile: str) -> tuple[str, ...]:
    """A consumer's loop, with the code that repeats its wait elsewhere."""
    ready, repeat = f".L_x_{name}0", f".L_x_{name}1"
    return (
        f".L_x_{name}:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", f"@!P0 BRA `({repeat})", f"{ready}:", *tile,
        "MUFU.EX2 R1, R2", "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ", f"@P1 BRA `(.L_x_{name})", "EXIT",
        f"{repeat}:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", f"@!P0 BRA `({repeat})", f"BRA `({ready})",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "size", "products", "together", "cycles"),
    [
        (4, 1024, 32, False, 32 * 64),  # the tensor cores are always busy
        (4, 16384, 2, False, 16384 / 34),  # a tile takes longer from L2 than its products
        (2, 1024, 2, False, (3 * 64 + 600) / 2),  # latency of a copy, with one stage for each consumer
        (4, 1024, 16, True, 2 * 16 * 64),  # every tile is for both
    ],
)
def test_consumers_take_tiles_that_a_producer_feeds(kernel, stages, size, products, together, cycles):
    lines = (*[PRODUCT] * products, WAIT)
    found = kernel(*consumer(1, *lines), *consumer(2, *lines))
    tile = Tiles("plain", (2 if together else 1) * products * ONE, Feed(stages, 2, size, together))
    timing = found.tile(tile, True, ("plain",))
    assert timing.cycles == (pytest.approx(cycles, rel=0.15),) and timing.surplus == 1
    assert timing.pipes["l2"] == size / 34 and timing.pipes["tensor"] == tile.flops / 4096
    assert predict(found, Work((tile,), ((10.0,), (10.0,))), 0).cycles == pytest.approx(10 * timing.cycles[0], rel=0.9)


def by_columns(name: int, *step: str) -> tuple[str, ...]:
    """A consumer's loop over tiles, and in it one over blocks of columns."""
    ready, repeat = f".L_x_{name}0", f".L_x_{name}1"
    return (
        f".L_x_{name}:", "MUFU.EX2 R1, R2", f".L_x_{name}2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",
        f"@!P0 BRA `({repeat})", f"{ready}:", *step, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ",
        f"@P1 BRA `(.L_x_{name}2)", "MUFU.EX2 R1, R2", f"@P2 BRA `(.L_x_{name})", "EXIT",
        f"{repeat}:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", f"@!P0 BRA `({repeat})", f"BRA `({ready})",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "size", "products", "leads", "cycles"),
    [
        (4, 1024, 16, False, 5 * 2 * 16 * 64),  # the tensor cores are always busy
        (4, 16384, 2, False, 5 * 16384 / 34),  # a block of columns takes longer from L2 than its products
        (2, 1024, 2, False, 5 * (600 + 2 * 128 + 30) / 2),  # two copies are on their way at a time
        (2, 1024, 2, True, 5 * (600 + 2 * 128 + 30) / 2),  # also if they are made by whoever waits for them
    ],
)
def test_a_tile_may_take_several_copies_which_a_consumer_may_make(kernel, stages, size, products, leads, cycles):
    lines = (*[PRODUCT] * products, WAIT)
    found = kernel(*by_columns(1, *lines), *by_columns(2, *lines))
    tile = Tiles("plain", 5 * 2 * products * ONE, Feed(stages, 2, size, True, 5, leads))
    timing = found.tile(tile, True, ("plain",))
    assert timing.cycles == (pytest.approx(cycles, rel=0.15),) and timing.surplus == 1
    assert timing.pipes["l2"] == 5 * size / 34


def test_a_ring_without_its_consumers_is_not_modelled(kernel):
    found = kernel(*consumer(1, PRODUCT, WAIT))
    with pytest.raises(NotModelled, match="1 loops with products for 2 consumers"):
        found.tile(Tiles("plain", ONE, Feed(2, 2, 1024, False)), True, ("plain",))
