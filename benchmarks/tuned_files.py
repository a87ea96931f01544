"""Every tuned file of vLLM's and SGLang's wheels through the reader, and judged on simulated tables; no GPU, no engine.

    python benchmarks/tuned_files.py --wheels DIR --out results/cpu-tuned_files.json

Downloads the wheels with pip (0.7 GB; those already in DIR are taken) and reads their JSON files where they lie. Each file
of a fused MoE layer is read for a table of vLLM's kernel, for the layer, dtype and GPU that its name says:

    own     with the configs that our adapter profiles and those of the file, as it does where it finds the file
    list    with the adapter's configs alone, as on a machine without the file
    triton  of our Triton kernel, which has to be refused with where to judge the file
    other   for another layer, which has to be refused too

What is read is compared with the engines' own rule, written down here once more: the entry with the nearest number of
tokens, Triton's defaults where it names none, tiles cut to the scale block. A file fails if anything but one sentence of a
RampwrapError comes back, or another config. The other JSON files of the engines have to be refused. Exits 1 on a failure.
"""

import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.adapters import vllm_fused_moe
from rampwrap.compare import evaluate as compare
from rampwrap.compare.oracle import Oracle
from rampwrap.errors import RampwrapError
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.moe import configs as ours
from rampwrap.measure.timings import Timings
from rampwrap.policy.policies import Static
from rampwrap.policy.static import read_measured
from rampwrap.policy.tuned_file import TunedFile
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid

PACKAGES = ("vllm==0.26.0", "vllm==0.33.0", "sglang==0.5.23")
DTYPES = {"": "bf16", "bf16": "bf16", "fp8_w8a8": "fp8", "float8": "fp8"}
TRITON = {"GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
TOKENS = (1, 3, 12, 24, 48, 96, 384, 1000, 1536, 3072, 5000)
ROUTINGS = ("uniform", "dirichlet:0.2")


def wheels(folder: pathlib.Path, packages: Sequence[str]) -> dict[str, pathlib.Path]:
    """The wheel of each package, downloaded where it is not in the folder."""
    found = {}
    for package in packages:
        pattern = package.replace("==", "-") + "-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
            subprocess.run([*command, "--dest", str(folder), package], check=True)
        found[package] = next(iter(folder.glob(pattern)))
    return found


def json_files(wheel: pathlib.Path, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The config files of a wheel, unpacked into the folder as they lie in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".json") and "configs/" in name]
        archive.extractall(folder, names)
    yield from sorted(folder / name for name in names)


def layer(name: str) -> tuple[MoEShape, str, str] | None:
    """Shape, kernel and GPU that a file is named for; None where it is no fused MoE layer's."""
    if (found := re.fullmatch(r"E=(\d+),N=(\d+),device_name=([^,]*?)((?:,.*)?)\.json", name)) is None:
        return None
    said = re.search(r",dtype=(\w+?)(?:_down)?(?=,|$)", found[4])
    dtype = DTYPES.get(said[1] if said else "", "other")
    experts = int(found[1])
    kernel = "vllm_fused_moe" if dtype != "fp8" or "block_shape" in found[4] else "vllm_fused_moe_per_tensor"
    shape = MoEShape(experts, min(8, experts), 2048, int(found[2]), "bf16" if dtype == "other" else dtype)
    return shape, kernel, found[3].removesuffix("_down").replace("_", " ") or "simulated"


