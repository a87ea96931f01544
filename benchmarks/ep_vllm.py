"""vLLM with data parallel attention and experts over all ranks, rows through shared memory against its own way: both in one engine.

    python benchmarks/ep_vllm.py --ranks 2 --gpus 0 1 --out OUT.json

One process a rank, as vLLM's offline data parallel example has it; dummy weights behind a config.json that this script writes. The
engine starts with RAMPWRAP_VLLM_GATHER=1 and captures its decode graphs; then our exchange is put aside and they are captured
once more, over NCCL. From then on a turn swaps the graphs, so that all turns of both sides meet the same processes, GPUs, clocks and host.
Between turns no engine runs: a call ends on all ranks at the same step, a multiple of 32.

Told of each batch, medians over turns and the quartiles of the ratio of neighbouring turns:

    graph    GPU time of a step's CUDA graph, by events, on the rank that waits least for others
    step     from the begin of a graph to that of the next: wall clock of a step, on the slowest rank
    rows     of one more turn under torch's profiler, on rank 0: kernels that move rows, waiting included, and all others

and how many sequences have the same tokens on both sides, beside how many have in two turns of NCCL. Rows are printed as they come, and what
there is when the time is up is judged. Needs vLLM importable, 0.26 or later.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS = 27
"Of output: with the prompt's step and two to spare, not more than 32 steps."
PROMPT = 16
SIDES = ("nccl", "ours")


def order(turns: int) -> list[str]:
    """Sides in turn, neighbours changing who is first: so few swaps, and a drift of the host meets both."""
    return [side for turn in range(turns) for side in (SIDES if turn % 2 == 0 else SIDES[::-1])]


def run_rank(arguments: argparse.Namespace) -> None:
    """One rank: a line of JSON a turn."""
    import numpy as np
    import torch.distributed as dist
    import vllm

    ranks, rank, most = arguments.ranks, arguments.rank, max(arguments.batch_size)
    limit = timedelta(seconds=arguments.seconds)
    store = dist.TCPStore("127.0.0.1", arguments.port, ranks, rank == 0, timeout=limit, wait_for_workers=False)
    while not (pathlib.Path(arguments.model) / "config.json").exists():
        time.sleep(0.1)
    met = 0

    def meet(said: str = "") -> str:
        """All ranks; what rank 0 said."""
        nonlocal met
        met += 1
        if rank == 0:
            store.set(f"said {met}", said)
        store.set(f"here {met} {rank}", "1")
        store.wait([f"here {met} {other}" for other in range(ranks)])
        return str(store.get(f"said {met}").decode())

    def say(**row: Any) -> None:
        print(json.dumps({"at_s": round(time.monotonic() - arguments.began, 1), **row}), file=out, flush=True)

    compilation = {"cudagraph_mode": arguments.graphs} | ({"mode": 0} if arguments.plain else {})
    with arguments.rows.open("w") as out:
        llm = vllm.LLM(
            model=arguments.model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=most,
            max_num_batched_tokens=max(2048, PROMPT * most),
            kv_cache_memory_bytes=2 << 30,
            gpu_memory_utilization=0.1,
            enable_prefix_caching=False,
            enable_expert_parallel=True,
            tensor_parallel_size=1,
            moe_backend="triton",
            cudagraph_capture_sizes=sorted(arguments.batch_size),
            compilation_config=compilation,
            worker_extension_cls="ep_vllm_worker.Sides",
        )
        say(what="started", vllm=vllm.__version__, **ask(llm, "rows_side", ""))
        meet()
        say(what="captured", **ask(llm, "rows_side", "nccl"))
        now, longest, refused = "nccl", 0.0, []
        for batch in arguments.batch_size:
            start = time.monotonic()
            if meet("go" if start + 1.2 * longest < arguments.began + arguments.seconds - 4 else "no time") != "go":
                refused.append(batch)
                continue
            rng = np.random.default_rng([rank, batch])
            prompts = [{"prompt_token_ids": rng.integers(10, 50000, PROMPT).tolist()} for _ in range(batch)]
            params = vllm.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
            steps = order(arguments.turns)
            plan = [("warm", steps[0]), *(("turn", side) for side in steps), *(("profile", side) for side in SIDES)]
            for number, (what, side) in enumerate(plan):
                if side != now:
                    meet()
                    ask(llm, "rows_side", side)
                    now = side
                meet()
                ask(llm, "rows_begin", what == "profile" and rank == 0)
                outputs = llm.generate(prompts, params, use_tqdm=False)
                tokens = [[int(its) for its in one.outputs[0].token_ids] for one in outputs]
                row = {"what": what, "batch": batch, "side": side, "turn": number, "rank": rank}
                say(**row, tokens=tokens, **ask(llm, "rows_end"))
            longest = time.monotonic() - start
        say(what="done", refused=refused)
        meet()
    time.sleep(1.0 if rank == 0 else 0.0)  # the store of all ranks lives here
    os._exit(0)  # engines take ten seconds to end


def ask(llm: Any, method: str, *arguments: Any) -> dict[str, Any]:
    """What a method of `ep_vllm_worker.Sides` answers, on the only worker of this rank."""
    return dict(llm.collective_rpc(method, args=arguments)[0] or {})


def quartiles(values: list[float]) -> list[float]:
    """The 25th percentile, the median and the 75th."""
    if len(values) < 2:
        return [*values * 3]
    return statistics.quantiles(values, n=4, method="inclusive")


def judged(rows: list[dict[str, Any]], batch: int, ranks: int) -> dict[str, Any] | None:
    """Both sides at a batch, of the turns that all ranks have; None without one of each side."""
    turns: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["what"] == "turn" and row["batch"] == batch and row["graph_ms"] and row["step_ms"]:
            turns.setdefault(row["turn"], []).append(row)
    whole = [found for _, found in sorted(turns.items()) if len(found) == ranks]
    measured: dict[str, dict[str, list[float]]] = {side: {"graph": [], "step": []} for side in SIDES}
    tokens: dict[str, list[list[list[int]]]] = {side: [] for side in SIDES}
    for found in whole:
        side = measured[found[0]["side"]]
        side["graph"].append(min(statistics.median(its["graph_ms"]) for its in found))
        side["step"].append(max(statistics.median(its["step_ms"]) for its in found))
        by_rank = sorted(found, key=lambda its: its["rank"])
        tokens[found[0]["side"]].append([line for its in by_rank for line in its["tokens"]])
    if not all(its["graph"] for its in measured.values()):
        return None
    out: dict[str, Any] = {"batch": batch, "turns": [len(measured[side]["graph"]) for side in SIDES]}
    for what in ("graph", "step"):
        nccl, ours = (measured[side][what] for side in SIDES)
        out |= {f"{what}_ms": {side: quartiles(measured[side][what]) for side in SIDES}}
        out |= {f"{what}_ratio": quartiles([a / b for a, b in zip(nccl, ours, strict=False)])}
    first = tokens["nccl"][0]
    pairs = list(zip(tokens["nccl"], tokens["ours"], strict=False))
    out["same"] = [
        sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True)),
        len(pairs) * len(first),
    ]
    again = tokens["nccl"][1:]
    out["nccl_same"] = [sum(a == b for one in again for a, b in zip(first, one, strict=True)), len(again) * len(first)]
    profiled = [row for row in rows if row["what"] == "profile" and row["batch"] == batch and "kernels" in row]
    out["kernels"] = {row["side"]: row["kernels"] for row in profiled}
    return out


def line(its: dict[str, Any]) -> str:
    """A batch in words."""
    parts = [f"batch {its['batch']:>4} a rank:"]
    for what in ("graph", "step"):
        nccl, ours = (its[f"{what}_ms"][side][1] for side in SIDES)
        low, middle, high = its[f"{what}_ratio"]
        parts.append(f"{what} {nccl:.3f} -> {ours:.3f} ms, {middle:.3f}x [{low:.3f}, {high:.3f}];")
    same, nccl_same = its["same"], its["nccl_same"]
    parts.append(f"same tokens {same[0]}/{same[1]}, NCCL again {nccl_same[0]}/{nccl_same[1]};")
    for side, found in its["kernels"].items():
        us, launches = found["us"], found["launches"]
        moved = us["nccl"] + us["ours"]
        parts.append(
            f"{side}: rows {moved:.0f} us in {launches['nccl'] + launches['ours']:.0f} launches ({us['nccl']:.0f} by NCCL),"
            f" others {us['other']:.0f} us;"
        )
    return " ".join(parts)


def environment(arguments: argparse.Namespace, rank: int, port: int, site: pathlib.Path) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(site), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": ",".join(arguments.gpus[: arguments.ranks]),
        "RAMPWRAP_VLLM_GATHER": "1",
        # vLLM's own experts on both sides.
        "RAMPWRAP_PLANS_ONLY": "1",
        "RAMPWRAP_OWN_PLANS": "1",
        "VLLM_DP_RANK": str(rank),
        "VLLM_DP_RANK_LOCAL": str(rank),
        "VLLM_DP_SIZE": str(arguments.ranks),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(port),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_DEEP_GEMM": "0",
        "HF_HUB_OFFLINE": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read(paths: list[pathlib.Path]) -> list[dict[str, Any]]:
    """Whole lines of what ranks have said."""
    found = []
    for path in paths:
        text = path.read_text() if path.exists() else ""
        found += [json.loads(said) for said in text.split("\n")[:-1]]
    return found


def watch(arguments: argparse.Namespace, started: list[Any], paths: list[pathlib.Path], deadline: float) -> list[Any]:
    """Prints batches as they are complete, until all ranks are done, one has failed, or the time is up; all rows."""
    printed: set[int] = set()
    while True:
        codes = [process.poll() for process in started]
        over = time.monotonic() > deadline or any(codes) or None not in codes
        rows = read(paths)
        for batch in arguments.batch_size:
            ended = [row for row in rows if row["what"] == "profile" and row["batch"] == batch]
            whole = len(ended) == len(SIDES) * arguments.ranks
            if batch not in printed and (whole or over) and (found := judged(rows, batch, arguments.ranks)):
                printed.add(batch)
                print(line(found), flush=True)
        if over:
            print("exit codes", [process.poll() for process in started], flush=True)
            return rows
        time.sleep(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b", help="of serve_vllm.py, or with --rank a folder")
    parser.add_argument("--layers", type=int, default=24, help="of the model's")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpus", nargs="+", default=[str(gpu) for gpu in range(8)])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[32, 8, 128, 1, 64], help="a rank; in this order")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument(
        "--graphs", default="FULL_DECODE_ONLY", help="vLLM's cudagraph_mode; its default takes longer to capture"
    )
    parser.add_argument("--plain", action="store_true", help="without torch.compile, which takes half a minute")
    parser.add_argument("--seconds", type=float, default=135.0, help="after which whatever runs is ended")
    parser.add_argument("--logs", type=pathlib.Path, help="folder for what engines say")
    parser.add_argument("--out", type=pathlib.Path, help="file of results")
    for name, kind in ("rank", int), ("port", int), ("began", float), ("rows", pathlib.Path):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.rank is not None:
        return run_rank(arguments)
    began = time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp())
    logs = arguments.logs or folder
    for part in (folder / "model", folder / "site/rampwrap-0.dist-info", logs):
        part.mkdir(parents=True, exist_ok=True)
    point = "[vllm.general_plugins]\nrampwrap = rampwrap.engines.vllm:register\n"
    (folder / "site/rampwrap-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: rampwrap\nVersion: 0\n")
    (folder / "site/rampwrap-0.dist-info/entry_points.txt").write_text(point)
    port, own_port = free_port(), free_port()
    started, paths = [], []
    for rank in range(arguments.ranks):
        paths.append(logs / f"rank{rank}.jsonl")
        paths[-1].unlink(missing_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--model", str(folder / "model"), "--rank", str(rank)]
        command += ["--port", str(own_port), "--began", str(began), "--rows", str(paths[-1])]
        with (logs / f"rank{rank}.log").open("w") as log:
            its = environment(arguments, rank, port, folder / "site")
            started.append(subprocess.Popen(command, env=its, stdout=log, stderr=log, start_new_session=True))
    # While engines are imported.
    from common import stamp
    from serve_vllm_setup import MODELS

    config = MODELS[arguments.model].config | {"num_hidden_layers": arguments.layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "config.json").rename(folder / "model/config.json")
    rows: list[Any] = []
    try:
        rows = watch(arguments, started, paths, began + arguments.seconds)
    finally:
        for process in started:  # workers outlive an engine that was cut off, and keep its memory
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = [row for row in rows if row["what"] in ("started", "captured", "done")]
    for row in said:
        print(json.dumps(row), flush=True)
    if not any(row["what"] == "done" for row in said):
        text = (logs / "rank0.log").read_text(errors="replace").splitlines()
        wrong = [its for its in text if "Error" in its and "root cause" not in its][:3]
        print("\n".join(its[:300] for its in [*wrong, *text[-6:]]), flush=True)
    batches = [found for batch in arguments.batch_size if (found := judged(rows, batch, arguments.ranks))]
    if arguments.out:
        raw = [{name: its for name, its in row.items() if name != "tokens"} for row in rows]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(stamp() | {"said": said, "batches": batches, "rows": raw}))


if __name__ == "__main__":
    main()
