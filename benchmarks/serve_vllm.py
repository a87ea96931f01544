"""vLLM with the plugin against vLLM without it, end to end: output tokens/s and time per token, one or more GPUs.

    python benchmarks/serve_vllm.py --models olmoe --batch-size 8 32 64 128 256 512 --routing uniform dirichlet:0.1 --out OUT.json

Dummy weights behind a config.json that this script writes, routing by vLLM's own simulation hook, default CUDA graphs.
Arms, each an engine in a process of its own:

    installed   vLLM as it comes, with the table it ships for the shape where there is one
    static      vLLM with a table tuned under uniform routing and exported for it (VLLM_TUNED_CONFIG_FOLDER)
    deep_gemm   vLLM told to run its experts on DeepGEMM (with --deep-gemm, which leaves DeepGEMM on in all arms)
    vllm_triton vLLM told to run its experts on Triton: its own choice but for FP8 by channel and experts over ranks
    plugin_triton  as plugin, without the CuTe kernels: after 'pip install rampwrap' and nothing else
    plugin_defaults  as plugin, without any plan
    plugin      vLLM with rampwrap and a plan, and nothing else changed

vllm_triton, plugin_triton and plugin_defaults run where they are asked for. An engine that does not start is left out, and the others are
measured. As many engines of a model as fit live on one GPU at the same time and are measured in turn, so that all see the
same clocks; only one runs at a time. `--cpus` drives all engines of a turn from the quietest of some CPUs: on a shared host
the same engine takes 12 or 20 ms a step at 512 sequences, depending on its CPU. `--restart` starts the plugin's engine
and the installed one once more at the end, each alone on the GPU, for the start-up cost with warm caches and the memory
that the driver sees. `--cold` makes the first start one of a new machine: what the plugin does by itself, and what Triton
compiles of ours in the engine more than of vLLM's. Needs vLLM importable, 0.26 or later; models are spread over the GPUs given with `--gpus`. The model
with FP8 blocks needs the CuTe kernels (`rampwrap build-kernels`, $RAMPWRAP_CUTE_LIBRARY), those with FP8 channels
or static activations a plan that is made in the run (`--profile-budget 60`), or none (`--shipped-plans`).
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from serve_vllm_report import report
from serve_vllm_setup import (
    ARMS,
    MODELS,
    PLUGINS,
    device_on,
    environment_of,
    free_gb,
    match,
    needed_gb,
    prepare,
    requests_of,
    settings_of,
)

from rampwrap.kernel.device import Device

PROFILED = 6
"Steps of a cell that run under torch's profiler."


class Arm:
    """An engine in a process of its own."""

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        environment: dict[str, str],
        log: pathlib.Path,
        script: Sequence[str] = ("serve_vllm_arm.py",),
    ) -> None:
        self.name, self.log = name, log
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).parent / script[0]), *script[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self._send(settings)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the engine of arm {self.name!r} ended with {self._process.returncode}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def started(self) -> dict[str, Any]:
        """Waits for the engine; how long it took, and its memory."""
        return self._receive() | {"wall_s": time.monotonic() - self._start}

    def __call__(self, do: str, **more: Any) -> dict[str, Any]:
        self._send({"do": do, **more})
        return self._receive()

    def stop(self) -> None:
        if self._process.poll() is None:
            try:
                self._send({"do": "quit"})
                self._process.wait(20)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()


def say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:4.0f}s] {text}", flush=True)


def attached(arm: Arm, device: Device) -> list[str]:
    """The plans, or defaults, that an engine with the plugin serves; an error with its words where there are none."""
    engines = [its for its in arm("choices")["engines"] if its["layers"]]
    if not engines:
        said = [line for line in arm.log.read_text(errors="replace").splitlines() if "rampwrap" in line]
        raise RuntimeError(f"{arm.name} attached to no layer: " + "; ".join(said[-3:] or ["it says nothing"]))
    by_plans = [f"{its['layers']} layers, {match(path, device)}" for its in engines for path in its["plans"]]
    return by_plans + [
        f"defaults of {' and '.join(its['kernels'])} for {shape} on {device.label}, without a plan"
        for its in engines
        for shape in its.get("defaults", ())
    ]


def measure_group(
    name: str, arms: dict[str, Arm], arguments: argparse.Namespace, deadline: float, start: float, rows: list[Any]
) -> None:
    """All measurements of engines that live at the same time, in turn."""
    order = list(arms)
    longest = 0.0
    for number in range(arguments.rounds):
        began = time.monotonic()
        if number and began + longest > deadline:
            say(start, f"{name}: the time allows {number} rounds of {arguments.rounds}")
            break
        for routing, batch in itertools.product(arguments.routing, arguments.batch_size):
            rows += [{"round": number, **row} for row in decode(arms, order, routing, batch, arguments)]
        for routing, prompt in itertools.product(arguments.routing, arguments.prompts):
            rows += [{"round": number, **row} for row in prefill(arms, order, routing, prompt, arguments)]
            say(start, f"{name}: prompts of {prompt} tokens, {routing}")
        for routing in arguments.routing if arguments.mixed else ():
            settle(arms, arguments.cpus)
            for arm in order:
                found = arms[arm]("mixed", routing=routing, requests=arguments.mixed, concurrency=128)
                rows.append({"what": "mixed", "arm": arm, "routing": routing, "round": number, **found})
        longest = max(longest, time.monotonic() - began)
        order = order[1:] + order[:1]
        say(start, f"{name}: round {number + 1} of {', '.join(arms)}")


def quietest(cpus: list[int]) -> int:
    """The CPU on which a loop of Python runs fastest right now: on shared hosts some take twice as long for minutes."""
    took = {}
    before = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, [cpu])
            samples = []
            for _ in range(3):
                start = time.perf_counter()
                sum(range(30_000))
                samples.append(time.perf_counter() - start)
            took[cpu] = min(samples)
    finally:
        os.sched_setaffinity(0, before)
    return min(took, key=lambda cpu: took[cpu])


def settle(arms: dict[str, Arm], cpus: list[int]) -> None:
    """Puts the driving threads of all engines, of which one runs at a time, on the quietest of some CPUs."""
    try:
        cpu = [quietest(cpus)] if cpus else []
    except OSError:  # a sandbox may know no affinities, or not these CPUs
        return
    for engine in arms.values() if cpu else ():
        engine("pin", cpus=cpu)


def decode(
    arms: dict[str, Arm], order: list[str], routing: str, batch: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One cell: every engine holds the batch, and a few steps of each are timed in turn, so that a slow moment of the
    host meets all of them; then the GPU time of a step, which does not depend on the host."""
    total = (arguments.steps + 1) * arguments.turns + (PROFILED + 1)
    for arm in order:
        arms[arm]("begin", batch=batch, routing=routing, steps=total)
    where = {"routing": routing, "batch": batch}
    for turn in range(arguments.turns):
        settle(arms, arguments.cpus)
        for arm in order:
            yield {"what": "decode", "arm": arm, "turn": turn, **where} | arms[arm]("go", steps=arguments.steps)
        order = order[1:] + order[:1]
    for arm in order:
        yield {"what": "share", "arm": arm, **where} | arms[arm]("go", steps=PROFILED, profile=True)
        arms[arm]("end")


