"""Building, inspecting and loading the CuTe kernels: the real compiler where the CuTe DSL is installed; no GPU."""

import ctypes
import json
import multiprocessing
import os
import pathlib
import re
import struct
import subprocess
import sys
import time
from collections import Counter

import attrs
import pytest

import rampwrap
from rampwrap.cli import main as cli
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.build import gate, library
from rampwrap.kernels.cute.configs import FORMS, CuteConfig, Variant, all_configs, all_variants

needs_dsl = pytest.mark.skipif(building.dsl_version() is None, reason="needs the CuTe DSL (pip install rampwrap[cute])")
UP = Variant("up", CuteConfig("two", "fp8", 16, 64, 4, 4))
FIT = gate.Inspection(240, 0, {"QGMMA.64x16x32": 16, "USETMAXREG": 2})


def samples():
    """Of every form and dtype: most tokens of all tiles but two, where registers are scarcest, and least of the narrowest."""
    chosen = []
    for form in ("two", "one"):
        for dtype in ("fp8", "bf16"):
            tiles = dict.fromkeys((c.block_n, c.warp_n) for c in all_configs(form, dtype))
            for place, tile in enumerate(tiles):
                listed = [c for c in all_configs(form, dtype) if (c.block_n, c.warp_n) == tile]
                by_tokens = sorted(listed, key=lambda config: config.block_m)
                if place != 1:
                    chosen.append(by_tokens[0 if place == 0 else -1])
    chosen += [config for dtype in ("fp8", "bf16") for config in all_configs("prefill", dtype)]
    # Kernels of many widths take 10 s each: the one with the most accumulators.
    for dtype in ("fp8", "bf16"):
        chosen.append(max(all_configs("ragged", dtype), key=lambda config: config.accumulators))
    return tuple(dict.fromkeys(variant for config in chosen for variant in config.variants))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of one's own, and no library named from outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "WHEEL", "rampwrap_cute_of_a_test")  # whatever is installed
    library._open.cache_clear()
    library._of_wheel.cache_clear()
    yield tmp_path
    library._open.cache_clear()  # a test may have changed what it holds
    library._of_wheel.cache_clear()


# ---- the orchestration, with a compiler that is none

COMPILER = '''
import os, pathlib, time

def compile(variant, objects):
    """Notes that it ran; dies on n32 tiles, fails on n64, and else makes a file."""
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(variant.symbol + "\\n")
    if "_n32_" in variant.symbol:
        os._exit(9)
    if "_n64_" in variant.symbol:
        return "It cannot be compiled: ValueError: no."
    (objects / f"{variant.symbol}.o").write_bytes(b"object")
    if "_n128_" in variant.symbol:
        os._exit(9)  # its file is whole, its answer never comes
    return None

def stillborn():
    os._exit(9)
'''


@pytest.fixture
def stand_in(home, monkeypatch):
    """Stands in for compiler, gate and linker; returns what the compiler was asked for."""
    (home / "stand_in_compiler.py").write_text(COMPILER)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("STAND_IN_LOG", str(home / "log"))
    import stand_in_compiler

    monkeypatch.setattr(building, "_compile", stand_in_compiler.compile)
    monkeypatch.setattr(building, "dsl_version", lambda: "4.8.1")
    monkeypatch.setattr(gate, "cubin", lambda data: data)
    monkeypatch.setattr(gate, "inspect", lambda image: FIT)
    monkeypatch.setattr(gate, "why_unfit", lambda found, v: "It spills." if v.config.block_m == 24 else None)

    def link(compiler, objects, folder):
        (folder / building.LIBRARY).write_text("\n".join(sorted(path.stem for path in objects)))
        return folder / building.LIBRARY

    monkeypatch.setattr(building, "_link", link)
    yield lambda: (home / "log").read_text().split()
    del sys.modules["stand_in_compiler"]


def narrow(*block_ms, block_n=16):
    return [Variant("up", CuteConfig("two", "fp8", block_m, block_n, 4, 6)) for block_m in block_ms]


