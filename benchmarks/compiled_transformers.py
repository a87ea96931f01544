"""transformers compiled, with rampwrap's experts and with its own: GPU time of a decode step and of a prefill, on one GPU.

    python benchmarks/compiled_transformers.py --models olmoe qwen3 --layers 4 --out OUT.json

Random weights and no plan, so our defaults serve. Decode is what `generate` runs with a static cache: a step that it compiles
in mode "reduce-overhead". It never compiles a prefill of one piece; here the model is compiled in the same mode. Arms, each a
process of its own with the same weights:

    grouped_mm       transformers' grouped GEMM in prefill and in decode
    own              what transformers chooses for a model that says nothing: batched_mm in decode, grouped_mm in prefill
    rampwrap         ours, by the defaults of the CuTe kernels where they are built
    rampwrap_triton  ours, by those of the Triton kernel, as after 'pip install rampwrap'

All arms of all models compile a cell at the same time; then each is timed alone. First their logits are compared with those of
grouped_mm. Times are the sum of the GPU's kernels in a step, so a host that cannot keep up counts for tokens/s alone. The
vocabulary is cut down like the layers, so that the output layer has the share that it has in the whole model.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rampwrap.engines.defaults import PLANS_ONLY
from rampwrap.plan.folder import OWN_PLANS, PLANS

ARMS = ("grouped_mm", "own", "rampwrap", "rampwrap_triton")
OURS = ("rampwrap", "rampwrap_triton")
STEP = "compiled step"
"Under this name torch's profiler finds the time of a step."
CLOSE = 0.03
"Relative norm of the difference of logits; the arms add in other orders, in bf16."


def busy_us(events: Any) -> float:
    """Microseconds of a step in which the GPU runs something: kernels that overlap count once.

    Names that the host gave to its own time appear on the GPU's side too, from the first of their kernels to the last.
    """
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    named = {event.name for event in events if event.device_type == cpu}
    kernels = [
        event.time_range
        for event in events
        if event.device_type == gpu and not getattr(event, "is_user_annotation", False) and event.name not in named
    ]
    steps = [event.time_range for event in events if event.name == STEP and event.device_type == cpu]
    total = 0.0
    for step in steps:
        until = step.start
        for its in sorted(kernels, key=lambda its: its.start):
            if step.start <= its.start < step.end:
                total += max(0.0, its.end - max(its.start, until))
                until = max(until, its.end)
    return total / len(steps) if steps and total else float("nan")


class Arm:
    """A model in a process of its own."""

    def __init__(self, model: str, name: str, folder: pathlib.Path, arguments: argparse.Namespace) -> None:
        self.model, self.name, self.log = model, name, folder / f"{model}-{name}.log"
        environment = os.environ | {PLANS: str(folder / "plans"), OWN_PLANS: "1", "PYTHONUNBUFFERED": "1"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{model}-{name}")
        environment[PLANS_ONLY] = "1" if name == "rampwrap_triton" else ""
        self._process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).parent / "compiled_transformers_arm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=environment,
        )
        settings = {"model": model, "layers": arguments.layers, "arm": name, "folder": str(folder)}
        self.send(settings | {"tiny": arguments.tiny, "prompt": arguments.prompt, "context": arguments.context})

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()[-4:]
            raise RuntimeError(f"{self.model} {self.name} ended with {self._process.wait()}: " + " | ".join(said))
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def together(arms: list[Arm], failures: list[str], message: dict[str, Any] | None = None) -> Iterator[tuple[Arm, Any]]:
    """Answers of all arms, which work at the same time; one that ended is out, with what it said."""
    for arm in arms if message is not None else ():
        with contextlib.suppress(OSError):  # `receive` says why
            arm.send(message or {})
    for arm in list(arms):
        try:
            yield arm, arm.receive()
        except RuntimeError as error:
            failures.append(str(error))
            print(error, flush=True)
            arms.remove(arm)


def cells(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Decode and prefill in turn, the ends of the range first: time may run out."""
    batches = sorted(arguments.batch_size)
    order = [batch for pair in zip(batches, reversed(batches), strict=True) for batch in pair]
    return [(what, batch) for batch in dict.fromkeys(order) for what in arguments.parts]


def compare(ready: dict[Arm, dict[str, Any]], models: Sequence[str], failures: list[str]) -> None:
    """Each arm's row gets its distance to the logits of its model's grouped_mm."""
    logits = {arm: torch.load(row.pop("logits")).double() for arm, row in ready.items()}
    for model in models:
        want = next((its for arm, its in logits.items() if (arm.model, arm.name) == (model, "grouped_mm")), None)
        for arm, found in logits.items():
            if arm.model == model:
                off = math.nan if want is None else difference(found, want, ready[arm]["what"])
                ready[arm]["off"] = off
                if not off < CLOSE:
                    cell = f"{ready[arm]['what']} {ready[arm]['batch']}"
                    failures.append(f"{model} {arm.name} {cell}: its logits are off by {off:.3f}")