def table(shape: MoEShape, kernel: str, device: str, configs: Sequence[Config]) -> Timings:
    """Simulated times: a padded row costs by its tile, a stage or a warp next to nothing, no two configs the same."""
    rows = workload_grid(TOKENS, [Routing.parse(name) for name in ROUTINGS])
    topk = [row.topk_ids(shape.num_experts, shape.top_k) for row in rows]
    counts = np.stack([expert_counts(ids, shape.num_experts) for ids in topk])
    tile = np.array([config.get("BLOCK_SIZE_M", config.get("block_m")) for config in configs])
    blocks = -(-counts[:, :, None] // tile).sum(axis=1)
    us = 20.0 + blocks * (1.0 + tile / 32) + np.arange(len(configs)) * 1e-3
    names = (tuple(row.split for row in rows), tuple(row.label for row in rows))
    grids = tuple(CtaGrid(int(block_m), 8) for block_m in tile)
    return Timings(us, counts, *names, kernel, attrs.evolve(SIMULATED, name=device), shape, tuple(configs), grids)


def plain(entry: dict[str, Any]) -> dict[str, Any]:
    """What the engine launches of an entry, in vLLM's keys."""
    return {key: entry[key] if key in entry else TRITON[key] for key in vllm_fused_moe.KEYS}


def listed(shape: MoEShape, entries: Sequence[dict[str, Any]]) -> list[Config]:
    """The adapter's configs of a dtype and those of a file that it can run."""
    rows = {tuple(config.values()): config for config in vllm_fused_moe.CONFIGS[shape.dtype]}
    for entry in entries:
        if set(entry) >= set(vllm_fused_moe.KEYS) - set(TRITON):
            config = plain(entry)
            cut = {**config, "BLOCK_SIZE_K": min(128, config["BLOCK_SIZE_K"])} if shape.dtype == "fp8" else config
            if vllm_fused_moe.refusal(cut, shape.dtype) is None:
                rows[tuple(config.values())] = config
    return list(rows.values())


def wrong(path: pathlib.Path, timings: Timings) -> tuple[str, int, int]:
    """How a file is read for a table: ``""`` or what is wrong with it; its entries, and those left out."""
    read = read_measured(path, timings)
    stated = json.loads(path.read_text(encoding="utf-8"))
    raw = {int(key): value for key, value in stated.items() if key.isdigit()}
    if read.file is None or set(read.file.left_out) | set(read.token_counts) != set(raw):
        return "entries are missing unsaid", len(raw), 0
    known = {count: entry for count, entry in raw.items() if count not in read.file.left_out}
    blocks = re.search(r"block_shape=\[(\d+)", path.name)
    policies = {"uniform": Oracle(timings), "file": Static(timings.configs, read)}
    judged = compare.evaluate(timings, policies, "uniform")
    have = {tuple(config.values()) for config in timings.configs}
    halfway = TunedFile.read(path).halfway if any("do not ascend" in note for note in read.file.notes) else ()
    for row, tokens in enumerate(timings.num_tokens):
        if tokens in halfway:
            continue  # told
        config = plain(known[min(known, key=lambda count: abs(count - tokens))])
        if blocks and tuple(config.values()) not in have:
            config["BLOCK_SIZE_K"] = min(config["BLOCK_SIZE_K"], int(blocks[1]))
        if timings.configs[judged.picks["file"][row]] != config:
            return f"at {tokens} tokens it is {timings.configs[judged.picks['file'][row]]}, not {config}", len(raw), 0
        if judged.us("file")[row] != timings.us[row, timings.configs.index(config)]:
            return f"at {tokens} tokens another time", len(raw), 0
    left_out = bool(read.file.left_out)
    told = any("entries (" in note for note in read.file.notes)
    if left_out and not told:
        return "left out unsaid", len(raw), len(read.file.left_out)
    if any("another GPU" in note for note in read.file.notes):
        return "its own GPU is another", len(raw), len(read.file.left_out)
    return "", len(raw), len(read.file.left_out)


def reason(error: RampwrapError) -> str:
    """A sentence without what differs from file to file."""
    text = re.sub(r"^/?\S.*?\.json(?= (?:is|holds|cannot|names|has))", "FILE", str(error))
    text = re.sub(r"\b([EN])=\d+", r"\1", re.sub(r" \([^()]*tokens: [^()]*\)| \([\d, .]+ tokens\)", "", text))
    return re.sub(r"\b\d+ of \d+\b", "n of m", re.sub(r"dtype (?!int|float|fp4|bf16|fp8)\S+", "dtype", text))


def judge(path: pathlib.Path, counts: dict[str, collections.Counter[str]], failures: list[str]) -> None:
    """All trials of one file, counted."""

    def tried(kind: str, timings: Timings, *, refuse: str = "") -> None:
        try:
            what, entries, left_out = wrong(path, timings)
        except RampwrapError as error:
            told = reason(error)
            if "\n" in str(error) or (refuse and not re.search(refuse, str(error))):
                failures.append(f"{path} ({kind}): {error}")
            counts[kind][f"refused: {told}"] += 1
        except Exception as error:
            failures.append(f"{path} ({kind}): {type(error).__name__}: {error}")
        else:
            counts[kind]["read in part" if left_out else "read whole"] += 1
            counts[kind]["entries"] += entries
            counts[kind]["entries left out, and said"] += left_out
            if what or refuse:
                failures.append(f"{path} ({kind}): {what or 'was not refused'}")

    found = layer(path.name)
    if found is None:
        shape = MoEShape(64, 8, 2048, 1024)
        tried("no layer", table(shape, "vllm_fused_moe", "simulated", listed(shape, [])), refuse=".")
        return
    shape, kernel, device = found
    entries = [value for value in json.loads(path.read_text(encoding="utf-8")).values() if isinstance(value, dict)]
    tried("own", table(shape, kernel, device, listed(shape, entries)))
    tried("list", table(shape, kernel, device, listed(shape, [])))
    swapped = ours.CONFIGS[shape.dtype][:3]
    tried("triton", table(shape, "triton_fused_moe", device, swapped), refuse="another kernel|another layer|down GEMM")
    other = attrs.evolve(shape, intermediate_size=shape.intermediate_size + 64)
    tried("other", table(other, kernel, device, listed(shape, entries)[:3]), refuse="another layer|down GEMM")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=pathlib.Path, help="folder of the wheels; a temporary one by default")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME==VERSION")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    found: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for package, wheel in wheels(a.wheels or pathlib.Path(scratch), a.packages).items():
            counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
            files = list(json_files(wheel, pathlib.Path(scratch, package)))
            for path in files:
                judge(path, counts, failures)
            layers = sum(layer(path.name) is not None for path in files)
            found[package] = {"layers": layers, "others": len(files) - layers, **counts}
            print(f"{package}: {layers} tuned files of fused MoE layers, {len(files) - layers} others")
            for kind, its in counts.items():
                print(f"  {kind}")
                for what, times in sorted(its.items(), key=lambda item: (item[0].startswith("refused"), -item[1])):
                    print(f"    {times:6}  {what}")
    for failure in failures:
        print(f"FAILURE {failure}")
    print(f"{len(failures)} failures")
    if a.out:
        a.out.write_text(json.dumps(found | {"failures": failures}, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
