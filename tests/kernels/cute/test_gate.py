"""What a compiled kernel must look like, kernel by kernel of what may be wrong with it."""

import struct

import attrs
import pytest

from rampwrap.errors import InputError
from rampwrap.kernels.cute.build.gate import Inspection, cubin, inspect, why_unfit
from rampwrap.kernels.cute.configs import CuteConfig, Variant

UP = Variant("up", CuteConfig("two", "fp8", 40, 32, 4, 4))
GOOD = Inspection(168, 0, {"USETMAXREG": 2, "QGMMA.64x40x32": 12})


def test_what_is_good() -> None:
    assert why_unfit(GOOD, UP) is None and GOOD.instructions["USETMAXREG"] == 2
    bf16 = Variant("up", CuteConfig("two", "bf16", 40, 32, 4, 4))
    assert why_unfit(Inspection(168, 0, {"USETMAXREG": 2, "HGMMA.64x40x16": 12}), bf16) is None
    prefill = Variant("prefill_up", CuteConfig("prefill", "fp8", 128, 256, 8, 4))
    assert why_unfit(Inspection(168, 0, {"USETMAXREG": 2, "QGMMA.64x128x32": 1}), prefill) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack_bytes": 8}, "It spills: 0 stores to local memory and 8 bytes of stack"),
        ({"instructions": {**GOOD.instructions, "STL": 3}}, "It spills: 3 stores"),
        ({"instructions": {**GOOD.instructions, "LDL": 1}}, "It spills: 0 stores"),
        ({"instructions": {"QGMMA.64x40x32": 12}}, "two USETMAXREG"),
        ({"instructions": {**GOOD.instructions, "USETMAXREG": 1}}, "two USETMAXREG"),
        ({"instructions": {**GOOD.instructions, "USETMAXREG": 3}}, "two USETMAXREG"),
        ({"instructions": {"USETMAXREG": 2}}, "multiplies with no tensor core where QGMMA.64x40x32 alone"),
        ({"instructions": {"USETMAXREG": 2, "QGMMA.64x48x32": 1}}, "with QGMMA.64x48x32 where QGMMA.64x40x32 alone"),
        ({"instructions": {**GOOD.instructions, "HGMMA.64x40x16": 1}}, "multiplies with HGMMA.64x40x16 where"),
        ({"registers": 257}, "257 registers for each of 256 threads"),
    ],
)  # fmt: skip
def test_what_is_not(change: dict[str, object], said: str) -> None:
    assert said in str(why_unfit(attrs.evolve(GOOD, **change), UP))
    assert why_unfit(attrs.evolve(GOOD, registers=256), UP) is None, "65,536 of 256 threads"


def image(machine: int = 190, sections: list[tuple[str, bytes]] | None = None) -> bytes:
    """An ELF file of these sections, with two programs' headers at its end."""
    sections = [("", b""), *(sections or []), (".shstrtab", b"")]
    names = b"".join(name.encode() + b"\0" for name, _ in sections)
    sections[-1] = (".shstrtab", names)
    body, headers, at = b"", b"", 0
    for name, data in sections:
        headers += struct.pack("<IIQQQQ", at, 1, 0, 0, 64 + len(body), len(data)).ljust(64, b"\0")
        body, at = body + data, at + len(name) + 1
    start = 64 + len(body)
    programs = start + len(headers)
    head = b"\x7fELF".ljust(18, b"\0") + struct.pack("<H", machine) + b"\0" * 12
    head += struct.pack("<QQ", programs, start) + b"\0" * 6
    head += struct.pack("<HHHHH", 56, 2, 64, len(sections), len(sections) - 1)
    return head + body + headers + b"P" * 112


def attribute(number: int, value: int, kind: int = 4) -> bytes:
    return struct.pack("<BBHII", kind, number, 8, 7, value)


def instruction(opcode: int, columns: int = 8) -> bytes:
    return struct.pack("<QQ", opcode | 5 << 12 | (columns // 8 - 1) << 53 | 1 << 58, 0x387)


def test_the_one_gpu_image_of_an_object_file() -> None:
    """Whole, wherever it lies; images of other machines are passed over."""
    gpu, host = image(), image(machine=62)
    assert cubin(b"host" + host + b"...." + gpu + b"rest") == gpu
    assert cubin(host + gpu) == gpu, "the file's own header stands at its start"
    for odd, count in ((host, 0), (b"x" + gpu + gpu, 2), (b"x" + gpu[:40], 0)):
        with pytest.raises(InputError, match=f"holds {count} GPU images, not one"):
            cubin(odd)


def test_registers_stack_and_instructions_are_read() -> None:
    """The most of several kernels and entries; values of other kinds and lengths are skipped."""
    info = attribute(0x2F, 100) + attribute(0x11, 8) + struct.pack("<BBH", 3, 0x11, 99)
    info += struct.pack("<BBHI", 4, 0x11, 4, 77) + attribute(0x2F, 168) + attribute(0x2F, 90)
    text = b"".join(map(instruction, (0x387, 0x387, 0x983, 0x9C8, 0x9C8, 0x123)))
    text += instruction(0x9F3, 40) + instruction(0x9F3, 40) + instruction(0x9F3, 256) + instruction(0x9F0, 8)
    found = inspect(
        image(
            sections=[
                (".nv.info", info),
                (".text.kernel", text),
                (".nv.info.kernel", attribute(0x11, 5)),
                (".data", text),
            ]
        )
    )
    assert (found.registers, found.stack_bytes) == (168, 8)
    assert list(found.instructions.items()) == [
        *(
            ("HGMMA.64x8x16", 1),
            ("LDL", 1),
            ("QGMMA.64x256x32", 1),
            ("QGMMA.64x40x32", 2),
            ("STL", 2),
            ("USETMAXREG", 2),
        )
    ]
    with pytest.raises(InputError, match="holds no kernel"):
        inspect(image(sections=[(".text.kernel", text)]))
