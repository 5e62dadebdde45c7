"""The reader of machine code finds hazards, broken chains, loops and tensor-core instructions in small texts."""

import pytest

from bench.static import sass


def code(*lines: str) -> list[sass.Block]:
    """Blocks of machine code; a line that ends in a colon is a label."""
    text = "\t.section\t.text.kernel\n"
    for k, line in enumerate(lines):
        text += f"{line}\n" if line.endswith(":") else f"        /*{16 * k:04x}*/    {line} ;\n"
    return sass.blocks(text)


RS = "HGMMA.64x64x16.F32 R24, R8, gdesc[UR4].tnspB, R24"  # reads R8 to R11
SS = "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    "write",
    [
        "MOV R8, R2", "MOV R11, R2", "@!P0 IADD3 R9, P1, R2, R3, RZ", "LDS.128 R6, [R40]", "LDS.U.64 R10, [R40]",
        "LDSM.16.M88.4 R6, [R40]", "SHFL.BFLY PT, R10, R2, 0x1, 0x1f", "LOP3.LUT P0, R8, R2, 0x1, RZ, 0xc0, !PT",
        "IMAD.WIDE R10, R2, 0x4, R4", "LDG.E.LTC128B.128 R8, desc[UR4][R2.64]", "F2FP.F16.F32.PACK_AB R9, R2, R3",
        "ATOMG.E.ADD.STRONG.GPU PT, R8, desc[UR4][R2.64], R5", "HMMA.16816.F32 R8, R40, R44, RZ",
    ],
)  # fmt: skip
def test_a_write_to_an_operand_in_flight_is_a_hazard(write):
    (found,) = sass.hazards(code(f"{RS}, gsb0", write, WAIT, "EXIT"))
    assert found.startswith("0010 ") and found.endswith("WGMMA at 0000")
    assert not sass.hazards(code(f"{RS}, gsb0", WAIT, write, "EXIT"))
    assert not sass.hazards(code(write, f"{RS}, gsb0", WAIT, "EXIT"))


@pytest.mark.parametrize(
    "harmless",
    [
        "STG.E.128 desc[UR4][R2.64], R8", "STS [R8], R9", "ISETP.GE.AND P0, PT, R8, R9, PT",
        "FSETP.GT P0, PT, R8, R2, PT", "MOV R12, R8", "MOV R7, R8", "LDS.64 R12, [R8]", "LDS.128 R16, [R8]",
        "LDS.128 R4, [R8]", "R2UR UR4, R8",
        "LDGSTS.E.BYPASS.LTC128B.128 [R8], desc[UR40][R10.64]", "BAR.SYNC.DEFER_BLOCKING R8, R9", "FADD R7, R8, R9",
        "WARPGROUP.ARRIVE", "SHFL.BFLY PT, R12, R8, 0x1, 0x1f", "REDG.E.ADD desc[UR4][R8.64], R9", "UMOV UR8, UR9",
    ],
)  # fmt: skip
def test_reading_an_operand_in_flight_or_writing_beside_it_is_none(harmless):
    assert not sass.hazards(code(f"{RS}, gsb0", harmless, WAIT, "EXIT"))


