"""Random mutants of the library, and whether the tests see them: ``make mutants``.

A mutant is one small fault: a comparison off by one, a constant changed, an argument dropped, a statement deleted. It runs
the tests that name its module and execute its lines, then all others that execute them, as one traced run of each test
file says (kept in build/mutants). The tree is copied first: nothing here is touched.

    python tests/mutants --count 40 --seed 7            # draws, runs, prints the survivors' diffs
    python tests/mutants --only rampwrap/cost.py        # all that are drawn are of one file or folder
    python tests/mutants --seed 7 --list                # what would run
    python tests/mutants --seed 7 --device --gpu        # of the same 40, those that are counted apart, on a GPU

`known.toml` says what is counted apart: code that only a GPU executes, and mutants that were read and change nothing.
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
from collections import Counter, defaultdict

from faults import Mutant, draw, listed
from traced import LIMIT, OUT_OF_TIME, Tests, applied, copy_tree, run

# What is imported once, before each mutant's process is forked: 4 s of each.
HEAVY = (
    "torch",
    "triton.language",
    "scipy.optimize",
    "scipy.stats",
    "hypothesis",
    "matplotlib.pyplot",
    "transformers",
    "cutlass.cute",
)


def verdict_of(mutant: Mutant, tests: Tests, patience: float) -> tuple[str, str]:
    """(verdict, reason or killer): the tests of its own module first, then all that execute its lines."""
    apart = listed(mutant)
    if apart and (apart[0] == "equivalent" or not tests.gpu):
        return apart
    tiers = tests.nearest(mutant.path)
    near = [file for tier in tiers for file in tier]
    ran, files_ran = 0, 0
    for files in (*tiers, [file for file in tests.files if file not in near]):
        is_near = any(files is tier for tier in tiers)
        names = tests.of(mutant, files, is_near)
        untraced = [file for file in files if str(file) not in tests.parts] if is_near else []
        whole = [str(file.relative_to(tests.tree)) for file in untraced]
        ran, files_ran = ran + len(names), files_ran + len(whole)
        if not names and not whole:
            continue
        unsound: list[str] = []
        while True:
            with applied(mutant, tests.tree):
                killer = run(tests.tree, names, whole, unsound, limit=patience or LIMIT)
            if killer is None or (killer == OUT_OF_TIME and patience):
                break
            if tests.passes(killer, {name.split("::")[0] for name in [*names, *whole]}):
                return "killed", killer
            unsound = [name for name, passes in tests.sound.items() if not passes]
    return apart or ("survived", f"{ran} tests and {files_ran} whole files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000, help="default: another each time")
    parser.add_argument("--skip", type=int, default=0, help="of those drawn, the first that an earlier run tried")
    parser.add_argument("--only", nargs="*", default=[], help="files or folders, such as rampwrap/cost.py")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="trace nothing: whole files of tests that name a mutant's module, and of others what an earlier run traced",
    )
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds for each group of tests; what lives longer has survived"
    )
    parser.add_argument("--fresh", action="store_true", help="trace all tests anew")
    parser.add_argument(
        "--device", action="store_true", help="of those drawn, what only a GPU executes: with --gpu there"
    )
    parser.add_argument("--gpu", action="store_true", help="run tests/gpu, on a machine with one")
    parser.add_argument("--json", type=pathlib.Path, help="write each verdict here")
    args = parser.parse_args()
    drawn = draw(args.seed, args.skip + args.count, args.only)[args.skip :]
    if args.device:
        drawn = [mutant for mutant in drawn if (listed(mutant) or ("",))[0] == "device only"]
    if args.list:
        print("\n".join(mutant.diff() for mutant in drawn))
        return
    os.environ |= {} if args.gpu else {"TRITON_INTERPRET": "1"}
    os.environ |= {"CUTE_DSL_ARCH": "sm_90a", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = copy_tree(pathlib.Path(folder) / "tree")
        sys.path[:0] = [str(tree)]
        os.environ["PYTHONPATH"] = str(tree)
        for name in HEAVY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        tests = Tests(tree, args.fresh, args.gpu)
        if not args.lazy and not args.gpu:
            tests.add(tests.files)
        rows, verdicts = [], defaultdict(list)
        for place, mutant in enumerate(drawn, args.skip + 1):
            start = time.monotonic()
            verdict, why = verdict_of(mutant, tests, args.patience)
            verdicts[verdict].append(mutant)
            rows.append(
                {"path": mutant.path, "line": mutant.lines[0], "kind": mutant.kind, "verdict": verdict, "why": why}
            )
            print(
                f"{place:3} {verdict:11} {time.monotonic() - start:5.1f} s  {mutant.path}:{mutant.lines[0]} {mutant.kind}: {why}",
                flush=True,
            )
    for verdict in ("device only", "equivalent", "survived"):
        if verdicts[verdict]:
            print(f"\n{verdict}:\n" + "\n".join(mutant.diff() for mutant in verdicts[verdict]))
    killed, survived = len(verdicts["killed"]), len(verdicts["survived"])
    print(f"\nseed {args.seed}: {dict(Counter(row['verdict'] for row in rows))}")
    print(f"killed {killed} of {killed + survived} = {killed / max(1, killed + survived):.1%}")
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "mutants": rows}, indent=1))


if __name__ == "__main__":
    main()
