"""Dispatch by low latency: rows go to fixed places in the memory of peers, in one launch.

A CTA copies a row of this rank's to each rank that wants it, its ids and weights to all, tells the CTAs of its number on all ranks
and waits for those of theirs. What the local layer needs of all ids, M blocks and the choice of a config, launches of their own make:
by one CTA of this launch it took 2 us longer for 128 slots, 8 for 512 and 37 for 2048 (two H100, whole layers of Qwen3-30B with and
without).
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import first_row, has_all, meet, next_epoch, owner_of, peer_at
from rampwrap.kernels.triton.pdl import wait_for_launch_before
from rampwrap.kernels.triton.quantise import quantise_groups


@triton.jit
def wants(owners, peer, sound, MASKED: tl.constexpr):
    """Whether a rank gets the row of a token."""
    if MASKED:
        return sound & (tl.max((owners == peer).to(tl.int32), 0) > 0)
    return sound


@triton.jit
def send_words(
    bases_ptr,
    from_ptr,
    at,
    owners,
    sound,
    rank,
    RANKS: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies WORDS int32 of one row to `at` bytes of each rank that wants it, read once; the next rank comes first."""
    for start in tl.static_range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        data = tl.load(from_ptr + word, mask=word < WORDS, other=0)
        for step in tl.static_range(RANKS):
            peer = (rank + 1 + step) % RANKS
            if wants(owners, peer, sound, MASKED):
                tl.store(peer_at(bases_ptr, peer, at, tl.int32) + word, data, mask=word < WORDS)


@triton.jit
def store_scales(bases_ptr, peer, at, group, scale, SCALES: tl.constexpr):
    """Stores scales of one row with a rank; rows of them need not start at multiples of 16 bytes, as `peer_at` has it."""
    to = (tl.load(bases_ptr + peer) + at).to(tl.pointer_type(tl.float32))
    tl.store(to + group, scale, mask=group < SCALES)


