"""Programmatic dependent launch: every kernel waits first, only kernels that wait are launched so, warmed is launched."""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import rampwrap
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.host import prepare as preparing
from rampwrap.kernels.triton import pdl, quantise
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe import host as fused_moe
from rampwrap.kernels.triton.moe import warm
from rampwrap.kernels.triton.select import host as select
from rampwrap.model.in_graph import pack

SHAPE = MoEShape(8, 2, 256, 128)
FP8 = MoEShape(8, 2, 256, 256, "fp8")
MODULES = (align, fused_moe, preparing, quantise, select)
# Never launched with the attribute, since they do not wait.
PLAIN = {"choose_kernel"}


@pytest.fixture(autouse=True)
def as_found():
    """The setting is of the process."""
    pdl.use(None)
    yield
    pdl.use(None)
    pdl._possible.cache_clear()


@pytest.fixture
def on_hopper(monkeypatch):
    """As on a machine with two GPUs of sm_90; how often it was asked."""
    asked = []
    monkeypatch.setattr(pdl, "INTERPRETED", type("No", (), {"value": False}))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: asked.append(i) or (9, 0))
    pdl._possible.cache_clear()
    return asked


@pytest.fixture
def launches(monkeypatch):
    """(kernel, constants and options) of everything launched; nothing runs."""
    found = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.parameters = name, [*inspect.signature(kernel.fn).parameters]

        def __getitem__(self, grid):
            def launch(*args, **given):
                said = dict(zip(self.parameters, args, strict=False)) | given
                # What Triton compiles apart: constants, options, pointers that are absent and the types of the others.
                key = {}
                for name, value in said.items():
                    if isinstance(value, torch.Tensor):
                        key[name] = str(value.dtype)
                    elif value is None or name in given:
                        key[name] = repr(value)
                assert not set(self.parameters) - set(said), f"{self.name} lacks {set(self.parameters) - set(said)}"
                assert said.get("PDL", False) == said.get("launch_pdl", False), self.name
                assert ("PDL" in said) == ("PDL" in self.parameters) == (self.name not in PLAIN), self.name
                found.append((self.name, tuple(sorted(key.items()))))

            return launch

    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, getattr(module, name)))
    return found


def with_pdl(found):
    return {name for name, key in found if ("launch_pdl", "True") in key}


def names(found):
    return {name for name, _ in found}


def test_off_in_the_interpreter_and_on_older_gpus(on_hopper, monkeypatch):
    """On where all GPUs can; the question is put once, whatever is launched and however the setting changes."""
    assert pdl.arguments() is pdl.WITH and pdl.arguments(several=True) is pdl.WITH
    pdl.use("0")
    assert pdl.arguments() is pdl.WITHOUT
    pdl.use("1")
    assert pdl.arguments() is pdl.WITH and on_hopper == [0, 1]
    for capability, hip in (((8, 9), None), ((9, 4), "6.4")):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, its=capability: its if i else (9, 0))
        pdl._possible.cache_clear()
        pdl.use(None)
        assert pdl.arguments() is pdl.WITHOUT
    monkeypatch.undo()
    pdl._possible.cache_clear()
    pdl.use(None)
    if INTERPRETED.value:
        assert pdl.arguments() is pdl.WITHOUT


def test_settings(on_hopper, monkeypatch):
    """The environment's, the process's over it, one for a block; what is unknown is refused by name."""
    monkeypatch.setenv(pdl.VARIABLE, "0")
    assert pdl.setting() == "0" and pdl.arguments() is pdl.WITHOUT
    pdl.use("single")
    assert pdl.arguments() is pdl.WITH and pdl.arguments(several=True) is pdl.WITHOUT
    with pdl.using("1"):
        assert pdl.arguments(several=True) is pdl.WITH
    assert pdl.setting() == "single"
    pdl.use(None)
    assert pdl.setting() == "0"
    monkeypatch.setenv(pdl.VARIABLE, "")
    assert pdl.setting() == "1"
    monkeypatch.setenv(pdl.VARIABLE, "no")
    with pytest.raises(InputError, match="RAMPWRAP_PDL is 'no'; set it to one of 1, single, 0"):
        pdl.setting()
    with pytest.raises(InputError, match="setting 'no' is unknown"):
        pdl.use("no")