def test_a_build_reports_what_it_did(stand_in, home):
    wanted = narrow(8, 16, 24)
    seen = []
    done = building.build(wanted, home / "out", processes=2, progress=lambda *step: seen.append(step))
    assert (done.kernels, done.built, done.cached) == (2, 3, 0)
    assert done.refused == {"up_fp8_m24_n16_w4_s6": "It spills."} and done.num_bytes > 0
    assert seen[0] == (0, 3) and seen[-1] == (3, 3)
    assert "3 built, 0 from cache, 1 refused" in str(done) and "It spills." in str(done)
    manifest = json.loads((home / "out" / building.MANIFEST).read_text())
    assert set(manifest["kernels"]) == {"up_fp8_m8_n16_w4_s6", "up_fp8_m16_n16_w4_s6"}
    assert manifest["kernels"]["up_fp8_m8_n16_w4_s6"]["registers"] == 240


def test_what_is_there_is_not_compiled_again(stand_in, home):
    building.build(narrow(8), home / "out", processes=1)
    done = building.build(narrow(8, 16), home / "out", processes=1)
    assert (done.built, done.cached) == (1, 1) and len(stand_in()) == 2


def test_another_source_or_compiler_is_another_cache(stand_in, home, monkeypatch):
    building.build(narrow(8), home / "out", processes=1)
    monkeypatch.setattr(building, "dsl_version", lambda: "4.9.0")
    assert building.build(narrow(8), home / "out", processes=1).built == 1
    monkeypatch.setattr(building, "source_digest", lambda: "other")
    assert building.build(narrow(8), home / "out", processes=1).built == 1


def test_a_kernel_that_does_not_compile_is_refused_and_tried_again(stand_in, home):
    wanted = [*narrow(8), *narrow(8, block_n=64)]
    for _ in range(2):
        done = building.build(wanted, home / "out", processes=1)
        assert done.refused == {"up_fp8_m8_n64_w4_s6": "It cannot be compiled: ValueError: no."}
    assert stand_in().count("up_fp8_m8_n64_w4_s6") == 2 and stand_in().count("up_fp8_m8_n16_w4_s6") == 1


def test_a_kernel_on_which_the_compiler_dies_is_refused_alone(stand_in, home):
    """Its neighbours are compiled all the same, and none of them is blamed."""
    wanted = [*narrow(8, 16), *narrow(8, block_n=32), *narrow(32, 40)]
    done = building.build(wanted, home / "out", processes=2)
    assert done.kernels == 4 and set(done.refused) == {"up_fp8_m8_n32_w4_s6"}
    assert "died on it twice" in done.refused["up_fp8_m8_n32_w4_s6"]


def test_a_worker_that_dies_after_its_file_was_whole_costs_nothing(stand_in, home):
    seen = []
    done = building.build(
        narrow(8, 16, block_n=128), home / "out", processes=1, progress=lambda *step: seen.append(step)
    )
    assert (done.kernels, done.refused) == (2, {}) and seen[-1] == (2, 2)


def test_processes_that_do_not_start_are_not_blamed_on_a_kernel(stand_in, home, monkeypatch):
    import stand_in_compiler

    monkeypatch.setattr(building, "_prepare", stand_in_compiler.stillborn)
    with pytest.raises(InputError, match=r"die when they start .*build-kernels"):
        building.build(narrow(8, 16), home / "out", processes=2)
    assert not (home / "log").exists()


def test_a_daemon_says_what_to_do(stand_in, home, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(InputError, match="daemonic process"):
        building.build(narrow(8), home / "out", processes=1)


SCRIPT = """
import pathlib, sys
import stand_in_compiler
from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.configs import CuteConfig, Variant

with open("ran", "a") as log:
    log.write("x")
building._compile = stand_in_compiler.compile
wanted = [Variant("up", CuteConfig("two", "fp8", block_m, 16, 4, 6)) for block_m in (8, 16, 32)]
failed = building._compile_all(wanted, pathlib.Path("objects"), 2, 3, lambda *step: None)
print(failed, len(list(pathlib.Path("objects").iterdir())), sys.modules["__main__"].__dict__.get("__file__"))
"""


@pytest.mark.parametrize("how", ["script", "stdin", "module"])
def test_a_script_without_a_guard_compiles(stand_in, home, how):
    """The processes that compile do not run the script that asked for them, and it finds itself as it was."""
    (home / "objects").mkdir()
    (home / "unguarded.py").write_text(SCRIPT)
    arguments = {"script": ["unguarded.py"], "stdin": ["-"], "module": ["-m", "unguarded"]}[how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), *filter(None, sys.path)])}
    run = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if how == "stdin" else None,
        capture_output=True,
        text=True,
        cwd=home,
        env=environment,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("{} 3 ") and ("unguarded.py" in run.stdout) == (how != "stdin")
    assert (home / "ran").read_text() == "x"