@triton.jit
def send_quantised(
    bases_ptr,
    from_ptr,
    rows_at,
    scales_at,
    owners,
    sound,
    rank,
    RANKS: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Quantises one row, a scale for each 128 columns, and stores both with each rank that wants it."""
    scales: tl.constexpr = COLUMNS // 128
    for start in tl.static_range(0, scales, GROUPS):
        group = start + tl.arange(0, GROUPS)
        at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(from_ptr + at, mask=at < COLUMNS, other=0.0).to(tl.float32)
        q, scale = quantise_groups(x, tl.float8e4nv)
        for step in tl.static_range(RANKS):
            peer = (rank + 1 + step) % RANKS
            if wants(owners, peer, sound, MASKED):
                tl.store(peer_at(bases_ptr, peer, rows_at, tl.float8e4nv) + at, q, mask=at < COLUMNS)
                store_scales(bases_ptr, peer, scales_at, group, scale, scales)


@triton.jit
def send_routing(
    bases_ptr,
    ids,
    owners,
    weights,
    ids_at,
    weights_at,
    push_at,
    rank,
    top_k,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Ids and weights of one token, to every rank; and what its push reads, to where no other rank writes (`push_kernel`), in one store."""
    slot = tl.arange(0, SLOTS)
    pairs, pair = tl.join(owners, weights.to(tl.int32, bitcast=True)), 2 * slot[:, None] + tl.arange(0, 2)[None, :]
    ids = tl.where((ids >= 0) & (ids < 0x7FFFFFFF), ids, -1).to(tl.int32)
    for step in tl.static_range(RANKS):
        base = tl.load(bases_ptr + (rank + 1 + step) % RANKS)
        tl.store((base + ids_at).to(tl.pointer_type(tl.int32)) + slot, ids, mask=slot < top_k)
        tl.store((base + weights_at).to(tl.pointer_type(tl.float32)) + slot, weights, mask=slot < top_k)
        tl.store((base + push_at).to(tl.pointer_type(tl.int32)) + pair, pairs, mask=pair < 2 * top_k)


@triton.jit
def send_token(
    bases_ptr,
    x_ptr,
    x_scales_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    rank_of_expert_ptr,
    token,
    row,
    sound,
    rank,
    num_experts,
    RANKS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    QUANTISES: tl.constexpr,
    MASKED: tl.constexpr,
    IDS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    PUSH_AT: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    ROWS_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Row, scales, ids and weights of one token to a row of each rank, where this one is `sound` (`has_all`)."""
    ids, owners = owner_of(topk_ids_ptr, rank_of_expert_ptr, token * TOP_K, num_experts, TOP_K, SLOTS)
    slot = tl.arange(0, SLOTS)
    weights = tl.load(topk_weights_ptr + token * TOP_K + slot, mask=slot < TOP_K, other=0.0).to(tl.float32)
    at, rows_at, scales_at = tl.cast(token, tl.int64), ROWS_AT + row * ROW_BYTES, SCALES_AT + row * (COLUMNS // 32)
    if QUANTISES:
        x_row = x_ptr + at * COLUMNS
        send_quantised(bases_ptr, x_row, rows_at, scales_at, owners, sound, rank, RANKS, MASKED, COLUMNS, GROUPS)
    else:
        words: tl.constexpr = ROW_BYTES // 4
        send_words(bases_ptr, x_ptr + at * words, rows_at, owners, sound, rank, RANKS, MASKED, words, BLOCK)
        if x_scales_ptr is not None:
            scales: tl.constexpr = COLUMNS // 128
            for start in tl.static_range(0, scales, GROUPS):
                group = start + tl.arange(0, GROUPS)
                scale = tl.load(x_scales_ptr + at * scales + group, mask=group < scales)
                for step in tl.static_range(RANKS):
                    peer = (rank + 1 + step) % RANKS
                    if wants(owners, peer, sound, MASKED):
                        store_scales(bases_ptr, peer, scales_at, group, scale, scales)
    behind, push_behind = row * (TOP_K * 4), (rank * MAX_TOKENS + at) * (TOP_K * 8)
    send_routing(
        bases_ptr,
        ids,
        owners,
        weights,
        IDS_AT + behind,
        WEIGHTS_AT + behind,
        PUSH_AT + push_behind,
        rank,
        TOP_K * sound.to(tl.int32),
        RANKS,
        SLOTS,
    )


@triton.jit(
    do_not_specialize=[
        "rank",
        "num_experts",
        "limit_ns",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def dispatch_kernel(
    bases_ptr,
    x_ptr,
    x_scales_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    rank_of_expert_ptr,
    cells_ptr,
    header_ptr,
    fault_ptr,
    rank,
    num_experts,
    limit_ns,
    count_0,
    count_1,
    count_2,
    count_3,
    count_4,
    count_5,
    count_6,
    count_7,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    QUANTISES: tl.constexpr,
    MASKED: tl.constexpr,
    SENDS: tl.constexpr,
    WAITS: tl.constexpr,
    CELLS_AT: tl.constexpr,
    MOST: tl.constexpr,
    IDS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    PUSH_AT: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    ROWS_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As many CTAs as the rank with most tokens needs, up to MOST; they share this rank's, and those beyond them only wait.

    `x_ptr` points at int32 words of rows that are sent as they are, or at bf16 or fp16 that is quantised; `x_scales_ptr`
    at the scales of e4m3 rows. SENDS or WAITS is only off where ranks are emulated one after the other: all send, then
    all wait.
    """
    wait_for_launch_before(PDL)
    epoch, sound = next_epoch(header_ptr), has_all(header_ptr)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    first, num_tokens = first_row(counts, rank, RANKS)
    if SENDS:
        for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
            send_token(
                bases_ptr,
                x_ptr,
                x_scales_ptr,
                topk_ids_ptr,
                topk_weights_ptr,
                rank_of_expert_ptr,
                token,
                tl.cast(first + token, tl.int64),
                sound,
                rank,
                num_experts,
                RANKS,
                TOP_K,
                SLOTS,
                COLUMNS,
                ROW_BYTES,
                QUANTISES,
                MASKED,
                IDS_AT,
                WEIGHTS_AT,
                PUSH_AT,
                MAX_TOKENS,
                ROWS_AT,
                SCALES_AT,
                BLOCK,
                GROUPS,
            )
    meet(
        bases_ptr,
        cells_ptr,
        header_ptr,
        fault_ptr,
        epoch,
        sound,
        counts,
        rank,
        num_tokens,
        limit_ns,
        CELLS_AT,
        RANKS,
        LANES,
        MOST,
        SENDS,
        WAITS,
    )
