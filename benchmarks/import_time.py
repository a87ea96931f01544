"""How long the first import takes, and the command's help: each in fresh processes, one after the other.

    python benchmarks/import_time.py --runs 15

Byte code is there before the first run that counts. Wall-clock milliseconds of the whole process, Python's own start
in a row of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time

CASES = {
    "python itself": ["-c", "pass"],
    "import rampwrap": ["-c", "import rampwrap"],
    "from rampwrap import Dispatcher": ["-c", "from rampwrap import Dispatcher"],
    "rampwrap --help": ["-m", "rampwrap", "--help"],
}


def milliseconds(arguments: list[str]) -> float:
    """One fresh process, start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the first import, in fresh processes.")
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    print(f"{'':32} {'median ms':>10} {'least':>8} {'most':>8}")
    for name, arguments in CASES.items():
        milliseconds(arguments)
        took = [milliseconds(arguments) for _ in range(runs)]
        print(f"{name:32} {statistics.median(took):10.0f} {min(took):8.0f} {max(took):8.0f}")


if __name__ == "__main__":
    main()
