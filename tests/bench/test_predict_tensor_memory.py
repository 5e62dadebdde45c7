"""The cycle model for sm_100: products into tensor memory against published measurements, barriers, tensor memory."""

import pytest
from sass_listing import code

from bench.static.predict.assumptions import MACHINES
from bench.static.predict.multiprocessor import Multiprocessor
from bench.static.predict.paths import Paths
from bench.static.predict.pipes import Kind, NotModelled, by_pipe, decode, flops
from bench.static.predict.tensor_memory import awaited, settled

BLACKWELL = MACHINES[100]
SHARED, TENSOR = "gdesc[UR4]", "tmem[UR4]"  # where the first operand is
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR28], R4"
COMMIT = "UTCBAR [UR28], URZ"


def products(m: int, n: int, first: str = SHARED, number: int = 1) -> list[str]:
    """Products of m x n, with their description, as ptxas writes both."""
    description = 1 << 4 | n // 8 << 17 | m // 16 << 24
    one = f"UTCHMMA {first}, gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT"
    return [f"UMOV UR11, {description:#x}", *[one] * number]


def operations(*lines: str) -> list:
    return decode(settled(code(*lines))[0].code, BLACKWELL)


def cycles(*lines: str, programs: int = 1, warps: int = 4) -> float:
    return Multiprocessor(operations(*lines), programs, warps, BLACKWELL).cycles()


@pytest.mark.parametrize(
    ("m", "n", "first", "measured"),
    [
        (64, 64, SHARED, 32.0), (64, 128, SHARED, 64.0), (64, 256, SHARED, 128.0), (128, 64, SHARED, 48.0),
        (128, 96, SHARED, 56.0), (128, 128, SHARED, 64.0), (128, 256, SHARED, 128.0), (64, 64, TENSOR, 32.0),
        (128, 64, TENSOR, 32.0), (128, 256, TENSOR, 128.0),
    ],
)  # fmt: skip
def test_products_in_a_row_take_as_long_as_measured(m, n, first, measured):
    """SemiAnalysisAI/microbench-blackwell, umma_latency/fit_results.csv: cycles for each of many (BF16, one CTA)."""
    lines = products(m, n, first, 64)
    assert cycles(*lines) == pytest.approx(64 * measured, rel=0.01)
    assert flops(operations(*lines), 8) == 64 * 2 * m * n * 16  # of the program, whatever its warps


@pytest.mark.parametrize(
    ("m", "n", "first", "measured"),
    [(64, 64, SHARED, 152), (64, 256, SHARED, 248), (128, 64, SHARED, 168), (128, 256, SHARED, 264),
     (128, 64, TENSOR, 136), (128, 256, TENSOR, 232)],
)  # fmt: skip
def test_one_product_and_the_wait_for_it_take_about_as_long_as_measured(m, n, first, measured):
    """The same, umma_latency/lat_results_full.csv; the range is that of the row `tensor_latency`."""
    assert cycles(*products(m, n, first), COMMIT, WAIT) == pytest.approx(measured, abs=20)


def test_a_wait_is_for_the_latest_commit_to_its_address():
    def found(*lines: str) -> list[int]:
        return list(awaited(code(*lines)[0].code).values())

    assert found(COMMIT, WAIT) == [0]
    assert found(WAIT, COMMIT) == [0]  # the commit of the turn before
    other = "UTCBAR [UR30], URZ"
    assert found(COMMIT, other, WAIT) == [1] and found(other, COMMIT, WAIT) == [0]
    assert found(WAIT, "UMOV UR28, UR30", other) == [0]  # the wait of the next turn is for the copied address
    ring = ["UIADD3 UR16, UPT, UPT, UR16, 0x1, URZ", "ULEA UR28, UR16, UR7, 0x3"]
    assert found(*ring, COMMIT, WAIT.replace("UR28", "UR29"), "UMOV UR29, UR28") == [1]
    assert found("UIADD3 UR28, UPT, UPT, UR7, 0x10, URZ", COMMIT, other, WAIT.replace("UR28", "UR7+0x10")) == [1]
    assert found(other, COMMIT, WAIT.replace("UR28", "UR40")) == [0]  # an address that nothing is known of: for all
    assert found("UISETP.GT.AND UP0, UPT, UR9, 0x1, UPT", "USEL UR28, UR9, UR7, UP0", COMMIT, WAIT) == [0]


