"""PTX instructions that only the one-launch form needs; addresses as in `ptx`."""

# The DSL traces these functions: their arguments are its own value classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from cutlass import Float32, Int32, Int64
from cutlass.cutlass_dsl import dsl_user_op

from rampwrap.kernels.cute.device.ptx import memory_asm


@dsl_user_op
def store_shared(address, words, num_bytes, *, loc=None, ip=None):
    """Stores the low `num_bytes` (1, 2, 4 or 8, a constant) of a list of Int32 at an address aligned to them."""
    values = [Int32(word).ir_value(loc=loc, ip=ip) for word in words]
    operands = [Int32(address).ir_value(loc=loc, ip=ip), *values]
    text = {
        1: "{ .reg .b16 half; cvt.u16.u32 half, $1; st.shared::cta.u8 [$0], half; }",
        2: "{ .reg .b16 half; cvt.u16.u32 half, $1; st.shared::cta.u16 [$0], half; }",
        4: "st.shared::cta.b32 [$0], $1;",
        8: "st.shared::cta.v2.b32 [$0], {$1, $2};",
    }[num_bytes]
    memory_asm(None, operands, text, ",".join("r" * len(operands)), loc, ip)


@dsl_user_op
def send_b32(address, word, barrier, *, loc=None, ip=None):
    """Starts a store of an Int32 in shared memory of any CTA of the cluster; its 4 bytes count on a barrier there.

    Who waits for the barrier sees it: unlike a store and an arrival, this needs no fence, which takes a microsecond.
    """
    operands = [Int32(value).ir_value(loc=loc, ip=ip) for value in (address, word, barrier)]
    text = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [$0], $1, [$2];"
    memory_asm(None, operands, text, "r,r,r", loc, ip)


@dsl_user_op
def send_f32(address, value, barrier, *, loc=None, ip=None):
    """`send_b32` of a float32."""
    operands = [
        Int32(address).ir_value(loc=loc, ip=ip),
        Float32(value).ir_value(loc=loc, ip=ip),
        Int32(barrier).ir_value(loc=loc, ip=ip),
    ]
    text = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [$0], $1, [$2];"
    memory_asm(None, operands, text, "r,f,r", loc, ip)


@dsl_user_op
def arrive_peer(address, *, loc=None, ip=None):
    """Arrives at an mbarrier of any CTA of the cluster: what this thread read before may be overwritten there."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    memory_asm(None, operands, "mbarrier.arrive.shared::cluster.b64 _, [$0];", "r", loc, ip)


@dsl_user_op
def add_row(base, row, row_bytes, values, *, loc=None, ip=None):
    """Adds 2 or 4 float32 to global memory at base + row * row_bytes, aligned to all of them, each atomically; nothing
    if row < 0. Returns at once, and without a branch, as `ptx.store_row`."""
    operands = [
        Int64(base).ir_value(loc=loc, ip=ip),
        Int32(row).ir_value(loc=loc, ip=ip),
        Int32(row_bytes).ir_value(loc=loc, ip=ip),
        *(Float32(value).ir_value(loc=loc, ip=ip) for value in values),
    ]
    names = ", ".join(f"${place + 3}" for place in range(len(values)))
    text = (
        "{ .reg .pred some; .reg .s64 to; setp.ge.s32 some, $1, 0; mad.wide.s32 to, $1, $2, $0; "
        f"@some red.relaxed.gpu.global.add.v{len(values)}.f32 [to], {{{names}}}; }}"
    )
    memory_asm(None, operands, text, ",".join(["l", "r", "r", *"f" * len(values)]), loc, ip)
