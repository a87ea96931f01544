"""What `test_vllm_gather` runs in a process of its own: the manager of one release of vLLM under ours, on a CPU, with one rank.

python vllm_gather_classes.py FOLDER VERSION
"""

import importlib
import pathlib
import sys
import types

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ep")]
import alone

NAME = "vllm.distributed.device_communicators"
alone.install(pathlib.Path(sys.argv[1]), {f"{NAME}.all2all", f"{NAME}.base_device_communicator"})

import test_gathered as gathered
import torch

from rampwrap.engines import vllm_gather as plugin
from rampwrap.ep.gathered import Gathered


class Group:
    """One rank: gathers what it has, and says how often it was asked."""

    rank_in_group, world_size, device_communicator = 0, 1, None

    def __init__(self):
        self.asked = 0

    def rank(self):
        return 0

    def size(self):
        return 1

    def all_gatherv(self, tensors, dim, sizes):
        assert dim == 0 and sizes == [len(tensors[0])]
        self.asked += 1
        return [its.clone() for its in tensors]

    def reduce_scatterv(self, rows, dim, sizes):
        assert dim == 0 and sizes == [len(rows)]
        self.asked += 1
        return rows.clone()

    def reduce_scatterv_into_output(self, rows, output, dim, sizes):
        return output.copy_(self.reduce_scatterv(rows, dim, sizes))


group = Group()
distributed = importlib.import_module("vllm.distributed")
state = importlib.import_module("vllm.distributed.parallel_state")
for name in ("get_dp_group", "get_ep_group", "get_pcp_group", "get_tp_group"):
    for module in (distributed, state):
        setattr(module, name, lambda: group)
state.in_the_same_node_as = lambda *_, **__: [True]
config = importlib.import_module("vllm.config")
config.get_current_vllm_config_or_none = lambda: None
config.get_current_vllm_config = alone.Anything

module = importlib.import_module(f"{NAME}.all2all")
theirs = module.AgRsAll2AllManager
plugin.install(module)
ours = module.AgRsAll2AllManager
plugin.install(module)
assert module.AgRsAll2AllManager is ours and issubclass(ours, theirs) and ours is not theirs
later = hasattr(theirs, "combine_into_output") and "combine_into_output" in vars(theirs)
assert not plugin.faults(pathlib.Path(sys.argv[1]))


def step(manager, fields, extra, y, into):
    """What a layer asks for."""
    its = manager.dispatch(*fields, False, extra_tensors=extra)
    if later:
        assert manager.allocate_combine_input(y.shape, y.dtype, y.device) is None
    if into and later:
        out = torch.empty_like(y)
        assert manager.combine_into_output(y, out) is out
        return its, out
    return its, manager.combine(y)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        bits = [its.contiguous().view(torch.uint8) for its in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    return len(one) == len(other) and all(map(equal, one, other))


def main():
    # One rank has nobody to share memory with: said, and left to vLLM.
    alone_manager = ours(group)
    fields = gathered.drawn(3, torch.Generator(), "bf16")
    alone_manager.dispatch(*fields)
    assert group.asked == 1

    opened = []
    plugin.refusal = lambda manager, store: None
    plugin.watch = lambda rows: None
    Gathered.open = lambda group, device, **its: (
        opened.append(its) or gathered.made(1, its["dtype"], its["token_bytes"])[0]
    )
    manager, plain = ours(group), theirs(group)
    generator = torch.Generator().manual_seed(1)
    steps = [(kind, count) for kind in ("bf16", "fp8") for count in (3, 0, gathered.MOST + 1)]
    for number, (kind, count) in enumerate(steps):
        fields = gathered.drawn(count, generator, kind)
        fields, extra = fields[:3], fields[3:] or None
        y = torch.randn(count, gathered.HIDDEN, generator=generator).bfloat16()
        logits = torch.randn(count, 9, generator=generator)
        # As engines warm up, then launch from the host, then capture.
        for is_ours, captures in ((True, False), (False, False), (True, True)):
            plugin.capturing = lambda captures=captures: captures
            asked = group.asked
            found = step(manager, fields, extra, y, number % 2)
            assert equal(found, step(plain, fields, extra, y, number % 2)), (kind, count, captures)
            found = manager.dispatch_router_logits(fields[0], logits, False, extra), manager.combine(y)
            assert equal(found, (plain.dispatch_router_logits(fields[0], logits, False, extra), plain.combine(y)))
            assert group.asked - asked == (4 if is_ours and count <= gathered.MOST else 8), (kind, count, captures)
    assert len(opened) == 1 and opened[0]["hidden_size"] == gathered.HIDDEN

    plugin.capturing = lambda: False
    # Another model's rows are vLLM's; sums of another kind are, and so is all that follows.
    fields = gathered.drawn(2, generator, "bf16")  # so many came not yet: the first step is ours
    for columns, off in ((64, False), (gathered.HIDDEN, True)):
        narrow = [fields[0][:, :columns].contiguous(), *fields[1:]]
        y = torch.randn(2, columns, generator=generator)
        assert equal(step(manager, narrow, None, y, False), step(plain, narrow, None, y, False))
        assert manager._exchange._off == off
    asked = group.asked
    manager.dispatch(*fields)
    assert group.asked == asked + 1
    manager.destroy()
    kinds = types.SimpleNamespace(AgRsAll2AllManager=ours)
    plugin.install(kinds)
    assert kinds.AgRsAll2AllManager is ours
    print(f"ran in vLLM {sys.argv[2]}")


main()
