#!/usr/bin/env bash
# The import contracts of pyproject.toml, checked on a copy: import-linter follows no links, and would not see rampwrap/adapters
# and rampwrap/kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
LINT="$(realpath "${BIN:-.venv/bin}")/lint-imports"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -rL rampwrap pyproject.toml "$copy"
touch "$copy"/rampwrap/{adapters,kernels}/__init__.py
echo '__version__ = "0"' >"$copy/rampwrap/_built.py" # as a build writes it
cd "$copy"
PYTHONPATH="$copy" "$LINT" --no-cache
