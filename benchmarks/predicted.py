"""What the ragged form took in a race over what `rampwrap.kernels.cute.costs` predicts; no GPU.

    python benchmarks/predicted.py [--layers olmoe:fp8 ...] [--race results/h100-race-issue16.json]

Without --race that of three layers since L2 fetches 256 bytes; the race of five layers before took 1.05x of that.

The race kept the best ragged config of each workload and its time; its routings are drawn again by their names and seeds, and a workload
whose active experts or slots are others than the race's is an error. By layer and `race.BANDS` of token counts: geometric mean
of measured over predicted, standard deviation of its logarithm, and the farthest. The prediction knows the copy bandwidth that the race measured. The
recorded routing of Qwen3-30B is left out.
"""

import argparse
import json
import pathlib
from typing import Any

import attrs
import numpy as np
from race import BANDS
from race_field import LAYERS, Arrived

from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.configs import CuteConfig, from_keys
from rampwrap.kernels.cute.costs import predict
from rampwrap.routing.counts import first_counts
from rampwrap.routing.workloads import Routing, Workload

RACE = pathlib.Path(__file__).parent / "results" / "h100-race-fetch.json"
H100 = DEVICES["nvidia-h100-80gb-hbm3"]
ROUTINGS = {"uniform": "uniform", "zipf1.2": "zipf:1.2", "dir0.3": "dirichlet:0.3", "dir0.1": "dirichlet:0.1"}


def counts_of(row: dict[str, Any], shape: MoEShape) -> np.ndarray | None:
    """The histogram of a row, None of a recorded one.

    Raises:
        InputError: it is not the one that raced.
    """
    _, routing, *seed = row["label"].split()
    if routing not in ROUTINGS:
        return None
    drawn: dict[str, Any] = {"seed": int(seed[0]) if seed else 0}
    asked = row["tokens"], Routing.parse(ROUTINGS[routing])
    here = shape.num_local_experts
    work = Arrived(*asked, **drawn, here=here) if here < shape.num_experts else Workload(*asked, **drawn)
    counts = first_counts(work.topk_ids(shape.num_experts, shape.top_k), shape)
    if (np.count_nonzero(counts), counts.sum()) != (row["active_experts"], row["slots"]):
        raise InputError(f"{row['label']} of {shape} is drawn otherwise than in the race; look at its seed.")
    return counts


def ratios(layer: str, race: dict[str, Any]) -> list[tuple[int, float]]:
    """Tokens, and measured over predicted, of each workload of a layer."""
    name, _, dtype = layer.partition(":")
    shape, found = attrs.evolve(LAYERS[name], dtype=dtype), []
    device = attrs.evolve(H100, copy_gbps=race["copy_gbps"])
    for row in race["rows"] + race["changing"]:
        counts = counts_of(row, shape)
        index, us, _ = row["best"]["ragged"]
        keys = {key: value for key, value in race["configs"][index].items() if key != "kernel"}
        config = from_keys(keys, dtype)
        if counts is not None and isinstance(config, CuteConfig):
            found.append((row["tokens"], us / predict(shape, counts.tolist(), device, config).us))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", metavar="LAYER:DTYPE")
    parser.add_argument("--race", type=pathlib.Path, default=RACE, metavar="JSON", help="another race's results")
    a = parser.parse_args()
    races = json.loads(a.race.read_text(encoding="utf-8"))["races"]
    rows = {layer: ratios(layer, races[layer]) for layer in a.layers or sorted(races)}
    for dtype in ("bf16", "fp8"):
        rows[f"all {dtype}"] = [its for layer in rows if layer.endswith(f":{dtype}") for its in rows[layer]]
    print(f"| measured over predicted: mean, deviation, farthest | {' | '.join(BANDS.values())} | from 2 |")
    for layer, its in rows.items():
        cells = []
        for low, high in (*BANDS, (2, 1 << 62)):
            off = np.log([ratio for tokens, ratio in its if low <= tokens <= high])
            far = np.exp(off[np.abs(off).argmax()]) if len(off) else 0.0
            cells.append(f"{np.exp(off.mean()):.2f}, {off.std():.1%}, {far:.2f}" if len(off) else "")
        print(f"| {layer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
