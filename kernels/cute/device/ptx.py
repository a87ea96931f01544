"""PTX instructions that the DSL has no operation for, or for which an address in a register is simpler than a tensor.

Addresses of global memory are Int64, of shared memory Int32, both in bytes.
"""

# The DSL traces these functions: their arguments are its own value classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


def _asm(result, operands, text, constraints, loc, ip, *, side_effects=True):
    return llvm.inline_asm(
        result,
        operands,
        text,
        constraints,
        has_side_effects=side_effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def memory_asm(result, operands, text, constraints, loc, ip):
    """An instruction that reads or writes memory which the compiler does not know of; nothing is moved across it."""
    return _asm(result, operands, text, constraints + ",~{memory}", loc, ip)


@dsl_user_op
def copy_16_bytes(shared, offset, base, row, row_bytes, *, loc=None, ip=None):
    """Starts a copy of 16 aligned bytes at base + row * row_bytes to shared + offset, past L1; nothing if row < 0.

    One block of PTX, so that each copy is three instructions without a branch; `offset` is a Python number.
    """
    _copy(shared, offset, base, row, row_bytes, "cg", 16, loc, ip)


@dsl_user_op
def copy_4_bytes(shared, offset, base, row, row_bytes, *, loc=None, ip=None):
    """As `copy_16_bytes`, 4 bytes by way of L1."""
    _copy(shared, offset, base, row, row_bytes, "ca", 4, loc, ip)


def _copy(shared, offset, base, row, row_bytes, cache, num_bytes, loc, ip):
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip),
        Int64(base).ir_value(loc=loc, ip=ip),
        Int32(row).ir_value(loc=loc, ip=ip),
        Int32(row_bytes).ir_value(loc=loc, ip=ip),
    ]
    text = (
        "{ .reg .pred some; .reg .s64 from; setp.ge.s32 some, $2, 0; mad.wide.s32 from, $2, $3, $1; "
        f"@some cp.async.{cache}.shared.global [$0+{offset}], [from], {num_bytes}; }}"
    )
    _asm(None, operands, text, "r,l,r,r,~{memory}", loc, ip)


@dsl_user_op
def copy_16(shared, offset, source, *, loc=None, ip=None):
    """Starts a copy of 16 aligned bytes from the address `source` to shared + offset, past L1; nothing if it is negative.

    `offset` is a Python number.
    """
    _copy_from(shared, offset, source, "cg", 16, loc, ip)


@dsl_user_op
def copy_4(shared, offset, source, *, loc=None, ip=None):
    """As `copy_16`, 4 bytes by way of L1."""
    _copy_from(shared, offset, source, "ca", 4, loc, ip)


def _copy_from(shared, offset, source, cache, num_bytes, loc, ip):
    operands = [Int32(shared).ir_value(loc=loc, ip=ip), Int64(source).ir_value(loc=loc, ip=ip)]
    # The upper half of an address has its sign: one comparison instead of two.
    text = (
        "{ .reg .pred some; .reg .b32 low, high; mov.b64 {low, high}, $1; setp.ge.s32 some, high, 0; "
        f"@some cp.async.{cache}.shared.global [$0+{offset}], [$1], {num_bytes}; }}"
    )
    _asm(None, operands, text, "r,l,~{memory}", loc, ip)


@dsl_user_op
def load_i32(base, index, *, loc=None, ip=None):
    """The Int32 at base + 4 index, loaded where it is written: the compiler moves other loads to where they are waited for."""
    operands = [Int64(base).ir_value(loc=loc, ip=ip), Int32(index).ir_value(loc=loc, ip=ip)]
    text = "{ .reg .s64 from; mad.wide.s32 from, $2, 4, $1; ld.global.s32 $0, [from]; }"
    return Int32(_asm(T.i32(), operands, text, "=r,l,r,~{memory}", loc, ip))


@dsl_user_op
def load_f32(base, index, *, loc=None, ip=None):
    """As `load_i32`, a float32."""
    operands = [Int64(base).ir_value(loc=loc, ip=ip), Int32(index).ir_value(loc=loc, ip=ip)]
    text = "{ .reg .s64 from; mad.wide.s32 from, $2, 4, $1; ld.global.f32 $0, [from]; }"
    return Float32(_asm(T.f32(), operands, text, "=f,l,r,~{memory}", loc, ip))


@dsl_user_op
def copy_bulk(shared, source, num_bytes, barrier, *, loc=None, ip=None):
    """Starts a copy of `num_bytes`, a multiple of 16, that count on a barrier; one thread calls it."""
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip),
        Int64(source).ir_value(loc=loc, ip=ip),
        Int32(num_bytes).ir_value(loc=loc, ip=ip),
        Int32(barrier).ir_value(loc=loc, ip=ip),
    ]
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    _asm(None, operands, text, "r,l,r,r,~{memory}", loc, ip)