def every_launch(shape, path="expert"):
    """The launches of layers in all forms: alone, candidates, the CuTe layer's."""
    kernel = TritonFusedMoE(shape)
    configs = [kernel.default_config(tokens) for tokens in (1, 64, 2048)]
    depth = 128 if shape.dtype == "fp8" else 64
    configs.append({**configs[0], "block_k": depth, "split_k": 2})
    assert kernel.supports(configs[-1], shape) is None
    for tokens in (1, 24):
        ids = (torch.arange(tokens * shape.top_k, dtype=torch.int32) % shape.num_experts).view(tokens, -1)
        given = kernel.inputs(shape, ids)
        for config in configs:
            kernel.launch(config, **given)
            blocks = align.allocate_blocks(*ids.shape, shape.num_experts, config["block_m"], "cpu")
            align.align_tokens(ids, config["block_m"], shape.num_experts, blocks=blocks, path=path)
            kernel.launch(config, **given, blocks=blocks)
        heights = [config["block_m"] for config in configs]
        selected = select.allocate_selected(*ids.shape, shape.num_experts, heights, "cpu")
        kernel.launch_candidates(configs, selected.blocks, selected.choice, **given)
    return kernel, configs


@pytest.mark.parametrize("shape", [SHAPE, FP8])
@pytest.mark.parametrize("path", align.PATHS)
def test_only_kernels_that_wait_are_launched_early(shape, path, launches, on_hopper):
    """The recorder refuses the option without the constant, the constant unknown to the kernel, and either forgotten."""
    every_launch(shape, path)
    paths = {"expert": {"align_by_expert_kernel"}, "chunks": {"count_and_fill_kernel", "place_kernel"}}
    gemms = {"up_kernel", "down_kernel", "sum_kernel"}
    if shape.dtype == "fp8":
        gemms |= {"quantise_rows_kernel"}
    assert with_pdl(launches) == gemms | paths[path] | paths["expert"]
    assert names(launches) - with_pdl(launches) == (PLAIN & names(launches))


@pytest.mark.parametrize("path", align.PATHS)
def test_selection_is_launched_early(path, launches, on_hopper, sim_plan):
    ids = (torch.arange(96, dtype=torch.int32) % 64).view(12, 8)
    candidates = select.Candidates.on(pack(sim_plan.model.take((0, 1))), "cpu")
    select.align_and_select(ids, candidates, 0, 64, path=path)
    select.choose(torch.zeros(3, 64, dtype=torch.int32), candidates, 0)
    expected = {
        "expert": {"select_by_expert_kernel"},
        "chunks": {"count_and_fill_kernel", "select_and_place_kernel"},
    }
    assert with_pdl(launches) == expected[path]
    launches.clear()
    pdl.use("single")
    select.align_and_select(ids, candidates, 0, 64, path=path)
    assert launches and not with_pdl(launches)


@pytest.mark.parametrize("small", [True, False])
def test_around_the_cute_kernels_too(small, launches, on_hopper, monkeypatch):
    if not small:
        monkeypatch.setattr(preparing, "fits_one_launch", lambda *_: False)
    ids, x = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 256, dtype=torch.bfloat16)
    quantised = (x.to(torch.float8_e4m3fn), torch.zeros(4, 2))
    memory = align.allocate_blocks(4, 2, 8, 16, "cpu")
    sums = torch.zeros(4, 256)
    preparing.prepare(x, quantised, sums, ids, 16, 8, expert_map=None, memory=memory)
    preparing.sum_rows(x, torch.zeros(8, 256, dtype=torch.bfloat16), ids, 8, expert_map=None)
    preparing.narrow_rows(x, sums)
    before = {"prepare_kernel"} if small else {"count_and_prepare_kernel", "place_kernel"}
    assert names(launches) == with_pdl(launches) == before | {"sum_kernel", "narrow_after_kernel"}
    launches.clear()
    pdl.use("0")
    preparing.narrow_rows(x, sums)
    assert launches and not with_pdl(launches)