def prefill(
    arms: dict[str, Arm], order: list[str], routing: str, prompt: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Prompts of one length: as many as fill a step for tokens/s, and one alone for the time to its token."""
    settle(arms, arguments.cpus)
    for requests in requests_of(prompt):
        where = {"routing": routing, "prompt": prompt, "requests": requests}
        for arm in order:
            arms[arm]("prefill", **where)  # compiles
        for turn in range(arguments.turns):
            for arm in order:
                yield {"what": "prefill", "arm": arm, "turn": turn, **where} | arms[arm]("prefill", **where)
            order = order[1:] + order[:1]
        for arm in order:
            yield {"what": "prefill share", "arm": arm, **where} | arms[arm]("prefill", **where, profile=True)


def run_model(
    name: str, gpu: str, arguments: argparse.Namespace, start: float, results: dict[str, Any], failures: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        made = prepare(name, folder, arguments, gpu)
        settings = {arm: settings_of(name, made, folder, arguments, arm) for arm in ARMS}
        environments = {arm: environment_of(arm, folder, gpu, arguments.deep_gemm, arguments.cold) for arm in ARMS}
        fit = max(1, int(0.95 * free_gb(gpu) // needed_gb(made, settings["plugin"])))
        fit = min(fit, arguments.concurrent or fit)
        # The pair that matters most shares the clocks, if only two fit.
        wanted = [
            arm
            for arm in ("plugin", "deep_gemm", "vllm_triton", "static", "plugin_triton", "plugin_defaults", "installed")
            if arm in arguments.arms
        ]
        groups = [wanted[i : i + fit] for i in range(0, len(wanted), fit)]
        say(
            start, f"{name} on GPU {gpu}: {made['shape']}, vLLM ships {made['shipped'] or 'no table'}; engines {groups}"
        )
        rows: list[dict[str, Any]] = []
        starts: dict[str, Any] = {}
        choices: dict[str, Any] = {}
        memory: dict[str, Any] = {}
        served: dict[str, list[str]] = {}
        results[name] = {
            "served": served,
            "rows": rows,
            "starts": starts,
            "memory": memory,
            "choices": choices,
            "shipped": made["shipped"],
        }
        logs = arguments.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        share = (arguments.budget_s - (time.monotonic() - start)) / len(groups)
        for group in groups:
            deadline = time.monotonic() + share
            arms = {a: Arm(a, settings[a], environments[a], logs / f"{name}-{a}.log") for a in group}
            try:
                for arm, engine in list(arms.items()):
                    try:
                        starts[arm] = engine.started()
                        say(start, f"{name}: {arm} is up after {starts[arm]['wall_s']:.0f} s")
                        if arm in PLUGINS:
                            served[arm] = attached(engine, device_on(gpu))
                            say(start, f"{name}: {arm} serves by {'; '.join(served[arm])}")
                    except RuntimeError as error:
                        failures.append(f"{name}: {error}")
                        say(start, failures[-1])
                        arms.pop(arm).stop()
                measure_group(name, arms, arguments, deadline, start, rows)
                memory |= {arm: engine("memory") for arm, engine in arms.items()}
                if "plugin" in arms:
                    choices |= arms["plugin"]("choices")
            finally:
                for engine in arms.values():
                    engine.stop()
        for number, arm in itertools.product(range(arguments.restart), ("installed", *PLUGINS)):
            if arm not in arguments.arms:
                continue
            free = free_gb(gpu)
            again = Arm(arm, settings[arm], environments[arm], logs / f"{name}-{arm}-again.log")
            try:
                found = again.started()
                say(start, f"{name}: {arm} again, up after {found['wall_s']:.0f} s")
                starts[f"{arm} again{number or ''}"] = found | {"device_gb": free - free_gb(gpu)}
            finally:
                again.stop()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["olmoe"], choices=sorted(MODELS))
    parser.add_argument("--arms", nargs="+", default=["installed", "static", "deep_gemm", "plugin"], choices=ARMS)
    parser.add_argument(
        "--shipped-plans", action="store_true", help="the plugin has no plans but those that come with rampwrap"
    )
    parser.add_argument(
        "--stand-in", action="store_true", help="with it, a plan shipped for another GPU where none is for this one"
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[8, 32, 64, 128, 256, 512])
    parser.add_argument(
        "--routing", nargs="+", default=["uniform", "dirichlet:0.1"], help="also trace:FILE, lognormal:1.0"
    )
    parser.add_argument("--rounds", type=int, default=2, help="at most; fewer where the time is over")
    parser.add_argument("--turns", type=int, default=8, help="of each engine at a batch, in each round")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a turn")
    parser.add_argument("--prompts", nargs="*", type=int, default=[], metavar="L", help="also prefill of such prompts")
    parser.add_argument(
        "--deep-gemm", action="store_true", help="leave DeepGEMM on: dense FP8 layers run it in all arms"
    )
    parser.add_argument("--mixed", type=int, default=0, metavar="N", help="also a mixed load of so many requests")
    parser.add_argument("--mode", default="default", choices=["default", "piecewise", "eager"])
    parser.add_argument("--capture-sizes", nargs="+", type=int, help="instead of vLLM's own list: starts sooner")
    parser.add_argument("--layers", type=int, help="instead of the model's: more engines fit at the same time")
    parser.add_argument("--concurrent", type=int, help="at most so many engines on a GPU")
    parser.add_argument("--timings", nargs="+", type=pathlib.Path, help="tables for the plan, instead of the model's")
    parser.add_argument("--profile-budget", type=float, default=0.0, metavar="S", help="profile for so long instead")
    parser.add_argument(
        "--cpus",
        type=int,
        nargs="*",
        default=[],
        help="the thread that drives an engine stays on these, in each turn of all engines on the quietest of them",
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    parser.add_argument("--gpus", default=visible, help="0,1: models are spread over them, a model stays on its GPU")
    parser.add_argument("--budget-s", type=float, default=230.0, help="no further round is begun after this time")
    parser.add_argument(
        "--restart", nargs="?", type=int, const=1, default=0, metavar="N", help="start both N times more, caches warm"
    )
    parser.add_argument(
        "--cold", action="store_true", help="empty caches for each engine: its first start is that of a new machine"
    )
    parser.add_argument("--logs", type=pathlib.Path, help="keep vLLM's logs in this folder")
    parser.add_argument("--out", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    start = time.monotonic()
    results: dict[str, Any] = {}
    gpus = arguments.gpus.split(",")
    failures: list[str] = []

    def work(place: int) -> None:
        # Engines of two GPUs run at the same time, on CPUs of their own.
        own = argparse.Namespace(**vars(arguments) | {"cpus": arguments.cpus[place :: len(gpus)]})
        for name in arguments.models[place :: len(gpus)]:
            try:
                run_model(name, gpus[place], own, start, results, failures)
            except Exception as error:
                failures.append(f"{name}: {error}")
                print(f"{name}: {error}", file=sys.stderr, flush=True)

    def ended(number: int, frame: object) -> None:
        raise TimeoutError("ended by SIGTERM; what was measured by then is reported")

    # A time limit from outside: `timeout 200 python ...` ends the engines too.
    signal.signal(signal.SIGTERM, ended)
    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(gpus))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except TimeoutError as error:
        failures.append(str(error))
        print(error, file=sys.stderr, flush=True)
    for name, result in results.items():
        if result["rows"]:
            result["gains"] = report(name, result, arguments)
    if arguments.out is not None:
        import torch
        import triton

        raw = {
            "command": " ".join(sys.argv),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
            "seconds": time.monotonic() - start,
            "failures": failures,
            "models": results,
        }
        arguments.out.write_text(json.dumps(raw, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