def difference(found: torch.Tensor, want: torch.Tensor, what: str) -> float:
    """Of the logits of a prefill, [batch, 1, vocabulary]; of decode, [2, batch, vocabulary], those of the first compiled step in
    rows whose token before it is the same: at near ties it may be another."""
    if what == "decode":
        same = found[0].argmax(-1) == want[0].argmax(-1)
        if not same.any():
            return math.inf
        found, want = found[1, same], want[1, same]
    return float((found - want).norm() / want.norm())


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each cell, and returns the gains: worst cell and geometric mean over each other arm."""
    gains: dict[str, Any] = {}
    for model in arguments.models:
        for what in ("decode", "prefill"):
            its = {(row["batch"], row["arm"]): row for row in rows if row["model"] == model and row["what"] == what}
            print(f"{model} {what}: us of GPU time (tokens/s, off); ours over grouped_mm, own: GPU time, tokens/s")
            over: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for batch in sorted({batch for batch, _ in its}):
                line = f"  {batch:4d}"
                for arm in arguments.arms:
                    if (row := its.get((batch, arm))) is not None:
                        line += f"  {arm} {row['gpu_us']:.0f} ({row['tokens_per_s']:.0f}, {row['off']:.4f})"
                for ours in OURS:
                    for other in ("grouped_mm", "own"):
                        a, b = its.get((batch, ours)), its.get((batch, other))
                        if a and b:
                            pair = b["gpu_us"] / a["gpu_us"], a["tokens_per_s"] / b["tokens_per_s"]
                            over.setdefault((ours, other), []).append(pair)
                            line += f"  {pair[0]:.3f}x {pair[1]:.3f}x"
                print(line)
            for (ours, other), pairs in over.items():
                found = {
                    "worst": min(gpu for gpu, _ in pairs),
                    "mean": geometric_mean([gpu for gpu, _ in pairs]),
                    "tokens/s worst": min(speed for _, speed in pairs),
                    "tokens/s mean": geometric_mean([speed for _, speed in pairs]),
                }
                gains[f"{model} {what} {ours} over {other}"] = found
                said = ", ".join(f"{name} {value:.3f}x" for name, value in found.items())
                print(f"  {ours} over {other}: {said}")
    return gains


def measure(
    arms: list[Arm],
    arguments: argparse.Namespace,
    start: float,
    rows: list[dict[str, Any]],
    failures: list[str],
    versions: dict[str, Any],
) -> None:
    """Adds a row for each cell and arm; a cell takes as long as the one before it."""
    for arm, found in together(arms, failures):
        versions |= found.pop("versions")
        print(f"[{time.monotonic() - start:4.0f}s] {arm.model} {arm.name}: {found['served']}", flush=True)
    latest = 0.0
    for what, batch in cells(arguments):
        began = time.monotonic()
        if began - start + latest > arguments.limit_s:
            print(f"no time for {what} {batch}")
            continue
        cell = {"what": what, "batch": batch}
        ready = {arm: cell | found for arm, found in together(arms, failures, {"do": "ready", **cell})}
        compiled = time.monotonic() - began
        compare(ready, arguments.models, failures)
        samples: dict[Arm, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for arm in list(arms):
                alone = [arm]
                for _, found in together(alone, failures, {"do": "go", "steps": arguments.steps}):
                    samples.setdefault(arm, []).append(found)
                if not alone:
                    arms.remove(arm)
        for arm, its in samples.items():
            best = {
                "gpu_us": min(one["gpu_us"] for one in its),
                "tokens_per_s": max(one["tokens_per_s"] for one in its),
            }
            rows.append({"model": arm.model, "arm": arm.name, **ready[arm], **best, "samples": its})
        latest = time.monotonic() - began
        print(f"[{time.monotonic() - start:4.0f}s] {what} {batch}: compiled in {compiled:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["olmoe", "qwen3"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--parts", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt in prefill")
    parser.add_argument("--context", type=int, default=32, help="tokens before the first that decode makes")
    parser.add_argument("--steps", type=int, default=8, help="of decode that are timed; half as many prefills")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=185, help="no cell is begun that might end after it")
    parser.add_argument("--tiny", action="store_true", help="a layer that a CPU can run, to try this out")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    start, failures, rows = time.monotonic(), list[str](), list[dict[str, Any]]()
    versions: dict[str, Any] = {}

    def ended(number: int, frame: object) -> None:
        raise TimeoutError("ended by SIGTERM; what was measured by then is reported")

    signal.signal(signal.SIGTERM, ended)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "plans").mkdir()
        arms = [Arm(model, name, folder, arguments) for model in arguments.models for name in arguments.arms]
        everyone = list(arms)
        try:
            measure(arms, arguments, start, rows, failures, versions)
        except TimeoutError as error:
            failures.append(str(error))
        finally:
            for arm in everyone:
                arm.stop()
    gains = report(rows, arguments)
    print("\n".join(dict.fromkeys(failures)) or "all logits are close, no arm failed")
    if arguments.out is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        raw = {"command": " ".join(sys.argv), "device": device, "versions": versions, "layers": arguments.layers}
        raw |= {"seconds": time.monotonic() - start, "failures": failures, "gains": gains, "rows": rows}
        arguments.out.write_text(json.dumps(raw, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