@pytest.mark.parametrize("setting", pdl.SETTINGS)
@pytest.mark.parametrize("shape", [SHAPE, FP8])
def test_what_is_warmed_is_what_is_launched(shape, setting, launches, on_hopper, monkeypatch):
    """The GEMMs of layers alone, and of candidates, by all that Triton compiles apart."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"multi_processor_count": 2}))
    gemms = {"up_kernel", "down_kernel", "quantise_rows_kernel"}
    monkeypatch.setattr(TritonFusedMoE, "most_ctas", lambda self, config, waves, device: 4 * waves or None)
    pdl.use(setting)
    kernel, configs = every_launch(shape)
    launched = {row for row in launches if row[0] in gemms}
    launches.clear()
    assert warm.run_once(shape, configs, torch.int32, "cpu", persistent=True) == [None] * len(configs)
    assert launched <= set(launches)
    early = {name for name, key in launched if ("launch_pdl", "True") in key}
    late = {name for name, key in launched if ("PDL", "False") in key}
    assert early == (set() if setting == "0" else {name for name, _ in launched})
    assert late == (set() if setting == "1" else {name for name, _ in launched})
    assert pdl.setting() == setting
    # Layers alone need no more than is warmed without `persistent`.
    launches.clear()
    for tokens in (1, 24):
        ids = (torch.arange(tokens * shape.top_k, dtype=torch.int32) % shape.num_experts).view(tokens, -1)
        for config in configs:
            kernel.launch(config, **kernel.inputs(shape, ids))
    alone = {row for row in launches if row[0] != "align_by_expert_kernel"}
    launches.clear()
    warm.run_once(shape, configs, torch.int32, "cpu")
    assert alone <= set(launches)


def test_warming_processes_take_the_setting(monkeypatch):
    """A setting made in the process reaches the processes that compile for it."""
    seen = {}

    class Context:
        def set_forkserver_preload(self, modules):
            pass

        def Pool(self, count, initializer, arguments):  # noqa: N802
            seen["initializer"], seen["arguments"] = initializer, arguments
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def starmap(self, run, work):
            return [[None] * len(part[1]) for part in work]

    monkeypatch.setattr(warm.multiprocessing, "get_context", lambda _: Context())
    for setting in pdl.SETTINGS:
        pdl.use(setting)
        assert warm.warm(SHAPE, [{}, {}], processes=2) == [None, None]
        assert seen == {"initializer": pdl.use, "arguments": (setting,)}


COMPILE = r"""
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.host import prepare
from rampwrap.kernels.triton import quantise
from rampwrap.kernels.triton.align import by_expert as align_kernels, chunks as chunk_kernels
from rampwrap.kernels.triton.moe import gemm
from rampwrap.kernels.triton.moe.host import form_arguments
from rampwrap.kernels.triton.select import kernels as select_kernels

INTS = {"num_slots", "num_experts", "num_local_experts", "num_chunks", "pieces", "block_m", "capacity", "num_groups", "most_rows", "fallback"}
TYPES = {"reals_ptr": "fp64", "tally_ptr": "fp64", "x_ptr": "bf16", "h_ptr": "bf16", "y_ptr": "bf16", "w_ptr": "bf16", "out_ptr": "bf16",
         "topk_weights_ptr": "fp32", "q_ptr": "fp8e4nv", "scale_ptr": "fp32", "zero_ptr": "fp32", "sums_ptr": "fp32"}
PTX = re.compile(r"\b(ld|st|ldu|atom|red|prefetch|cp\.async|cp\.reduce)\b[\w.:]*\.global|\b(bra|ret|exit|call)\b")
SASS = re.compile(r"\b(LDG|STG|LDGSTS|ATOMG|ATOM|REDG|RED|LD|ST|CCTL|EXIT|UBLKCP)(\.|\s)")

def first(pattern, lines):
    return next((i for i, line in enumerate(lines) if re.search(pattern, line)), None)

def look(name, kernel, constants, absent=(), pdl=True, **options):
    signature, constexprs, attrs = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in INTS:
            signature[argument] = "i32"
        elif argument.endswith("_ptr") and argument not in absent:
            signature[argument] = "*" + TYPES.get(argument, "i32")
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "constexpr"
            constexprs[argument] = constants.get(argument)
    constexprs["PDL"] = pdl
    built = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=GPUTarget("cuda", 90, 32), options=options | ({"launch_pdl": True} if pdl else {}))
    ptx = [line.split("//")[0] for line in built.asm["ptx"][built.asm["ptx"].index(".entry"):].splitlines()]
    sass = built.asm["sass"].splitlines()
    print(json.dumps(dict(
        name=name, pdl=pdl, attribute=built.metadata.launch_pdl,
        waits=sum("griddepcontrol.wait" in line for line in ptx), starts=sum("griddepcontrol.launch_dependents" in line for line in ptx),
        ptx=[first(r"griddepcontrol\.launch_dependents", ptx), first(r"griddepcontrol\.wait", ptx), first(PTX, ptx)],
        sass=[first("PREEXIT", sass), first("ACQBULK", sass), first(SASS, sass)],
        local=len(re.findall(r"(?:ld|st)\.local", "\n".join(ptx))), spills=len(re.findall(r"\b(STL|LDL)\b", "\n".join(sass))))))

