"""PTX instructions that only the ragged form needs: sums and marks that CTAs leave each other in global memory; addresses as in `ptx`."""

# The DSL traces these functions: their arguments are its own value classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from rampwrap.kernels.cute.device.ptx import memory_asm

MOST_ASKED = 1 << 26
"Loads of a mark, each about a microsecond, before it counts as lost."


@dsl_user_op
def store_four(address, values, *, loc=None, ip=None):
    """Stores four float32 at an address aligned to 16 bytes."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *(Float32(value).ir_value(loc=loc, ip=ip) for value in values)]
    memory_asm(None, operands, "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f", loc, ip)


@dsl_user_op
def load_four(address, *, loc=None, ip=None):
    """Four float32 from an address aligned to 16 bytes, past L1, which other SMs' stores do not reach."""
    kind = llvm.StructType.get_literal([T.f32()] * 4)
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    found = memory_asm(kind, operands, "ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), found, [place], loc=loc, ip=ip)) for place in range(4)]


@dsl_user_op
def publish(address, value, *, loc=None, ip=None):
    """Stores an Int32 other than zero for `await_mark`.

    All that this thread wrote is visible to who sees it there, and all that it knows of, as what other threads of its CTA
    wrote before a barrier that they shared.
    """
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    memory_asm(None, operands, "st.release.gpu.global.s32 [$0], $1;", "l,r", loc, ip)


@dsl_user_op
def await_mark(address, *, loc=None, ip=None):
    """The Int32 at an address as soon as it is not zero.

    Who is waited for has it to give at the beginning of its work: after a minute it is not coming, and the kernel ends with an error
    instead of hanging.
    """
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    text = (
        "{ .reg .pred some, more; .reg .b32 asked; mov.b32 asked, 0; "
        "again: ld.acquire.gpu.global.s32 $0, [$1]; setp.ne.s32 some, $0, 0; @some bra found; "
        f"add.u32 asked, asked, 1; setp.lt.u32 more, asked, {MOST_ASKED}; @more bra again; trap; found: }}"
    )
    return Int32(memory_asm(T.i32(), operands, text, "=r,l", loc, ip))


@dsl_user_op
def clear_mark(address, *, loc=None, ip=None):
    """Stores a zero."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    memory_asm(
        None, operands, "{ .reg .b32 zero; mov.b32 zero, 0; st.relaxed.gpu.global.s32 [$0], zero; }", "l", loc, ip
    )