def test_nothing_built_is_an_error(stand_in, home):
    with pytest.raises(ConfigError, match=r"none of 1 kernels could be built: .*no\."):
        building.build(narrow(8, block_n=64), home / "out", processes=1)
    assert not (home / "out" / building.LIBRARY).exists()


def test_the_command(stand_in, home, monkeypatch, capsys):
    monkeypatch.setattr(building, "all_variants", lambda *a: ())
    monkeypatch.setattr("rampwrap.cli.build.all_variants", lambda forms, dtypes: narrow(8, 24))
    assert cli.main(["build-kernels", "--out", str(home / "out"), "--json", "--processes", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kernels"], found["built"], found["cached"]) == (1, 2, 0) and found["seconds"] > 0
    assert list(found["refused"]) == ["up_fp8_m24_n16_w4_s6"] and found["library"].endswith(building.LIBRARY)
    (home / "file").write_text("")
    assert cli.main(["build-kernels", "--out", str(home / "file" / "below")]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_without_the_dsl_or_a_compiler_it_says_what_to_install(home, monkeypatch):
    monkeypatch.setattr(building, "dsl_version", lambda: None)
    with pytest.raises(InputError, match=r"pip install 'rampwrap\[cute\]'"):
        building.build(narrow(8))
    monkeypatch.setattr(building, "dsl_version", lambda: "4.8.1")
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"install g\+\+"):
        building.build(narrow(8))


# ---- the gate


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"STL": 3}, "It spills: 3 stores"),
        ({"LDL": 1}, "It spills"),
        ({"USETMAXREG": 0}, "two USETMAXREG"),
        ({"USETMAXREG": 4}, "two USETMAXREG"),
        ({"QGMMA.64x16x32": 0}, "no tensor core where QGMMA.64x16x32"),
        ({"QGMMA.64x24x32": 8}, "multiplies with QGMMA.64x24x32"),
        ({"HGMMA.64x16x16": 8}, "multiplies with HGMMA.64x16x16"),
    ],
)
def test_the_gate_names_what_is_wrong(change, reason):
    counts = {name: count for name, count in {**FIT.instructions, **change}.items() if count}
    found = gate.why_unfit(gate.Inspection(240, 0, counts), UP)
    assert found is None if reason is None else reason in found


def test_the_gate_counts_stack_and_registers():
    assert "16 bytes of stack" in gate.why_unfit(gate.Inspection(240, 16, FIT.instructions), UP)
    assert "240 registers for each of 384 threads" in gate.why_unfit(
        gate.Inspection(240, 0, FIT.instructions), Variant("up", CuteConfig("two", "fp8", 16, 32, 8, 4))
    )


def test_an_object_without_gpu_code_is_refused():
    host = b"\x7fELF" + bytes(14) + struct.pack("<H", 62) + bytes(60)
    for data in (b"", host, b"\0" + host):
        with pytest.raises(InputError, match="0 GPU images"):
            gate.cubin(data)


# ---- the library


