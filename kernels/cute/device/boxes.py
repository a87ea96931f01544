"""Descriptors of the boxes of weights that the TMA copies.

A box has 128 bytes of each of its rows, which lie kilobytes apart; the next step asks for the 128 behind them. Memory reads faster where it is
asked for 256 bytes of a row at a time: on an H100 boxes of 256 rows reach 2.83 TB/s, and 2.99 where the descriptor tells L2 to fetch 256
(its L2 promotion; `benchmarks/boxes.cu`), as fast as bytes in order. Where several CTAs read the same weights, L2 is what bounds them, and
fetching ahead costs 2-7 %. So the launch says which (`host.launch`). The DSL's TMA atoms cannot be told: descriptor and instruction
(`ptx.copy_box`) are made here.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from cutlass import Int32, Int64
from cutlass.experimental.cuda import TensorMapSwizzle, create_tensor_map_tiled

STRIDE_UNIT = 16
"Bytes in which descriptors count strides."


def describe(weights, extents, row_strides, box, l2_fetch):
    """The descriptor of a view of weights, innermost dimension first: their K, then dimensions with strides in rows.

    `box` has the elements of a box along each, 128 bytes along K; it lies in shared memory row by row, in the 128-byte swizzle. `l2_fetch`:
    bytes of a row that L2 fetches at once, 128 or 256, a number of the launch.
    """
    row = Int64(extents[0]) * (weights.element_type.width // 8) // STRIDE_UNIT
    return create_tensor_map_tiled(
        global_address=weights.iterator.toint(),
        dtype=weights.element_type,
        global_dims=[Int32(extent) for extent in extents],
        global_strides=[row * stride for stride in row_strides],
        box_dims=box,
        swizzle=TensorMapSwizzle.s128b,
        l2_promotion=l2_fetch // 128 + 1,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B is 2, ..._256B is 3
    )
