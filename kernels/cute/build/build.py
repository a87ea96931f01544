"""Compiles the kernels ahead of time, in processes of their own, and links them into one shared library; needs no GPU.

Object files are cached by the source of the kernels, the version of the CuTe DSL and the config; each appears under its
name only when it is whole, so a build that was killed goes on where it stopped.
"""

import concurrent.futures as futures
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext

import attrs

from rampwrap import files
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernels.common.workers import main_hidden
from rampwrap.kernels.cute.build import gate
from rampwrap.kernels.cute.configs import Variant, all_variants

ARCH = "sm_90a"
LIBRARY = "rampwrap_cute.so"
MANIFEST = "rampwrap_cute.json"
GET_DSL = "pip install 'rampwrap[cute]'"
# A worker holds about 450 MB, and a little more with each kernel it compiled: after so many there are new ones.
# (The pool's own max_tasks_per_child hangs in Python 3.11.)
TASKS_PER_WORKER = 200
# A kernel on which the compiler itself died twice is refused; once may be bad luck of its neighbours.
MOST_CRASHES = 2

# The runtime archive of the DSL lacks two functions that its full library has: errors of a launch become Python's.
STUB = """
extern "C" {
void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
const char* cudaGetErrorString(int error);
void CuteDSLRT_TVMFFISetRaisedCudaError(int error) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", cudaGetErrorString(error));
}
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(int error) { CuteDSLRT_TVMFFISetRaisedCudaError(error); }
}
"""
CUDART = "libcudart.so.13"
"Comes with torch at run time; an empty library of that name stands in when we link."


@attrs.frozen
class Build:
    """What a build did."""

    library: pathlib.Path
    kernels: int
    "In the library."
    built: int
    "Compiled by this build."
    cached: int
    "Compiled by an earlier one."
    refused: dict[str, str]
    "By symbol, why a kernel is not in the library."
    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.library}: {self.kernels} kernels, {self.num_bytes / 1e6:.1f} MB "
            f"({self.built} built, {self.cached} from cache, {len(self.refused)} refused) in {self.seconds:.1f} s"
        ]
        lines += [f"  refused {symbol}: {reason}" for symbol, reason in self.refused.items()]
        return "\n".join(lines)


@functools.cache
def source_digest() -> str:
    """Digest of all that decides what is compiled: the folder `device`, the configs and how they are traced."""
    digest = hashlib.sha256(ARCH.encode())
    cute = pathlib.Path(__file__).parents[1]
    others = [cute / "configs.py", cute / "build" / "emit.py"]
    for path in [*sorted((cute / "device").glob("*.py")), *others]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> pathlib.Path:
    """Where object files and libraries are kept: ``cute`` in rampwrap's cache."""
    return files.cache_folder() / "cute"


def default_folder() -> pathlib.Path:
    """Where the library of this source is built, and looked for."""
    return cache_folder() / source_digest()


def dsl_version() -> str | None:
    """Version of the installed CuTe DSL; None without one."""
    if importlib.util.find_spec("cutlass") is None or importlib.util.find_spec("tvm_ffi") is None:
        return None
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return None