def described(folder, **changes):
    """A library file that is none, with a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / building.LIBRARY).write_bytes(b"none")
    manifest = {"source": building.source_digest(), "num_bytes": 4, "kernels": {}, "refused": {}} | changes
    (folder / building.MANIFEST).write_text(json.dumps(manifest))
    return folder / building.LIBRARY


def test_libraries_that_do_not_fit_are_refused(home):
    with pytest.raises(InputError, match="another version of the kernels"):
        library.read_manifest(described(home / "a", source="old"))
    with pytest.raises(InputError, match="does not describe the library"):
        library.read_manifest(described(home / "a", num_bytes=5))
    (home / "a" / building.MANIFEST).write_text("{")
    with pytest.raises(InputError, match="build-kernels' again"):
        library.read_manifest(home / "a" / building.LIBRARY)


def test_without_any_library_it_says_how_to_get_one(home, monkeypatch):
    monkeypatch.setattr(library, "dsl_version", lambda: None)
    with pytest.raises(InputError, match="rampwrap build-kernels"):
        library.load()
    monkeypatch.setenv(library.VARIABLE, str(home / "nowhere.so"))
    with pytest.raises(InputError, match="is no library of CuTe kernels"):
        library.load()


def test_where_a_library_is_found(home, monkeypatch):
    assert library.find() is None
    default = building.default_folder()
    described(default)
    assert library.find() == default / building.LIBRARY
    named = described(home / "named")
    monkeypatch.setenv(library.VARIABLE, str(home / "named"))
    assert library.find() == named and library.find(default) == default / building.LIBRARY


def test_an_installed_wheel_stands_between_the_named_and_the_built_library(home, monkeypatch, caplog):
    """And one of other kernels is passed over, with one sentence that names the release that fits."""
    monkeypatch.syspath_prepend(str(home / "site"))
    default = described(building.default_folder())
    installed = described(home / "site" / library.WHEEL)
    installed.with_name("__init__.py").write_text("raise AssertionError('it is found, not imported')")
    assert library.find() == installed and library.find(default) == default and not caplog.records
    monkeypatch.setenv(library.VARIABLE, str(described(home / "named")))
    assert library.find() == home / "named" / building.LIBRARY
    monkeypatch.delenv(library.VARIABLE)
    for damage in ({"source": "old"}, {"num_bytes": 5}):
        described(home / "site" / library.WHEEL, **damage)
        library._of_wheel.cache_clear()
        caplog.clear()
        assert library.find() == library.find() == default
        (said,) = caplog.messages
        assert "rampwrap-cute are passed over" in said and f"rampwrap-cute=={rampwrap.__version__}." in said


# ---- the real compiler


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The sample, built twice into one folder: (first build, second build)."""
    home = tmp_path_factory.mktemp("cute")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield building.build(samples(), home / "out"), building.build(samples(), home / "out")


@needs_dsl
def test_the_sample_compiles_and_passes_the_gate(real):
    first, second = real
    assert first.refused == {} and first.kernels == len(samples()) == first.built
    assert (second.built, second.cached) == (0, first.kernels) and second.seconds < first.seconds / 2


def printed(image):
    """What Triton's nvdisasm prints of a cubin file."""
    import triton

    nvdisasm = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([nvdisasm, "-c", image], capture_output=True, text=True, check=True).stdout


def disassembled(image):
    """`Inspection.instructions` of a cubin file, from what is printed of it."""
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z0-9_.x]+)", printed(image), re.MULTILINE)
    parts = [name.split(".") for name in names]
    counted = Counter(".".join(its[: 2 if its[0] in gate.GMMA_K else 1]) for its in parts)
    return {name: count for name, count in sorted(counted.items()) if name.split(".")[0] in gate.OPCODES.values()}


@needs_dsl
def test_the_gate_counts_what_the_disassembler_prints(real, tmp_path):
    objects = next((real[0].library.parent.parent / "rampwrap" / "cute" / "objects").iterdir())
    for variant in samples()[::3]:
        image = gate.cubin((objects / f"{variant.symbol}.o").read_bytes())
        (tmp_path / "image.cubin").write_bytes(image)
        assert disassembled(tmp_path / "image.cubin") == gate.inspect(image).instructions, variant


@needs_dsl
def test_products_of_the_ragged_form_run_on_until_their_sums_are_needed(real, tmp_path):
    """For each width one copy of the K loop, whose wgmma are waited for as often as they are committed. ptxas says nothing where it
    waits behind every single one."""
    objects = next((real[0].library.parent.parent / "rampwrap" / "cute" / "objects").iterdir())
    for variant in (variant for variant in samples() if variant.config.form == "ragged"):
        (tmp_path / "image.cubin").write_bytes(gate.cubin((objects / f"{variant.symbol}.o").read_bytes()))
        text = printed(tmp_path / "image.cubin")
        products, waits = len(re.findall(r"\b[HQ]GMMA\.64x", text)), text.count("WARPGROUP.DEPBAR")
        config = variant.config
        assert products == 4 * config.block_n // 16 * len(config.widths), variant
        assert waits <= 2 * len(config.widths) + (config.block_n == 64) * 4 + 2, variant


@needs_dsl
def test_the_library_loads_in_milliseconds_and_checks_its_arguments(real):
    pytest.importorskip("torch")
    library._load(real[0].library)
    start = time.monotonic()
    found = library.Library(real[0].library)
    assert time.monotonic() - start < 0.1
    functions = [found.function(variant) for variant in samples()]
    assert found.function(samples()[0]) is functions[0]
    with pytest.raises(TypeError, match="Expects"):
        functions[0](1, 2, 3)


