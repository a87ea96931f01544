"""What a compiled kernel must look like before it is linked: its GPU code, read out of the object file.

ptxas reports neither spilled registers nor a dropped setmaxnreg as an error, and a kernel with either runs right but
slowly. The instructions are counted from their encoding, in a millisecond; tests count the same from the text of
nvdisasm, 300 ms a kernel.
"""

import struct
from collections import Counter
from collections.abc import Mapping

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernels.cute.configs import STREAMS, Variant

EM_CUDA = 190
"ELF machine number of GPU code."
EIATTR_FRAME_SIZE = 0x11
EIATTR_REGCOUNT = 0x2F

# sm_90 instructions are 16 bytes; the low 12 bits name the operation (nvdisasm -hex prints both).
OPCODES = {0x387: "STL", 0x983: "LDL", 0x9C8: "USETMAXREG", 0x9F0: "HGMMA", 0x9F3: "QGMMA"}
GMMA_K = {"HGMMA": 16, "QGMMA": 32}
GMMA_N_BIT = 53
"A GMMA holds N / 8 - 1 in five bits from here."


@attrs.frozen
class Inspection:
    """What matters of one compiled kernel."""

    registers: int
    "Of a thread at launch, before setmaxnreg."
    stack_bytes: int
    "Of a thread; spilled registers live there."
    instructions: Mapping[str, int]
    "How often each of `OPCODES` occurs; a GMMA by shape, such as QGMMA.64x16x32."


def cubin(obj: bytes) -> bytes:
    """The one GPU ELF image inside an object file of the CuTe DSL.

    Raises:
        InputError: there is none, or more than one.
    """
    found = []
    at = 0
    while (at := obj.find(b"\x7fELF", at + 1)) > 0:
        if len(obj) < at + 64 or struct.unpack_from("<H", obj, at + 18)[0] != EM_CUDA:
            continue
        programs, sections = struct.unpack_from("<QQ", obj, at + 32)
        size, count, section_size, section_count = struct.unpack_from("<HHHH", obj, at + 54)
        found.append(obj[at : at + max(programs + size * count, sections + section_size * section_count)])
    if len(found) != 1:
        raise InputError(f"the object file holds {len(found)} GPU images, not one; build it again.")
    return found[0]


def inspect(image: bytes) -> Inspection:
    """Reads a cubin.

    Args:
        image: from `cubin`.

    Raises:
        InputError: it holds no kernel.
    """
    counts: Counter[str] = Counter()
    registers = stack = 0
    for name, data in _sections(image):
        if name.startswith(".text."):
            counts.update(_instructions(data))
        elif name.startswith(".nv.info"):
            attributes = _attributes(data)
            registers = max(registers, attributes.get(EIATTR_REGCOUNT, 0))
            stack = max(stack, attributes.get(EIATTR_FRAME_SIZE, 0))
    if not registers:
        raise InputError("the GPU image holds no kernel; build it again.")
    return Inspection(registers, stack, dict(sorted(counts.items())))


def _sections(image: bytes) -> list[tuple[str, bytes]]:
    start = struct.unpack_from("<Q", image, 40)[0]
    size, count, names = struct.unpack_from("<HHH", image, 58)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<IIQQQQ", image, start + index * size) for index in range(count)]
    texts = headers[names][4]
    found = []
    for header in headers:
        begin = texts + header[0]
        name = image[begin : image.index(b"\0", begin)].decode()
        found.append((name, image[header[4] : header[4] + header[5]]))
    return found


def _instructions(text: bytes) -> Counter[str]:
    words: npt.NDArray[np.uint64] = np.frombuffer(text, dtype="<u8")[::2]
    codes = words & np.uint64(0xFFF)
    counts: Counter[str] = Counter()
    for code, name in OPCODES.items():
        mine = words[codes == code]
        if name in GMMA_K:
            sizes = ((mine >> np.uint64(GMMA_N_BIT)) & np.uint64(31)).astype(np.int64) * 8 + 8
            counts.update(f"{name}.64x{n}x{GMMA_K[name]}" for n in sizes.tolist())
        elif len(mine):
            counts[name] = len(mine)
    return counts


def _attributes(data: bytes) -> dict[int, int]:
    """The 4-byte values of a .nv.info section that come with a symbol: (kind 4, number, 8 bytes, symbol, value)."""
    found: dict[int, int] = {}
    at = 0
    while at + 4 <= len(data):
        kind, number, size = struct.unpack_from("<BBH", data, at)
        if kind == 4:
            if size == 8:
                found[number] = max(found.get(number, 0), struct.unpack_from("<I", data, at + 8)[0])
            at += size
        at += 4
    return found


def why_unfit(found: Inspection, variant: Variant) -> str | None:
    """Why a compiled variant must not be linked, in a sentence; None if it may be."""
    counts, config = dict(found.instructions), variant.config
    if found.stack_bytes or counts.get("STL", 0) or counts.get("LDL", 0):
        return (
            f"It spills: {counts.get('STL', 0)} stores to local memory and {found.stack_bytes} bytes of stack a thread; "
            "use a smaller block_m or block_n."
        )
    if variant in STREAMS:
        return None  # it has no consumers
    if counts.pop("USETMAXREG", 0) != 2:
        return "It does not hand registers from producers to consumers (two USETMAXREG); set min_blocks_per_mp."
    name = "QGMMA" if config.dtype == "fp8" else "HGMMA"
    wanted = {f"{name}.64x{columns}x{GMMA_K[name]}" for columns in config.product_columns}
    if set(counts) != wanted:
        others = sorted(set(counts) - wanted)
        return (
            f"It multiplies with {', '.join(others) or 'no tensor core'} where {', '.join(sorted(wanted))} alone "
            f"{'is' if len(wanted) == 1 else 'are'} expected; correct the kernel."
        )
    if found.registers * config.threads > 65_536:
        return f"It starts with {found.registers} registers for each of {config.threads} threads, an SM has 65536; use fewer warps."
    return None
