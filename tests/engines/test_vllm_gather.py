"""vLLM's all-gather and reduce-scatter under ours: the contract with its class, when it stands aside, and its classes of releases."""

import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from rampwrap.engines import vllm_gather as plugin

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
WANTED = ("vllm/distributed/device_communicators/", "vllm/__init__.py", "vllm/_version.py")
RELEASES = [pytest.param(one, marks=pytest.mark.slow) for one in ("0.26.0", "0.33.0")]
RELEASES += [
    pytest.param(one, marks=pytest.mark.release) for one in ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
]
# vLLM's class as far as the contract reads it.
SOURCE = """
class AgRsAll2AllManager(All2AllManagerBase):
    def __init__(self, cpu_group, tcp_store_group=None): self.use_ep = True
    def _get_comm_group(self, is_sequence_parallel): ...
    def _get_sizes(self, num_local_tokens, comm_group): ...
    def dispatch_router_logits(self, hidden_states, router_logits, is_sequence_parallel=False, extra_tensors=None): ...
    def dispatch(self, hidden_states, topk_weights, topk_ids, is_sequence_parallel=False, extra_tensors=None): ...
    def combine(self, hidden_states, is_sequence_parallel=False): ...
    def combine_into_output(self, hidden_states, output, is_sequence_parallel=False): ...
    def destroy(self): ...
"""


