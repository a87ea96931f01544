"""The path through shared memory with one rank, whose peers are itself: the interpreter runs its launches one by one."""

import pathlib
import runpy
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.layout import Layout
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.path import Path
from rampwrap.ep.sent import Sent
from rampwrap.ep.symmetric import Symmetric, own_ints
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.ep import host
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.select import host as select

SHAPE = MoEShape(5, 2, 128, 128)


class Quiet:
    """A board without other ranks."""

    def exchange(self, phase: str, line: Any) -> list[Any]:
        return [line]


def made(layout: Layout) -> Symmetric:
    experts = layout.shape.num_experts
    owners = Owners.of([contiguous(experts, 1, 0)], 0, "cpu")
    memory = torch.zeros(layout.bytes, dtype=torch.uint8)
    own = torch.zeros(own_ints(layout, experts), dtype=torch.int32)
    mapped = host.Mapped(
        0,
        1,
        torch.tensor([memory.data_ptr()]),
        layout.views(memory),
        {its.name: its.offset for its in layout.regions},
        torch.zeros(1, dtype=torch.int64),
        owners.rank_of_expert,
        owners.expert_map,
        1.0,
    )
    mapped.begin()
    return Symmetric(mapped, owners, layout, own)


@pytest.mark.skipif(not INTERPRETED.value, reason="without the interpreter this needs several GPUs")
@pytest.mark.parametrize("num_tokens", [0, 6, 40])
def test_steps_follow_each_other(num_tokens: int) -> None:
    """Blocks in the memory that is kept for them, sums in place; and after a reset all begins anew."""
    symmetric = made(Layout(SHAPE, 1, 40, partials="fp32"))
    generator = torch.Generator().manual_seed(num_tokens)
    for step in range(3):
        if step == 2:
            symmetric._mapped.fault.fill_(3 << 32 | 1 << 16 | 1 << 8 | 1)
            assert "rank 0 did not arrive at dispatch of step 3" in str(symmetric.fault())
            symmetric.reset(Quiet())  # type: ignore[arg-type]
            assert symmetric.fault() is None and not symmetric._mapped.views["cells"].any()
        hidden = torch.randn(num_tokens, 128, generator=generator).bfloat16()
        ids = torch.randint(-1, 6, (num_tokens, 2), generator=generator)
        weights = torch.rand(num_tokens, 2, generator=generator)
        path = Path(step == 0, False)
        received = symmetric.dispatch(Sent(hidden, ids, weights, None), (num_tokens,), path, 4)
        wanted = align_tokens(ids.int(), 4, 5)
        assert received.blocks is not None
        rows = int(wanted.num_tokens_post_padded)
        assert int(received.blocks.num_tokens_post_padded) == rows
        assert torch.equal(received.blocks.sorted_token_ids[:rows], wanted.sorted_token_ids[:rows])
        assert torch.equal(received.expert_counts, wanted.expert_counts)
        output = torch.randn(num_tokens, 2, 128, generator=generator)
        partial = received.partial(output, torch.float32)
        out = torch.empty(num_tokens, 128, dtype=torch.bfloat16)
        assert symmetric.combine(output, received, out) is out
        assert torch.equal(out, partial.bfloat16()) and symmetric.fault() is None


@pytest.mark.skipif(not INTERPRETED.value, reason="without the interpreter this needs several GPUs")
def test_the_layer_chooses_by_the_local_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one launch that aligns and selects, with the same choices as the layer alone."""
    helpers = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "dispatch" / "test_graph.py"))
    shape, kernel = helpers["SHAPE"], helpers["Small"]()
    plan = helpers["every"](helpers["small_plan"](kernel))
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    ep = ExpertParallel(None, shape, 16)  # type: ignore[arg-type]
    symmetric = made(ep.layout)
    ep._movers, ep._board, ep._state = (symmetric, symmetric), Quiet(), "idle"  # type: ignore[assignment]
    selected, real = [], select.align_and_select
    monkeypatch.setattr(select, "align_and_select", lambda *its, **more: selected.append(1) or real(*its, **more))
    local, spread = (GraphDispatcher(kernel, plan, max_tokens=16) for _ in range(2))
    for active in (1, 2, 8):
        inputs = kernel.inputs(shape, helpers["ids_with"](active, 12))
        wanted, alone = local(**inputs), len(selected)
        out = ep.layer(spread, **inputs, tokens_per_rank=[12])
        assert torch.equal(out, wanted)
        assert len(selected) - alone == 1
    assert local.counts() == spread.counts() and len(spread.counts()[8]) > 1
