"""The cycle model on loops small enough to count by hand: pipes, latencies, waits, residents, ways through code."""

import pytest
from sass_listing import code

from bench.static.predict.assumptions import MACHINES, TABLE, Machine
from bench.static.predict.launches import OUTSIDE
from bench.static.predict.multiprocessor import Multiprocessor
from bench.static.predict.paths import Paths
from bench.static.predict.pipes import Kind, NotModelled, by_pipe, decode, flops

HOPPER = MACHINES[90]
PRODUCT = "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24"  # 64 cycles, 6,144 bytes
COPY = "LDGSTS.E.BYPASS.128 [R8], desc[UR40][R10.64]"


def operations(*lines: str, machine: Machine = HOPPER) -> list:
    return decode(code(*lines)[0].code, machine)


def cycles(*lines: str, programs: int = 1, warps: int = 4, machine: Machine = HOPPER) -> float:
    return Multiprocessor(operations(*lines, machine=machine), programs, warps, machine).cycles()


def test_control_words_are_read():
    (block,) = code("FFMA R1, R2, R3, R4 {5, 2, 7, 0}", "LDS R2, [R3] {15, 0, 1, 33}")
    assert [one.control for one in block.code] == [(5, 2, 7, 0), (15, 0, 1, 33)]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("FFMA R1, R2, R3, R4", Kind.FMA), ("IMAD R1, R2, R3, R4", Kind.FMA_HEAVY), ("MUFU.EX2 R1, R2", Kind.MUFU),
        ("F2FP.F16.F32.PACK_AB R1, R2, R3", Kind.ALU), ("F2F.F16.F32 R1, R2", Kind.MUFU),
        ("ISETP.GE.AND P0, PT, R8, R9, PT", Kind.ALU), ("LDS.128 R4, [R8]", Kind.SHARED), (COPY, Kind.COPY),
        ("SHFL.BFLY PT, R12, R8, 0x1, 0x1f", Kind.SHUFFLE), ("LDGDEPBAR", Kind.COMMIT),
        ("DEPBAR.LE SB0, 0x1", Kind.COPY_WAIT), (PRODUCT, Kind.WGMMA), ("UIADD3 UR4, UR4, 1, URZ", Kind.FREE),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", Kind.WGMMA_WAIT), ("BAR.SYNC.DEFER_BLOCKING 0x0", Kind.BARRIER),
        ("LDG.E R4, desc[UR4][R8.64]", Kind.LOAD), ("STG.E.128 desc[UR4][R2.64], R8", Kind.STORE),
        ("HMMA.16816.F32 R8, R40, R44, R8", Kind.HMMA), ("LDC R1, c[0x0][0x28]", Kind.SLOW),
        ("@!PT LDS.128 R4, [R8]", Kind.FREE), (f"{COPY}, !PT", Kind.FREE),
    ],
)  # fmt: skip
def test_every_instruction_has_its_pipe(line, kind):
    predicate, _, rest = line.rpartition("@!PT ")
    (op,) = operations(f"@!PT {rest}" if predicate or line.startswith("@") else line)
    assert op.kind is kind