def as_of_a_gpu(tensor):
    """A tensor that says it lies on a GPU, for functions that ask before they launch; nothing may read it."""
    import torch
    import tvm_ffi

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    device = ctypes.cast(pointer(capsule, b"dltensor") + 8, ctypes.POINTER(ctypes.c_int32))  # behind the data
    assert device[0] == 1  # DLPack's CPU
    device[0] = 2
    return tvm_ffi.from_dlpack(capsule)


@needs_dsl
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("form", ["two", "one", "prefill", "ragged"])
def test_compiled_functions_take_what_a_layer_hands_them(real, form, dtype, monkeypatch):
    """Types, shapes, strides, alignment and device pass all of their checks: what they lack here is a driver."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from rampwrap.adapters.cute_moe import CuteFusedMoE
    from rampwrap.kernel.shape import MoEShape
    from rampwrap.kernels.triton.interpreter import INTERPRETED

    if torch.cuda.is_available() or not INTERPRETED.value:
        pytest.skip("needs Triton's interpreter and no GPU")
    found = library.Library(real[0].library)
    found.can_compile = False  # only what is there
    shape, refusals = MoEShape(8, 2, 512, 256, dtype), []
    kernel = CuteFusedMoE(shape, form, found)

    def stand_in(variant, function):
        def call(*arguments):
            on_gpu = [as_of_a_gpu(its) if isinstance(its, torch.Tensor) else its for its in arguments]
            with pytest.raises(RuntimeError) as refusal:
                function(*on_gpu)
            refusals.append(str(refusal.value))
            with pytest.raises((TypeError, ValueError), match=r"Mismatched|Expects"):
                function(*on_gpu[1:], on_gpu[0])

        return call

    get = found.function
    monkeypatch.setattr(found, "function", lambda variant: stand_in(variant, get(variant)))
    kernel.launch(kernel.configs[0], **kernel.inputs(shape, torch.zeros(9, 2, dtype=torch.int32)))
    assert len(refusals) == (1 if form == "one" else 2) and all("Cuda" in text for text in refusals), refusals


@needs_dsl
def test_what_is_missing_is_compiled_on_first_use(home):
    pytest.importorskip("torch")
    found = library.load()
    assert found.path is None and found.why_absent(UP.config) is None
    function = found.function(UP)
    assert found.function(UP) is function and UP.symbol in found.kernels
    found.can_compile = False
    other = Variant("up", CuteConfig("two", "fp8", 32, 64, 4, 4))
    assert other.symbol in found.why_absent(other.config)
    with pytest.raises(ConfigError, match=f"The kernel {other.symbol} cannot be used"):
        found.function(other)


def build_all(variants, tmp_path, monkeypatch):
    """Builds into a folder of the test's, or of $RAMPWRAP_CUTE_LIBRARY, where the library is left."""
    folder = os.environ.get(library.VARIABLE)
    if folder is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = building.build(variants, pathlib.Path(folder) if folder else tmp_path / "out")
    print(done)
    assert done.refused == {} and done.kernels == len(variants)


@needs_dsl
@pytest.mark.slow
def test_tiles_compile_and_pass_the_gate(tmp_path, monkeypatch):
    """Of each width and number of warps the most tokens, where registers are scarcest, the fewest, and every third between.

    Each with its deepest pipeline, which takes the most shared memory; fewer stages change a constant in the same code. Neighbours
    differ by eight rows of accumulators: a second to compile, and every third is an odd and an even multiple of eight in turn. Ragged ones
    take ten seconds each: `samples` has the one with the most accumulators of each dtype, `make kernels` and a release the others.
    """
    deepest, tiles = {}, {}
    fixed = [form for form in FORMS if form != "ragged"]
    for variant in sorted(all_variants(fixed), key=lambda variant: variant.config.stages):
        deepest[variant.role, attrs.evolve(variant.config, stages=2)] = variant
    for variant in sorted(deepest.values(), key=lambda variant: -variant.config.block_m):
        its = variant.config
        tiles.setdefault((variant.role, its.dtype, its.block_n, its.warp_n), []).append(variant)
    chosen = dict.fromkeys(variant for tile in tiles.values() for variant in [*tile[::3], tile[-1]])
    assert len(tiles) == 30 and 2 * len(tiles) < len(chosen) < 0.6 * len(deepest)
    build_all(list(chosen), tmp_path, monkeypatch)


@needs_dsl
@pytest.mark.release
def test_every_config_compiles_and_passes_the_gate(tmp_path, monkeypatch):
    """The whole list, as it is released."""
    build_all(all_variants(), tmp_path, monkeypatch)
