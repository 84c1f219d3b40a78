"""The reader of machine code: loops as they are, whatever the compiler has moved where."""

from __future__ import annotations

from sass import ahead, innermost, instructions, loops, shortest_turn


def code(text: str) -> str:
    """Lines, one each 16 bytes, as cuobjdump prints them; an empty line is left out, with its address."""
    lines = [line.strip() for line in text.strip("\n").splitlines()]
    return "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */" for i, line in enumerate(lines) if line)


NESTED = """
    MOV R1, c[0x0][0x28]
    S2R R0, SR_TID.X
    IADD3 R2, R2, 0x1, RZ
    LDSM.16.M88.4 R4, [R2]
    HMMA.16816.F32.BF16 R8, R4, R12, R8
    @!P0 BRA 0xa0
    ISETP.GE.AND P1, PT, R2, R3, PT
    @!P1 BRA 0x30
    @P2 BRA 0x20
    EXIT
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R17
    @!P0 BRA 0xa0
    BRA 0x60
    BRA 0xd0
"""


def test_loops_are_found_with_what_lies_behind_the_end() -> None:
    """A wait that the compiler moved behind EXIT is of the loop that jumps there; the trap at the end of all code is none's."""
    found = loops(instructions(code(NESTED)))
    addresses = [[i.address // 16 for i in loop] for loop in found]
    assert addresses == [[13], [10, 11], [3, 4, 5, 6, 7, 10, 11, 12], [2, 3, 4, 5, 6, 7, 8, 10, 11, 12]]


def test_the_innermost_loop_with_an_instruction() -> None:
    (only,) = innermost(loops(instructions(code(NESTED))), "HMMA")
    assert [i.address // 16 for i in only] == [3, 4, 5, 6, 7, 10, 11, 12]
    assert innermost(loops(instructions(code(NESTED))), "MUFU") == []


def test_a_jump_back_into_the_middle_of_what_is_no_loop() -> None:
    """From code behind the end to a place that is reached without it: no loop, though the jump goes back."""
    assert loops(instructions(code("MOV R1, R2\n@P0 BRA 0x40\nMOV R3, R4\nEXIT\nMOV R3, R5\nBRA 0x30"))) == []


def test_cases_of_a_switch_are_reached_though_nothing_names_them() -> None:
    text = "BRX R16 -0x10\nMOV R1, R2\n@P0 BRA 0x10\nEXIT\nIADD3 R1, R1, R2, RZ\n@!P1 BRA 0x40\nEXIT"
    assert [[i.address // 16 for i in loop] for loop in loops(instructions(code(text)))] == [[1, 2], [4, 5]]


def test_a_case_begins_where_no_jump_goes() -> None:
    """Its loop comes before it in the code; the place that jumps go to in there is not where the case begins."""
    text = "BRX R16 -0x10\nMOV R1, R2\nIADD3 R1, R1, R2, RZ\n@!P1 BRA 0x10\nEXIT\nMOV R3, R4\nBRA 0x20"
    (loop,) = loops(instructions(code(text)))
    assert [i.address // 16 for i in loop] == [1, 2, 3]


def test_calls_come_back_and_conditions_fall_through() -> None:
    """Of `BRA P1, 0x0` and `BRA.DIV UR4, 0x0` the condition is an operand."""
    text = "MOV R1, R2\nCALL.REL.NOINC 0x60\n@P0 EXIT\nBRA P1, 0x0\nBRA.DIV UR4, 0x0\nEXIT\nRET.REL.NODEC R2 0x0"
    assert [[i.address // 16 for i in loop] for loop in loops(instructions(code(text)))] == [[0, 1, 2, 3, 4]]


def test_labels_are_as_good_as_addresses() -> None:
    text = (
        ".L_x_1:\n        /*0000*/  @P0 LDS R1, [R2] ;\n        /*0010*/  @P1 BRA `(.L_x_1) ;\n        /*0020*/  EXIT ;"
    )
    first, jump, _ = instructions(text)
    assert (first.predicate, first.name, first.operands, jump.target) == ("@P0", "LDS", "R1, [R2]", 0)
    assert [len(loop) for loop in loops([first, jump])] == [2]


def test_registers() -> None:
    text = """
        HMMA.16816.F32.BF16 R8, R4, R12, R16
        LDSM.16.M88.4 R4, [R2+UR4]
        LDSM.16.M88 R4, [R2]
        LDS.128 R20, [R2]
        LDS.64 R20, [R2]
        STS.128 [R2], R4
        STAS.64 [R2.64], R6
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R17
        IMAD.MOV.U32 R3, RZ, RZ, R5.reuse
        HMMA.16816.F32.BF16 R8, R4, R12, RZ
        CS2R R86, SRZ
    """
    got = [(sorted(i.written), sorted(i.read)) for i in instructions(code(text.strip()))]
    assert got == [
        ([8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 16, 17, 18, 19]),
        ([4, 5, 6, 7], [2]),
        ([4], [2]),
        ([20, 21, 22, 23], [2]),
        ([20, 21], [2]),
        ([], [2, 4]),
        ([], [2, 6]),
        ([], [2, 17]),
        ([3], [5]),
        ([8, 9, 10, 11], [4, 5, 6, 7, 12, 13]),
        ([86, 87], []),
    ]


def test_the_shortest_turn_leaves_out_what_is_jumped_over() -> None:
    everything = instructions(code(NESTED))
    (loop,) = innermost(loops(everything), "HMMA")
    assert [i.address // 16 for i in shortest_turn(everything, loop, "HMMA")] == [3, 4, 5, 6, 7]
    text = "LDS R1, [R2]\n@P0 BRA 0x40\nMOV R3, R4\nMOV R3, R5\nHMMA.16816.F32.BF16 R8, R4, R12, R8\n@P1 BRA 0x0\nEXIT"
    everything = instructions(code(text))
    (loop,) = loops(everything)
    assert [i.address // 16 for i in loop] == [0, 1, 2, 3, 4, 5]
    assert [i.address // 16 for i in shortest_turn(everything, loop, "HMMA")] == [4, 5, 0, 1]


LATE = "LDS.128 R4, [R2]\nLDSM.16.M88.4 R12, [R3]\nHMMA.16816.F32.BF16 R8, R4, R12, R8\n@P0 BRA 0x0"
EARLY = """
    LDS.128 R20, [R2]
    LDSM.16.M88.4 R12, [R3]
    HMMA.16816.F32.BF16 R8, R4, R12, R8
    HMMA.16816.F32.BF16 R8, R4, R14, R8
    IMAD.MOV.U32 R4, RZ, RZ, R20
    @P0 BRA 0x0
"""
CONVERTED = """
    LDS.128 R20, [R2]
    @!P2 BRA 0x40
    LOP3.LUT R22, R21, 0xff, RZ, 0xc0, !PT
    FMUL R23, R22, 2
    HMMA.16816.F32.BF16 R8, R4, R12, R8
    MOV R5, R23
    @P0 BRA 0x0
"""
TWO_IN_TURN = """
    LDS.128 R20, [R2]
    HMMA.16816.F32.BF16 R8, R4, R12, R8
    LDS.128 R4, [R3]
    HMMA.16816.F32.BF16 R8, R20, R12, R8
    @P0 BRA 0x0
"""


def test_how_far_a_load_is_ahead_of_its_product() -> None:
    def counts(text: str) -> list[int]:
        (loop,) = innermost(loops(instructions(code(text))), "HMMA")
        return [ahead(loop, i) for i in loop if i.base in ("LDS", "LDSM")]

    assert counts(LATE) == [0, 0], "for the product behind it"
    assert counts(EARLY) == [2, 0], "for the next turn's, by a move"
    assert counts(CONVERTED) == [1], "through arithmetic"
    assert counts(TWO_IN_TURN) == [1, 1], "turned about"
