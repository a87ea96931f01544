#!/usr/bin/env bash
# Builds the wheel, installs it into a fresh environment, and runs the tests there without the source tree.
# BIN: the folder of the development environment's programs, whose dependencies the fresh one borrows.
# WORKERS: processes that run the tests; none besides pytest's own where it is absent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$BIN/python" -m build --quiet --wheel --outdir "$work/dist" .
"$BIN/python" -m venv "$work/venv"
# Dependencies come from the development environment by a path file; rampwrap itself only from the wheel.
site=$("$BIN/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
fresh=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
mkdir "$work/deps"
system=$("$BIN/python" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)")
for entry in "$site"/*; do
  case "$(basename "$entry")" in
    *rampwrap*) ;;                      # neither the editable install nor its import hook
    *) ln -s "$entry" "$work/deps/" ;;
  esac
done
# The system's packages come last, where the development environment borrows torch from there.
printf '%s\n' "$work/deps" "$system" > "$fresh/deps.pth"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$work"/dist/rampwrap-*.whl
cp -r tests examples pyproject.toml "$work/"
cd "$work"
"$work/venv/bin/python" -c "import rampwrap; assert '$fresh' in rampwrap.__file__, rampwrap.__file__"
"$work/venv/bin/python" -m rampwrap --version
OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 "$work/venv/bin/python" -m pytest -q -p no:cacheprovider \
  -n "${WORKERS:-0}" --dist worksteal tests -m "not gpu and not slow" \
  -k "${WHEEL_TESTS:-dispatch or plan or cli or adapter or packaging or native}"