@dsl_user_op
def copy_box(shared, descriptor, at, barrier, *, loc=None, ip=None):
    """Starts the TMA's copy of a box of five dimensions at the coordinates `at`, innermost first; one thread calls it."""
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip),
        Int64(descriptor).ir_value(loc=loc, ip=ip),
        *(Int32(place).ir_value(loc=loc, ip=ip) for place in at),
        Int32(barrier).ir_value(loc=loc, ip=ip),
    ]
    text = (
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[$0], [$1, {$2, $3, $4, $5, $6}], [$7];"
    )
    _asm(None, operands, text, "r,l,r,r,r,r,r,r,~{memory}", loc, ip)


@dsl_user_op
def prefetch_descriptor(descriptor, *, loc=None, ip=None):
    """Brings a TMA descriptor, a constant of the launch, near."""
    _asm(None, [Int64(descriptor).ir_value(loc=loc, ip=ip)], "prefetch.tensormap [$0];", "l,~{memory}", loc, ip)


@dsl_user_op
def pack_e4m3(low, high, *, loc=None, ip=None):
    """Two float32 as saturated e4m3 in the low 16 bits of an Int32."""
    operands = [Float32(value).ir_value(loc=loc, ip=ip) for value in (low, high)]
    text = "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; cvt.u32.u16 $0, pair; }"
    return Int32(_asm(T.i32(), operands, text, "=r,f,f", loc, ip, side_effects=False))


@dsl_user_op
def pack_bf16(low, high, *, loc=None, ip=None):
    """Two float32 as bf16 in an Int32."""
    operands = [Float32(value).ir_value(loc=loc, ip=ip) for value in (low, high)]
    return Int32(_asm(T.i32(), operands, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", loc, ip, side_effects=False))


@dsl_user_op
def store_row(base, row, row_bytes, words, num_bytes, *, loc=None, ip=None):
    """Stores the low `num_bytes` (1, 2, 4, 8 or 16) of Int32 `words` at base + row * row_bytes; nothing if row < 0.

    One block of PTX without a branch, like `copy_16_bytes`: a branch for each row keeps the loads of the next one behind
    it, which made the epilogue of 128 rows 6000 clocks.
    """
    operands = [
        Int64(base).ir_value(loc=loc, ip=ip),
        Int32(row).ir_value(loc=loc, ip=ip),
        Int32(row_bytes).ir_value(loc=loc, ip=ip),
        *(Int32(word).ir_value(loc=loc, ip=ip) for word in words),
    ]
    half = ""
    if num_bytes < 4:
        kind, values = {1: "u8", 2: "u16"}[num_bytes], "half"
        half = ".reg .b16 half; cvt.u16.u32 half, $3; "
    else:
        names = [f"${place + 3}" for place in range(num_bytes // 4)]
        kind = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[num_bytes]
        values = names[0] if num_bytes == 4 else "{" + ", ".join(names) + "}"
    text = (
        "{ .reg .pred some; .reg .s64 to; " + half + "setp.ge.s32 some, $1, 0; mad.wide.s32 to, $1, $2, $0; "
        f"@some st.global.{kind} [to], {values}; }}"
    )
    _asm(None, operands, text, "l,r,r," + ",".join("r" * len(words)) + ",~{memory}", loc, ip)


@dsl_user_op
def peer_address(shared, rank, *, loc=None, ip=None):
    """Where a shared address of this CTA lies in CTA `rank` of its cluster."""
    operands = [Int32(shared).ir_value(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operands, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", loc, ip, side_effects=False))


@dsl_user_op
def store_peer(address, value, *, loc=None, ip=None):
    """Stores a float32 in shared memory of any CTA of the cluster."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "st.shared::cluster.f32 [$0], $1;", "r,f,~{memory}", loc, ip)


@dsl_user_op
def arrive_peer(address, *, loc=None, ip=None):
    """Arrives at an mbarrier of any CTA of the cluster; what this thread stored before is visible to who waits."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    text = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [$0];"
    _asm(None, operands, text, "r,~{memory}", loc, ip)


@dsl_user_op
def store_global_f32(address, value, *, loc=None, ip=None):
    """Stores a float32 at an aligned address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "st.global.f32 [$0], $1;", "l,f,~{memory}", loc, ip)


@dsl_user_op
def store_f32_if(address, value, some, *, loc=None, ip=None):
    """Stores a float32 at an aligned address where `some`, without a branch."""
    operands = [
        Int64(address).ir_value(loc=loc, ip=ip),
        Float32(value).ir_value(loc=loc, ip=ip),
        Int32(some).ir_value(loc=loc, ip=ip),
    ]
    text = "{ .reg .pred some; setp.ne.s32 some, $2, 0; @some st.global.f32 [$0], $1; }"
    _asm(None, operands, text, "l,f,r,~{memory}", loc, ip)


def pack_words(values, fp8):
    """Float32 values as consecutive e4m3 or bf16 in Int32 words; fewer than fill a word leave its upper part zero."""
    if not fp8:
        values = [*values, Float32(0.0)] if len(values) % 2 else values
        return [pack_bf16(low, high) for low, high in zip(values[::2], values[1::2], strict=True)]
    values = [*values, Float32(0.0)] if len(values) % 2 else values
    halves = [pack_e4m3(low, high) for low, high in zip(values[::2], values[1::2], strict=True)]
    if len(halves) == 1:
        return halves
    return [low | (high << 16) for low, high in zip(halves[::2], halves[1::2], strict=True)]
