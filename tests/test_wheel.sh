#!/usr/bin/env bash
# Builds the wheel, installs it into a fresh environment, and runs the tests there without the source tree.
# BIN: the folder of the development environment's programs, whose dependencies the fresh one borrows.
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
tree=$(realpath rampwrap)
cp -r tests examples pyproject.toml "$work/"
cd "$work"
"$work/venv/bin/python" -c "import rampwrap, rampwrap.model._score; assert '$fresh' in rampwrap.__file__, rampwrap.__file__"
"$work/venv/bin/python" -m rampwrap --version
# Every file of the tree is there and every module imports, as far as others' GPU libraries allow.
"$work/venv/bin/python" - "$tree" "$fresh/rampwrap" <<'EOF'
import importlib, pathlib, sys

def files(root):
    kinds = {".py", ".typed", ".json", ".toml"}
    return {path.relative_to(root) for path in root.rglob("*") if path.suffix in kinds}

tree, installed = map(pathlib.Path, sys.argv[1:])
wanted = files(tree) | {"adapters" / path for path in files(tree / "adapters")} | {"kernels" / path for path in files(tree / "kernels")}
assert wanted == files(installed), sorted(map(str, wanted ^ files(installed)))
for path in sorted(wanted):
    name = ".".join(("rampwrap", *path.with_suffix("").parts)).removesuffix(".__init__")
    if path.suffix == ".py" and not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as missing:
            assert missing.name.split(".")[0] in ("cutlass", "tvm_ffi"), name
EOF
# What it computes was tested in the tree; here, that it finds its parts: the commands with their files and the compiled score, the
# packaging, a kernel whose source Triton reads from where it is installed.
OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 "$work/venv/bin/python" -m pytest -q -p no:cacheprovider \
  -m "not gpu and not slow and not release" ${WHEEL_TESTS:-tests/cli tests/test_packaging.py tests/kernels/triton/test_moe.py::test_given_alignment}
