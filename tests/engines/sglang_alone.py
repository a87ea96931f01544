"""What `test_sglang` runs in a process of its own: one release's own functions around our hook, with real tensors on a CPU.

    python sglang_alone.py FOLDER VERSION PLANS

SGLang's are the hook registry, the override, the reader of tuned files, the alignment's buffers, the two GEMMs in Triton's
interpreter and the sum. Its CUDA operator that aligns is written out here; its context says: one GPU, nothing special.
"""

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import sys
import types

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import alone

ROOT, VERSION, PLANS = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
UTILS = "sglang.srt.layers.moe.moe_runner.triton_utils"
REAL = {UTILS, *(f"{UTILS}.{name}" for name in ("fused_moe", "fused_moe_triton_config", "moe_align_block_size"))}
REAL |= {"sglang.kernels.ops.moe.fused_moe_triton_kernels", "sglang.srt.plugins.hook_registry"}
alone.install(ROOT, REAL)

flags = types.SimpleNamespace(enable_deterministic_inference=False)
context = types.SimpleNamespace(
    deterministic=flags,
    moe=types.SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    comm=types.SimpleNamespace(enable_symm_mem=False),
)
importlib.import_module("sglang.srt.runtime_context").get_exec = lambda: context
importlib.import_module("sglang.srt.runtime_context").get_parallel = lambda: types.SimpleNamespace(tp_group=None)
utils = importlib.import_module("sglang.srt.utils")
utils.get_device_name = lambda: "Stand-in"
symmetric = importlib.import_module("sglang.srt.distributed.device_communicators.pynccl_allocator")
symmetric.use_symmetric_memory = lambda *args, **kwargs: contextlib.nullcontext()

TUNED = PLANS / "tuned" / "configs" / "triton_3_0_0"
TUNED.mkdir(parents=True)
os.environ["SGLANG_MOE_CONFIG_DIR"] = str(TUNED.parents[1])

import test_sglang as tests

from rampwrap.engines import sglang as engine
from rampwrap.routing.workloads import Routing, Workload

package = importlib.import_module(UTILS)
fused = importlib.import_module(f"{UTILS}.fused_moe")
tables = importlib.import_module(f"{UTILS}.fused_moe_triton_config")
registry = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry


def align(topk_ids, buckets, block, sorted_ids, expert_ids, num_padded, cumsum, pad, *more):
    """SGLang's operator: slots by expert, each expert's padded to blocks; expert -1 is the bucket of ids that are not here."""
    flat = topk_ids.flatten()
    sorted_ids.fill_(len(flat))
    at = 0
    for expert in range(-1, buckets - 1):
        slots = torch.nonzero(flat == expert).flatten()
        blocks = -(-len(slots) // block)
        sorted_ids[at : at + len(slots)] = slots.int()
        expert_ids[at // block : at // block + blocks] = expert
        at += blocks * block
    num_padded[0] = at


importlib.import_module(f"{UTILS}.moe_align_block_size").sgl_moe_align_block_size = align
launched = []
launch = fused.invoke_fused_moe_kernel


def spy(*args, **kwargs):
    launched.append(dict(args[14]))
    return launch(*args, **kwargs)


fused.invoke_fused_moe_kernel = spy
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator).mul_(0.3).half()  # Triton's interpreter multiplies bf16 by its bits


def layer(experts=8, hidden=64, inner=32):
    return normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)


def step(weights, routing, num_tokens=64, top_k=2, absent=0):
    """A layer by SGLang's own function, compared with the sum written out; the config that both GEMMs ran."""
    w1, w2 = weights
    ids = torch.from_numpy(Workload(num_tokens, Routing.parse(routing)).topk_ids(len(w1), top_k)).int()
    ids[len(ids) - absent :] = -1  # padding rows of a CUDA graph
    x, scale = normal(num_tokens, w1.shape[2]), torch.rand(num_tokens, top_k, generator=generator)
    del launched[:]
    out = fused.fused_experts_impl(x, w1, w2, scale, ids)
    expected = torch.zeros(num_tokens, w2.shape[1])
    for token, slot in ((t, k) for t in range(num_tokens - absent) for k in range(top_k)):
        gate, up = (w1[ids[token, slot]].float() @ x[token].float()).chunk(2)
        h = torch.nn.functional.silu(gate) * up
        expected[token] += scale[token, slot] * (w2[ids[token, slot]].float() @ h)
    off = (out.float() - expected).norm() / expected.norm()
    assert off < 0.01, (routing, off)
    down = {name: value for name, value in launched[1].items() if name != "USE_TMA"}  # 0.5.17 leaves it in
    assert len(launched) == 2 and launched[0] == down, launched
    return launched[0]


version = importlib.metadata.version
importlib.metadata.version = lambda name: VERSION if name == "sglang" else version(name)
said = []
engine._warn = lambda key, text, *args: said.append(text % args)
logging.getLogger("rampwrap").setLevel(logging.INFO)

assert engine.mismatch(package, fused, tables) is None
plain = layer()
own = step(plain, "uniform")
tests.save_plan(PLANS, tests.MoEShape(8, 2, 64, 32, "fp16"))
engine.register()
engine.register()
assert not said and len(registry._hooks[engine.TARGET]) == 1, said
registry.apply_hooks()
assert engine.mismatch(package, fused, tables) is None  # the wrapper shows the function's signature

# What the plan chooses is what SGLang's kernels run: static at first, then by the routing of the step before.
even = step(plain, "uniform")
assert set(even) == set(tests.KEYS) and even != own
assert step(plain, "hot:2") == even
skewed = step(plain, "hot:2")
assert skewed["BLOCK_SIZE_M"] > even["BLOCK_SIZE_M"], (even, skewed)
assert step(plain, "uniform", absent=5) == skewed and step(plain, "uniform", absent=5) == even
assert package.get_config() is None and not said, said

# SGLang's own override stands; no plan, other files, another kernel, deterministic inference: as it is.
with package.override_config(own):
    assert step(plain, "uniform") == own
assert step(layer(4), "uniform")["BLOCK_SIZE_M"] == own["BLOCK_SIZE_M"] and "no plan" in said.pop()


def left(why):
    """Whether a process that starts anew leaves the layer as it is, with the reason."""
    tables.get_moe_configs.cache_clear()
    (hook,) = (hook for _, hook, _ in registry._hooks[engine.TARGET])
    hook.__self__._layers.clear()
    config = step(plain, "uniform")
    return config["BLOCK_SIZE_M"] == own["BLOCK_SIZE_M"] and len(said) == 1 and why in said.pop()


flags.enable_deterministic_inference = True
assert not said and step(layer(4), "uniform") and not said
(hook,) = (hook for _, hook, _ in registry._hooks[engine.TARGET])
hook.__self__._layers.clear()
assert step(plain, "uniform")["BLOCK_SIZE_M"] == 64 and "deterministic" in said.pop()
flags.enable_deterministic_inference = False
os.environ[engine.FUSED_SWIGLU] = "1"
assert left(engine.FUSED_SWIGLU), said
del os.environ[engine.FUSED_SWIGLU]
name = tables.get_config_file_name(8, 32, None, [0, 0], False, down_moe=True)
(TUNED / name).write_text(json.dumps({"64": {**own, "USE_TMA": True}}))
fused._moe_support_tma = fused._down_moe_use_tma = lambda: False  # a CPU's
assert left("TMA"), said
(TUNED / name).unlink()
hook.__self__._layers.clear()
tables.get_moe_configs.cache_clear()
assert step(plain, "uniform") == even and not said
print(f"ran in SGLang {VERSION}")