def test_a_wait_for_all_but_some_groups_leaves_the_newest_in_flight():
    two = (f"{RS}, gsb0", f"{RS.replace('R8', 'R12')}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert not sass.hazards(code(*two, "MOV R8, R2", WAIT, "EXIT"))
    assert len(sass.hazards(code(*two, "MOV R12, R2", WAIT, "EXIT"))) == 1
    # A group of WGMMA that read shared memory alone counts as a group.
    assert not sass.hazards(code(f"{RS}, gsb0", f"{SS}, gsb0", two[2], "MOV R8, R2", WAIT, "EXIT"))
    # What no group has been closed over cannot be waited for.
    assert len(sass.hazards(code(RS, WAIT, "MOV R8, R2", "EXIT"))) == 1


def test_a_hazard_is_found_around_a_loop_and_behind_a_branch():
    loop = (".L_x_1:", "MOV R8, R2", WAIT, f"{RS}, gsb0", "@P0 BRA `(.L_x_1)", WAIT, "EXIT")
    assert sass.hazards(code(*loop)) == ["0010 MOV R8 writes an operand of the WGMMA at 0030"]
    assert not sass.hazards(code(loop[0], loop[2], loop[1], *loop[3:]))
    branch = ("@P0 BRA `(.L_x_2)", WAIT, ".L_x_2:", "MOV R8, R2", "EXIT")
    assert len(sass.hazards(code(f"{RS}, gsb0", *branch))) == 1
    # A jump that is always taken goes past the write.
    assert not sass.hazards(code(f"{RS}, gsb0", "BRA `(.L_x_2)", "MOV R8, R2", ".L_x_2:", WAIT, "EXIT"))
    assert len(sass.hazards(code(f"{RS}, gsb0", "BRA.U UP0, `(.L_x_2)", "MOV R8, R2", ".L_x_2:", WAIT, "EXIT"))) == 1
    # Nothing waits: the analysis still ends.
    assert len(sass.hazards(code(".L_x_1:", f"{RS}, gsb0", "@P0 BRA `(.L_x_1)", "MOV R8, R2", "EXIT"))) == 1


def test_chains_of_wgmma_are_broken_by_a_wait_for_all():
    assert sass.broken_chains(code(SS, SS, f"{SS}, gsb0", WAIT)) == (0, 2)
    assert sass.broken_chains(code(f"{SS}, gsb0", WAIT, f"{SS}, gsb0", WAIT, f"{SS}, gsb0", WAIT)) == (2, 2)
    assert sass.broken_chains(code(SS, WAIT.replace("0x0", "0x1"), SS)) == (0, 1)
    first = SS.replace("R24", "R88")
    assert sass.broken_chains(code(SS, f"{SS}, gsb0", WAIT, first, f"{first}, gsb0", WAIT)) == (0, 2)
    start = "HGMMA.64x64x16.F32 R24, gdesc[UR8], RZ, !UPT"
    assert sass.broken_chains(code(f"{SS}, gsb0", WAIT, start)) == (0, 0)  # begins a new sum


def test_exponentials_are_counted_in_the_innermost_loop_that_has_any():
    ex2 = "MUFU.EX2 R1, R2"
    assert sass.exponentials_in_a_loop(code(ex2, ex2, "EXIT")) is None
    one = code(ex2, ".L_x_1:", ex2, "@!P1 MUFU.EX2 R3, R3", "MUFU.LG2 R1, R2", "@P0 BRA `(.L_x_1)", ex2, "EXIT")
    assert sass.exponentials_in_a_loop(one) == 2
    inner = (".L_x_2:", SS, "@P1 BRA `(.L_x_2)")
    assert sass.exponentials_in_a_loop(code(".L_x_1:", *inner, ex2, ex2, ex2, "@P0 BRA `(.L_x_1)", "EXIT")) == 3
    inner = (".L_x_2:", ex2, "@P1 BRA `(.L_x_2)")
    assert sass.exponentials_in_a_loop(code(".L_x_1:", *inner, ex2, ex2, "@P0 BRA `(.L_x_1)", "EXIT")) == 1
    # A wait that was moved behind the end jumps back, but into no loop.
    cold = code("@P0 BRA `(.L_x_9)", ".L_x_3:", ex2, "EXIT", ".L_x_9:", ex2, "BRA `(.L_x_3)")
    assert sass.exponentials_in_a_loop(cold) is None


def test_instructions_are_counted_in_every_dialect_of_the_disassembler():
    found = code(
        "HMMA.16816.F32 R96, R68, R44, RZ          &req={1}         ?WAIT15_END_GROUP",
        "UTCHMMA gdesc[UR6], gdesc[UR12], tmem[UR23], tmem[UR36], idesc[UR37], !UPT", "UTCBAR [UR4], URZ",
        "UTCATOMSWS.AND URZ, UR5", SS, RS, "@P0 STL.64 [R1+0x8], R2", "LDL R2, [R1]",
        "IMMA.16832.S8.S8 R4, R6.ROW, R8.COL, R4",
    )  # fmt: skip
    assert {name: sass.count(found, pattern) for name, pattern in sass.TENSOR.items()} == {
        "HGMMA": 2, "HMMA": 2, "UTCMMA": 1
    }  # fmt: skip
    assert sass.count(found, r"(?:STL|LDL)\b") == 2 and sass.register_operands(found) == 1
    assert found[0].code[0].operands == ("R96", "R68", "R44", "RZ")


def test_a_loop_may_be_left_by_a_predicated_call():
    found = code(
        ".L_x_1:",
        "HMMA.16816.F32 R8, R40, R44, R8",
        "@!P3 CALL.REL.NOINC `(.L_x_2)",
        "BRA `(.L_x_1)",
        ".L_x_2:",
        "EXIT",
    )
    assert [block.following for block in found] == [[2, 1], [0], []]
    assert sass.loops(found) == [frozenset({0, 1})]


def test_a_stage_is_released_after_the_wait_and_the_meeting_of_all_warps():
    meet, release = "BAR.SYNC.DEFER_BLOCKING 0x0, 0x80", "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6], RZ"
    assert not sass.early_releases(code(f"{SS}, gsb0", WAIT, meet, release, "EXIT"))
    assert not sass.early_releases(code(release, f"{SS}, gsb0", WAIT, "EXIT"))
    for lines in ((release,), (WAIT, release), (meet, WAIT, release), (WAIT.replace("0x0", "0x1"), meet, release)):
        (found,) = sass.early_releases(code(f"{SS}, gsb0", *lines, "EXIT"))
        assert found.endswith("releases what a WGMMA may still read")


def test_code_behind_a_computed_jump_is_seen():
    spin = (".L_x_1:", "NOP", "@!P0 BRA `(.L_x_1)")  # where warps wait for registers, only its own jump leads to it
    found = code("BRX R4", *spin, f"{RS}, gsb0", "MOV R8, R2", ".L_x_2:", SS, "@P0 BRA `(.L_x_2)", "EXIT")
    assert len(sass.hazards(found)) == 1
    assert sorted(len(body) for body in sass.loops(found)) == [1, 1]