LOOP = (
    "MOV R1, R2",
    ".L_x_1:", "@P1 BRA `(.L_x_2)", *products(128, 64), COMMIT,
    ".L_x_2:", "BAR.SYNC.DEFER_BLOCKING 0x0", WAIT, "@!P0 BRA `(.L_x_4)",
    ".L_x_3:", "MUFU.EX2 R1, R1", "@P2 BRA `(.L_x_1)", "EXIT",
    ".L_x_4:", WAIT, "@!P0 BRA `(.L_x_4)", "BRA `(.L_x_3)",
)  # fmt: skip


def test_jumps_over_products_and_repeated_waits_are_left_out():
    def opcodes(code) -> list[str]:
        return [one.opcode.split(".")[0] for one in code]

    paths = Paths(settled(code(*LOOP)))
    (body,) = paths.outer()
    turn = ["BRA", "UMOV", "UTCHMMA", "UTCBAR", "BAR", "SYNCS", "BRA", "MUFU", "BRA"]
    assert opcodes(paths.walk(body, {})) == opcodes(paths.shortest(body)) == turn
    before = code(*LOOP)
    assert len(Paths(before).loops) == 2 and len(paths.loops) == 1
    hopper = code("HGMMA.64x128x16.F32 R24, gdesc[UR8], R24", *LOOP[-4:])
    assert settled(hopper) is hopper


def test_one_warp_of_a_program_issues_and_all_wait():
    lines = [*products(128, 128, number=8), COMMIT, "BAR.SYNC.DEFER_BLOCKING 0x0", WAIT]
    busy = 8 * 64 + BLACKWELL.tensor_latency
    assert cycles(*lines) == pytest.approx(busy, rel=0.06)
    assert cycles(*lines, warps=8) == pytest.approx(busy, rel=0.1)
    assert cycles(*lines, programs=2) == pytest.approx(8 * 64, rel=0.03)  # the other program fills in
    late = [WAIT, "MUFU.EX2 R1, R2", *products(128, 128, number=8), COMMIT]
    assert cycles(*late, "BAR.SYNC.DEFER_BLOCKING 0x0", warps=8) == pytest.approx(busy, rel=0.1)


def test_tensor_memory_and_pairs_of_operations_take_their_pipes():
    load, store = "LDTM.x32 R4, tmem[UR8]", "STTM.16dp32bit_t0_t15.x16 tmem[UR8], R4"
    ops = operations(load, store, "FADD2 R2, R4.F32x2.HI_LO, R6.F32", "SYNCS.EXCH.64 URZ, [UR11], UR4")
    assert [op.kind for op in ops] == [Kind.TENSOR_MEMORY, Kind.TENSOR_MEMORY, Kind.FMA, Kind.FREE]
    assert by_pipe(ops, 8, BLACKWELL)["tmem"] == 2 * (32 + 16) and by_pipe(ops, 4, BLACKWELL)["fma"] == 2
    assert "tmem" not in by_pipe(ops[2:], 4, MACHINES[90])
    assert cycles(*[load] * 16) == pytest.approx(16 * 32, rel=0.03)
    assert cycles(*["FADD2 R2, R4, R6"] * 32) == pytest.approx(32 * 2, rel=0.03)
    used = cycles("LDTM.x32 R4, tmem[UR8] {1, 3, 7, 0}", "FFMA R1, R4, R3, R4 {1, 7, 7, 8}")
    assert used == pytest.approx(32 + BLACKWELL.tmem_latency, abs=3)


def test_pipes_of_products_are_those_of_the_program():
    found = by_pipe(operations(*products(128, 64, number=2)), 8, BLACKWELL)
    assert found["tensor"] == 64 and found["shared"] == 2 * 192 * 32 / 128
    assert by_pipe(operations(*products(128, 64, TENSOR, 2)), 4, BLACKWELL)["shared"] == 2 * 64 * 32 / 128


@pytest.mark.parametrize(
    "line",
    [
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR12], UPT",  # nothing tells its shape
        "UTCHMMA.2CTA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT",
        "UTCQMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT", "UTCCP.T.S tmem[UR4], gdesc[UR6]",
        "LDT R1, R2",
    ],
)  # fmt: skip
def test_other_forms_are_not_modelled(line):
    with pytest.raises(NotModelled, match=line.split()[0]):
        operations("UMOV UR11, 0x8108010", line)