map_ = ("expert_map_ptr",)
look("align", align_kernels.align_by_expert_kernel, dict(CHUNK=256, BINS=64), map_)
look("align with a map", align_kernels.align_by_expert_kernel, dict(CHUNK=256, BINS=64))
look("count", chunk_kernels.count_and_fill_kernel, dict(PIECE=256, BINS=64), map_)
look("place", chunk_kernels.place_kernel, dict(PIECE=256, BINS=64, ROWS=64, IDS=32, TILE=64), num_warps=8)
chosen = dict(BINS=64, C=2, S=32, LAUNCHES=2, MARGINS=32, STRIDE=4)
look("select", select_kernels.select_by_expert_kernel, chosen | dict(CHUNK=256), map_, enable_fp_fusion=False)
look("select and place", select_kernels.select_and_place_kernel, chosen | dict(PIECE=256, ROWS=64, IDS=32, TILE=64), num_warps=8, enable_fp_fusion=False)
look("quantise", quantise.quantise_rows_kernel, dict(COLUMNS=2048, GROUPS=8, GROUP=128))
look("quantise anew", quantise.quantise_rows_kernel, dict(COLUMNS=2048, GROUPS=8, GROUP=128), ("unless_zero_ptr",))
sizes = dict(TOP_K=8, HIDDEN=2048, INTERMEDIATE=1024, SPLIT_K=2, **form_arguments(MoEShape(64, 8, 2048, 1024)))
tile = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, GROUP_M=1, SWAP_AB=False)
scales = ("h_scale_ptr", "x_scale_ptr", "w_scale_ptr")
alone = ("sorted_token_ids_ptr", "expert_ids_ptr", "num_tokens_post_padded_ptr")
behind = ("topk_ids_ptr", "expert_map_ptr")
for kernel in (gemm.up_kernel, gemm.down_kernel):
    for persistent, absent in ((False, alone), (False, behind), (True, behind)):
        name = f"{kernel.fn.__name__} {persistent} {len(absent)}"
        look(name, kernel, sizes | tile | dict(PERSISTENT=persistent), scales + absent, num_stages=3)
look("up without", gemm.up_kernel, sizes | tile | dict(PERSISTENT=False), scales + behind, pdl=False, num_stages=3)
look("sum", gemm.sum_kernel, dict(TOP_K=8, HIDDEN=2048, SPLIT_K=1, SPLIT_OF=0, BLOCK_H=1024), ("expert_map_ptr", "choice_ptr"))
look("sum of several", gemm.sum_kernel, dict(TOP_K=8, HIDDEN=2048, SPLIT_K=2, SPLIT_OF=33, BLOCK_H=1024))
look("prepare", prepare.prepare_kernel, dict(GROUPS=8, CHUNK=256, BINS=128))
look("count and prepare", prepare.count_and_prepare_kernel, dict(GROUPS=8, PIECE=256, BINS=128))
look("narrow", prepare.narrow_after_kernel, dict(COLUMNS=2048, BLOCK=1024))
"""


def test_many_chunks_are_launched_one_after_the_other(monkeypatch):
    """128 CTAs that start early share the SMs that are free; 64 find one each."""
    pdl.use(pdl.EVERYWHERE)
    monkeypatch.setattr(pdl, "_possible", lambda: True)
    for several in (False, True):
        assert align.overlap(align.MOST_OVERLAPPING, several) is pdl.WITH
        assert align.overlap(align.MOST_OVERLAPPING + 1, several) is pdl.WITHOUT


def test_each_kernel_waits_before_it_touches_memory(tmp_path):
    """Compiled for sm_90, in PTX and in machine code: wait, and only then start the next, memory, branches and ends."""
    root = str(pathlib.Path(rampwrap.__file__).parent.parent)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 20
    for built in found:
        assert built["local"] == built["spills"] == 0, built
        assert built["attribute"] == built["pdl"], built
        if not built["pdl"]:
            assert built["waits"] == built["starts"] == 0 and built["sass"][:2] == [None, None], built
            continue
        assert built["waits"] == built["starts"] == 1, built
        for starts, waits, touches in (built["ptx"], built["sass"]):
            assert waits < min(starts, touches), built