def test_what_the_model_does_not_know_is_said():
    for line in ("UTMALDG.2D [UR8], [UR4]", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", "SYNCS.ARRIVE R1"):
        with pytest.raises(NotModelled, match=line.split()[0]):
            operations(line)


def test_pipes_are_counted_as_by_hand():
    ops = operations(PRODUCT, "MUFU.EX2 R1, R2", "FFMA R1, R2, R3, R4", COPY, "LDS.128 R4, [R8]")
    found = by_pipe(ops, 8, HOPPER)
    assert found == pytest.approx(
        {"tensor": 128, "shared": 2 * (6144 + 4 * 512 + 4 * 512) / 128, "mufu": 16, "fma": 2, "alu": 0, "issue": 10,
         "l2": 2 * 4 * 512 / 34}
    )  # fmt: skip
    assert flops(ops, 8) == 2 * 2 * 64 * 128 * 16
    assert operations(PRODUCT, machine=HOPPER.changed({"tensor": 2048}))[0].amount == 128
    registers = "HGMMA.64x128x16.F32 R24, R4, gdesc[UR8], R24"  # the first operand takes no shared memory
    assert by_pipe(operations(registers), 4, HOPPER)["shared"] == 4096 / 128


@pytest.mark.parametrize(
    ("line", "busy"),
    [
        ("FFMA R1, R2, R3, R4", 1), ("IMAD R1, R2, R3, R4", 2), ("LOP3.LUT R8, R2, 0x1, RZ", 2),
        ("MUFU.EX2 R1, R2", 8), ("LDS.128 R4, [R8]", 16), ("HMMA.16816.F32 R8, R40, R44, R8", 4 * 4096 / 2560),
    ],
)  # fmt: skip
def test_a_pipe_takes_its_time_for_each_instruction(line, busy):
    assert cycles(*[line] * 32) == pytest.approx(32 * busy, rel=0.06)
    assert cycles(*[line] * 32, programs=2) == pytest.approx(32 * busy, rel=0.06)  # for a turn of one of them


def test_products_run_behind_the_warp_until_it_waits_for_them():
    group = [PRODUCT] * 3 + [f"{PRODUCT}, gsb0"]
    work = ["FFMA R1, R2, R3, R4"] * 200
    wait = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert cycles(*group, *work, *wait) == pytest.approx(4 * 64 + HOPPER.tensor_latency, rel=0.03)
    assert cycles(*group, *wait, *work) == pytest.approx(4 * 64 + HOPPER.tensor_latency + 200, rel=0.03)
    assert cycles(*group, *wait, *work, programs=2) == pytest.approx(4 * 64, rel=0.04)  # the other program fills in


def test_copies_are_awaited_as_deep_as_the_pipeline_is():
    def loop(pending: int) -> list[str]:
        work = [PRODUCT] * 3 + [f"{PRODUCT}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
        return [f"DEPBAR.LE SB0, {pending:#x}", "BAR.SYNC.DEFER_BLOCKING 0x0", *work, COPY, "LDGDEPBAR"]

    exposed, hidden = cycles(*loop(0)), cycles(*loop(3))
    assert exposed > 256 + HOPPER.load_latency and hidden == pytest.approx(256 + 30 + 22, rel=0.1)
    slow = HOPPER.changed({"l2": 4.0})  # 512 cycles for 2,048 bytes
    assert cycles(*loop(3), machine=slow) == pytest.approx(512, rel=0.05)


def test_plain_loads_and_stores_of_tiles_take_the_time_of_l2():
    loaded, stored = "LDG.E.128 R4, desc[UR4][R8.64]", "STG.E.128 desc[UR4][R2.64], R8"
    wide = "LDG.E.ENL2.256.CONSTANT R4, R8, desc[UR4][R12.64]"
    numbers = ["LDG.E.64 R4, desc[UR4][R8.64]", "STG.E desc[UR4][R2.64], R8"]  # of rows
    both = [loaded, stored]
    wide_store = wide.replace("LDG", "STG")
    for lines, size in (
        ([loaded], 2048),
        ([stored], 2048),
        ([wide], 4096),
        ([wide_store], 4096),
        (both, 4096),
        (numbers, 0),
    ):
        assert by_pipe(operations(PRODUCT, *lines), 4, HOPPER)["l2"] == pytest.approx(size / HOPPER.l2)
        expected = max(64, size / HOPPER.l2)  # or that of the product
        assert cycles(PRODUCT, *lines) == pytest.approx(expected, rel=0.1)
    assert by_pipe(operations(loaded, stored), 4, HOPPER)["l2"] == 0  # no product: the card's memory counts


def test_scoreboards_stalls_and_barriers_hold_a_warp_back():
    load = "LDG.E R4, desc[UR4][R8.64] {1, 3, 7, 0}"
    assert cycles(load, "FFMA R1, R4, R3, R4 {1, 7, 7, 8}") == pytest.approx(HOPPER.load_latency, rel=0.01)
    assert cycles(load, "FFMA R1, R4, R3, R4 {1, 7, 7, 16}") < 10
    assert cycles("FFMA R1, R2, R3, R4 {9, 7, 7, 0}") == 9
    both = cycles("BAR.SYNC.DEFER_BLOCKING 0x0", *["MUFU.EX2 R1, R2"] * 8, warps=8)
    assert both == pytest.approx(2 * 64 + HOPPER.barrier, rel=0.3) and both > 2 * 64
    with pytest.raises(NotModelled, match="no warp can go on"):
        cycles("BAR.SYNC.DEFER_BLOCKING 0x1, 0x200", warps=8)


def test_no_program_is_kept_from_a_pipe_that_others_keep_busy():
    card = MACHINES[89].changed({"hmma": 512})
    lines = ["HMMA.16816.F32 R8, R40, R44, R8"] * 2 + ["FFMA R1, R2, R3, R4"] * 5 + ["MUFU.EX2 R1, R2"] * 16
    four = Multiprocessor(operations(*lines, machine=card), 4, 4, card)
    assert four.cycles() == pytest.approx(16 * 8, rel=0.1)  # held by exponentials
    turns = [warp.turns for warp in four.warps]
    assert max(turns) - min(turns) <= 6, turns


def test_a_loop_depends_on_nothing_outside_a_multiprocessor():
    other = HOPPER.changed(dict.fromkeys(OUTSIDE, 1.0))
    loop = [PRODUCT, COPY, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "MUFU.EX2 R1, R2"]
    assert cycles(*loop, machine=other) == cycles(*loop) != cycles(*loop, machine=HOPPER.changed({"load_latency": 9}))


def test_one_pass_ends_with_its_last_result():
    ops = operations("LDG.E R4, desc[UR4][R8.64] {1, 3, 7, 0}", "FFMA R1, R2, R3, R4 {4, 7, 7, 0}")
    assert Multiprocessor(ops, 1, 4, HOPPER).latency() == HOPPER.load_latency


LOOPS = (
    "MOV R1, R2", "@P0 BRA `(.L_x_3)",
    ".L_x_1:", "FADD R1, R1, R2",
    ".L_x_2:", PRODUCT, "@P1 BRA `(.L_x_2)",
    "MUFU.EX2 R1, R1", "@P0 BRA `(.L_x_1)",
    ".L_x_3:", "@P2 EXIT", "LOP3.LUT R8, R2, 0x1, RZ", "EXIT",
    "STG.E desc[UR4][R2.64], R8", "BRA `(.L_x_1)",
)  # fmt: skip


def opcodes(code) -> list[str]:
    return [one.opcode.split(".")[0] for one in code]


def test_loops_and_ways_are_found_in_code():
    paths = Paths(code(*LOOPS))
    (outer,) = paths.outer()
    (inner,) = paths.inner(outer)
    assert inner < outer and opcodes(paths.instructions(inner)) == ["HGMMA", "BRA"]
    turn = opcodes(paths.walk(outer, {inner: 3}))
    assert turn == ["FADD", "HGMMA", "BRA", "HGMMA", "BRA", "HGMMA", "BRA", "MUFU", "BRA"]
    whole = opcodes(paths.whole(2))
    assert whole == ["MOV", "BRA", "FADD", "HGMMA", "BRA", "HGMMA", "BRA", "MUFU", "BRA", "EXIT", "LOP3", "EXIT"]
    through = paths.through([lambda k: k in inner])
    assert [opcodes(paths.code[k].code)[0] for k in through] == ["MOV", "FADD", "HGMMA", "MUFU", "EXIT"]
    with pytest.raises(ValueError, match="no way"):
        paths.through([lambda k: False])


def test_each_assumption_is_one_row_with_a_source():
    assert [row.name for row in TABLE] == list(Machine.__dataclass_fields__)
    assert all(row.source and row.meaning for row in TABLE)
    with pytest.raises(ValueError, match="no assumption is called speed"):
        HOPPER.changed({"speed": 1.0})