@pytest.mark.parametrize("version", RELEASES)
def test_with_the_classes_of_a_release(tmp_path, version, released):
    """vLLM's own manager beside ours: same kinds and bits of everything; see `vllm_gather_classes`."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "vllm_gather_classes.py", released("vllm", version, WANTED), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"ran in vLLM {version}" in done.stdout


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "distributed" / "device_communicators" / "all2all.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return folder


BROKEN = {
    "a new argument": ("topk_ids, is", "topk_ids, row_scale, is", "takes row_scale, which rampwrap does not know"),
    "an argument gone": ("hidden_states, is_sequence_parallel=False): ...", "hidden_states): ...", "takes no is_seq"),
    "a new method": ("def destroy", "def dispatch_async(self): ...\n    def destroy", "has dispatch_async, which"),
    "a method gone": ("def _get_sizes", "def _sizes", "_get_sizes is not in"),
    "another way to put sums": ("output, is_seq", "output, scale, is_seq", "combine_into_output takes scale"),
    "no such class": ("class AgRsAll2AllManager", "class GatherManager", "AgRsAll2AllManager is not in"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_new_is_a_fault(tmp_path, case):
    old, new, says = BROKEN[case]
    assert old in SOURCE and not plugin.faults(write(tmp_path / "kept", SOURCE))
    assert any(says in one for one in plugin.faults(write(tmp_path / "new", SOURCE.replace(old, new, 1))))


def test_it_is_asked_for(tmp_path, monkeypatch, caplog):
    """Without the variable nothing is imported; with it a class that changed is left as it is, in a sentence."""
    own = type("AgRsAll2AllManager", (), {})
    module = types.SimpleNamespace(AgRsAll2AllManager=own)
    monkeypatch.setitem(sys.modules, plugin.MODULE, module)
    root = write(tmp_path / "kept", SOURCE)
    plugin.register(root)
    assert module.AgRsAll2AllManager is own
    monkeypatch.setenv(plugin.VARIABLE, "1")
    plugin.register(write(tmp_path / "new", SOURCE.replace("def destroy", "def end")))
    assert module.AgRsAll2AllManager is own and "as it is: AgRsAll2AllManager.destroy is not in" in caplog.text
    plugin.register(root)
    assert issubclass(module.AgRsAll2AllManager, own) and module.AgRsAll2AllManager.rampwrap


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"store": object()}, "elastic"),
        ({"internode": True}, "several hosts"),
        ({"world_size": 1}, "it has 1 ranks"),
        ({"world_size": 16}, "it has 16 ranks"),
        ({"capability": (8, 0)}, "older than sm_90"),
        ({"invariant": True}, "VLLM_BATCH_INVARIANT"),
        ({"ubatching": True}, "DBO"),
        ({"graphs": "NONE"}, "no CUDA graphs"),
    ],
)
def test_where_it_stands_aside(monkeypatch, change, says):
    its = {"store": None, "internode": False, "world_size": 4, "capability": (9, 0), "invariant": False} | change
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: its["capability"])
    monkeypatch.setitem(sys.modules, "vllm.envs", types.SimpleNamespace(VLLM_BATCH_INVARIANT=its["invariant"]))
    parallel = types.SimpleNamespace(use_ubatching=its.get("ubatching", False))
    graphs = types.SimpleNamespace(cudagraph_mode=types.SimpleNamespace(name=its.get("graphs", "FULL_AND_PIECEWISE")))
    config = types.SimpleNamespace(parallel_config=parallel, compilation_config=graphs)
    found = types.SimpleNamespace(get_current_vllm_config_or_none=lambda: config)
    monkeypatch.setitem(sys.modules, "vllm.config", found)
    manager = types.SimpleNamespace(internode=its["internode"], world_size=its["world_size"])
    reason = plugin.refusal(manager, its["store"])
    assert reason is None if says is None else says in reason


class Rows:
    """Takes everything, and keeps the counts of what it gathered."""

    hidden_size = 8

    def __init__(self):
        self.gathered = []

    def refusal(self, fields, counts):
        return None

    def fault(self):
        return None

    def takes(self, y, counts):
        return True

    def gather(self, fields, counts):
        self.gathered.append(counts)
        return list(fields)

    def scatter(self, y, counts, out):
        return y


@pytest.fixture
def made(monkeypatch):
    """An exchange of two ranks, what its rows gathered, and a step: tensors, counts of both ranks, and whether a graph is captured."""
    its = types.SimpleNamespace(counts=(2, 2), capturing=False)
    group = types.SimpleNamespace(world_size=2)
    manager = types.SimpleNamespace(
        world_size=2, _get_comm_group=lambda parallel: group, _get_sizes=lambda count, _: list(its.counts)
    )
    monkeypatch.setattr(plugin, "capturing", lambda: its.capturing)
    exchange, rows = plugin.Exchange(manager, None, torch.bfloat16), Rows()
    exchange._rows = rows

    def gather(capturing, counts=(2, 2), *more, kind=torch.bfloat16):
        its.counts, its.capturing = counts, capturing
        return exchange.gather([torch.zeros(counts[0], 8, dtype=kind), *more], False)

    return exchange, rows.gathered, gather


def test_steps_in_graphs_are_ours(made):
    """Those that the host launches are vLLM's, but for the first of each kind, which compiles what the graph will hold."""
    exchange, gathered, gather = made

    def ours(*step, **more):
        if gather(*step, **more) is None:
            return False
        assert exchange.scatter(torch.zeros(4, 8)) is not None
        return True

    assert not ours(True)  # nothing of its kind is compiled
    assert ours(False) and not ours(False)
    assert ours(True) and ours(True)
    for step, more in [((3, 3),), {}], [((2, 2), torch.zeros(2, 1)), {}], [(), {"kind": torch.float16}]:
        assert not ours(True, *step, **more)
        assert ours(False, *step, **more) and ours(True, *step, **more)
    assert gathered == [(2, 2)] * 3 + [(3, 3)] * 2 + [(2, 2)] * 4
    # Other numbers of rows: of ranks, or of a tensor, as a scale of all tokens has it.
    for step in ((2, 3),), ((2, 2), torch.zeros(1, 1)):
        assert not ours(False, *step) and not ours(True, *step)


def test_a_gather_without_its_scatter(made, caplog):
    """The next one goes vLLM's way, and all after it: it would find the flags of the one before, and not wait for anybody."""
    exchange, gathered, gather = made
    y = torch.zeros(4, 8)
    for capturing in (False, True):
        assert gather(capturing) is not None and exchange.under_way
        assert exchange.scatter(y) is y and not exchange.under_way
    assert gather(True) is not None
    for _ in range(2):
        assert gather(True) is None and exchange.scatter(y) is None
    assert gathered == [(2, 2)] * 3
    assert "rows were gathered whose sums never came" in caplog.text


def test_a_rank_that_is_missed_ends_the_process():
    """A graph would run on without it."""
    script = (
        "import sys, time\nfrom rampwrap.engines import vllm_gather as plugin\nplugin.WATCH_S = 0.01\n"
        "class Rows:\n    def fault(self): return 'rank 1 did not arrive.'\n"
        "rows = Rows()\nplugin.watch(rows)\ntime.sleep(20)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode < 0 and "rampwrap ends this process: rank 1 did not arrive." in done.stderr