def build(
    variants: Iterable[Variant] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Build:
    """Compiles kernels and links them into ``out/rampwrap_cute.so``, with a list of them beside it.

    Args:
        variants: what to compile; every kernel of every config by default.
        out: a folder, made where absent; `default_folder` by default, where the adapter looks.
        processes: that compile at a time; one for each CPU by default.
        progress: told how many of how many kernels are there, after each.

    Raises:
        InputError: the CuTe DSL or a C++ compiler is not installed, the folder cannot be written, or no process that
            compiles can be started.
        ConfigError: not one kernel could be built.
    """
    start = time.monotonic()
    version = dsl_version()
    if version is None:
        raise InputError(f"the CuTe DSL is not installed; get it with {GET_DSL}.")
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        raise InputError("no C++ compiler was found to link the kernels; install g++.")
    wanted = list(dict.fromkeys(all_variants() if variants is None else variants))
    objects = cache_folder() / "objects" / f"{source_digest()}-{version}"
    folder = pathlib.Path(out) if out is not None else default_folder()
    files.make_folder(objects, "set XDG_CACHE_HOME")
    files.make_folder(folder, "give another --out")
    missing = [variant for variant in wanted if not (objects / f"{variant.symbol}.o").exists()]
    failures = _compile_all(missing, objects, processes or os.cpu_count() or 1, len(wanted), progress)
    refused, kept = dict(failures), []
    found: dict[str, dict[str, object]] = {}
    for variant in wanted:
        if variant.symbol in failures:
            continue
        path = objects / f"{variant.symbol}.o"
        inspection = gate.inspect(gate.cubin(path.read_bytes()))
        reason = gate.why_unfit(inspection, variant)
        if reason is not None:
            refused[variant.symbol] = reason
            continue
        kept.append(path)
        found[variant.symbol] = attrs.asdict(inspection)
    if not kept:
        raise ConfigError(
            f"none of {len(wanted)} kernels could be built: {next(iter(refused.items()), 'none asked for')}."
        )
    library = _link(compiler, kept, folder)
    seconds = time.monotonic() - start
    num_bytes = library.stat().st_size
    manifest = {
        "source": source_digest(),
        "dsl": version,
        "arch": ARCH,
        "num_bytes": num_bytes,
        "kernels": found,
        "refused": refused,
    }
    with files.replacing(folder / MANIFEST) as stream:
        stream.write(json.dumps(manifest, indent=1).encode() + b"\n")
    built = len(missing) - len(failures)
    return Build(library, len(kept), built, len(wanted) - len(missing), refused, seconds, num_bytes)


def _compile_all(
    missing: Sequence[Variant],
    objects: pathlib.Path,
    processes: int,
    total: int,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Compiles into `objects`; by symbol, why one could not be."""
    failures: dict[str, str] = {}
    crashes: dict[Variant, int] = {}
    left = list(missing)
    progress(total - len(left), total)
    if left and multiprocessing.current_process().daemon:
        raise InputError(
            f"{len(left)} CuTe kernels must be compiled, and a daemonic process may start none that compile; run "
            "'rampwrap build-kernels' before."
        )
    # The DSL is not thread-safe; processes are started anew because a fork would inherit torch's threads.
    context = multiprocessing.get_context("spawn")
    while left:
        # After a crash one at a time, so that the one that crashes is known.
        workers = 1 if crashes else min(processes, len(left))
        done: set[Variant] = set()
        broken = False
        with futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
            try:
                with main_hidden():  # all processes of the pool start inside `submit`
                    some = left[: workers * TASKS_PER_WORKER]
                    running = {pool.submit(_compile, variant, objects): variant for variant in some}
                for future in futures.as_completed(running):
                    variant, reason = running[future], future.result()
                    done.add(variant)
                    if reason is not None:
                        failures[variant.symbol] = reason
                    progress(total - len(left) + len(done), total)
            except BrokenProcessPool:
                broken = True
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        left = [v for v in left if v not in done and not (objects / f"{v.symbol}.o").exists()]
        if broken and left:
            if not done:
                _check_processes(context)
            # Each may die after its file was whole, so the first without a file is the one it died on.
            suspect = left[0]
            crashes[suspect] = crashes.get(suspect, 0) + 1
            if crashes[suspect] >= MOST_CRASHES:
                failures[suspect.symbol] = "The compiler died on it twice; report it with the config."
                left.remove(suspect)
        if broken:
            progress(total - len(left), total)
    return failures


def _check_processes(context: BaseContext) -> None:
    """Whether a process that compiles starts at all, so that no kernel is blamed for one that does not.

    Raises:
        InputError: it dies.
    """
    with futures.ProcessPoolExecutor(1, mp_context=context, initializer=_prepare) as pool:
        try:
            with main_hidden():
                started = pool.submit(os.getpid)
            started.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"the processes that compile the CuTe kernels die when they start ({error}); what they wrote to stderr "
                "says why, or run 'rampwrap build-kernels' from a shell."
            ) from error


def _prepare() -> None:
    # Read by the DSL when it is imported, which is why it must not be before.
    os.environ["CUTE_DSL_ARCH"] = ARCH


def _compile(variant: Variant, objects: pathlib.Path) -> str | None:
    """In a worker: compiles one kernel into `objects`; why it could not be, or None."""
    from rampwrap.kernels.cute.build import emit

    with tempfile.TemporaryDirectory(dir=objects) as folder:
        try:
            made = emit.compile_variant(variant, pathlib.Path(folder))
            gate.inspect(gate.cubin(made.read_bytes()))
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            return f"It cannot be compiled: {type(error).__name__}: {text}"
        made.replace(objects / f"{variant.symbol}.o")
    return None


def _link(compiler: str, objects: Sequence[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    import tvm_ffi

    runtime = _runtime_archive()
    ffi = next(pathlib.Path(tvm_ffi.__file__).parent.rglob("libtvm_ffi.so"))
    target = folder / LIBRARY
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        here = pathlib.Path(scratch)
        (here / "stub.cc").write_text(STUB, encoding="utf-8")
        (here / "cudart.cc").write_text("", encoding="utf-8")
        # Hundreds of paths are more than some command lines hold.
        (here / "objects").write_text("".join(f'"{path}"\n' for path in objects), encoding="utf-8")
        for arguments in (
            ("-shared", "-fPIC", f"-Wl,-soname,{CUDART}", "-o", CUDART, "cudart.cc"),
            ("-fPIC", "-c", "stub.cc"),
            # Lazy: the functions of the CUDA runtime are found when torch has loaded it.
            (
                *("-shared", "-s", "-o", LIBRARY, "@objects", "stub.o", str(runtime)),
                *("-Wl,--no-as-needed", f"./{CUDART}", str(ffi), "-Wl,-z,lazy"),
            ),
        ):
            done = subprocess.run([compiler, *arguments], cwd=here, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(f"the kernels cannot be linked: {done.stderr.strip()[-300:]}")
        (here / LIBRARY).replace(target)
    return target


def _runtime_archive() -> pathlib.Path:
    """The DSL's static runtime: what a kernel calls to load and launch itself."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    places = [pathlib.Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(path for place in places for path in place.rglob("libcuda_dialect_runtime_static.a"))
    if not found:
        raise InputError(f"the CuTe DSL has no libcuda_dialect_runtime_static.a; get a whole one with {GET_DSL}.")
    # That of the newest CUDA: its folder is cu13, an older one cu12.
    return found[-1]
