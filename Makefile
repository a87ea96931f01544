# Two commands from a fresh clone: `make demo` and `make test`. Both set up everything they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A GPU machine's own torch is used; everywhere else this release, of which the CPU build is enough.
SYSTEM_TORCH := $(shell $(PYTHON) -c "import torch, triton; torch.cuda.init(); print('--system-site-packages')" 2>/dev/null)
# Python writes the byte code of what it imports; that of everything takes 9 s for torch alone.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# And keeps it, whatever the environment says: without it torch takes each of the tests' hundred processes 2.4 s in place of 1.4,
# transformers 8.2 in place of 4.3.
export PYTHONDONTWRITEBYTECODE :=
# uv takes a fifth of pip's time, but does not see a system's torch, and not how pip is configured.
ALL := -e ".[triton,cute,plot,transformers,docs,dev]"
INSTALL := $(if $(SYSTEM_TORCH),$(PIP) $(ALL),VIRTUAL_ENV="$(abspath $(VENV))" $(BIN)/uv pip install --quiet $(ALL) || $(PIP) $(ALL))
# Processes that run tests. With a GPU the tests in tests/gpu time kernels and fill its memory, one after the other.
WORKERS ?= $(if $(SYSTEM_TORCH),0,$(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() or 1))"))
# Each of them gets one thread: more would only wait for each other.
TEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest

.PHONY: demo test all-tests setup lint types unit slow tiles kernels docs wheel plans cute-wheel mutants clean

setup: $(VENV)/.ready

# pip's editable install is an import hook, which no type checker follows: mypy finds rampwrap, in a folder of the user's own,
# by the link. A path file to this folder would do too, but would make `adapters`, `kernels` and `tests` importable.
$(VENV)/.ready: pyproject.toml rampwrap/model/_score.c
	$(PYTHON) -m venv $(SYSTEM_TORCH) $(VENV)
	$(if $(SYSTEM_TORCH),,$(PIP) torch==2.13.0 uv)
	$(INSTALL)
	ln -sfn "$(CURDIR)/rampwrap" "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rampwrap"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

# All tests in one run, and beside it, one after the other, what uses one core at a time. On a GPU machine nothing runs beside
# the tests, which time kernels.
test: setup lint
	$(MAKE) --no-print-directory --jobs $(if $(SYSTEM_TORCH),1,2) all-tests types docs wheel

# Those of `unit`, `slow` and `tiles`. Three runs would import torch in six more processes. What asks the package index fails
# here without one; elsewhere it is skipped.
all-tests: setup
	RAMPWRAP_NEEDS_INDEX=1 $(TEST) -n $(WORKERS) --dist worksteal -m "not release and not (slow and gpu)"

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	BIN=$(BIN) bash tests/lint_imports.sh

types: setup
	$(BIN)/python -m mypy

unit: setup
	$(TEST) -n $(WORKERS) --dist worksteal

# Thousands of damaged files, and a type checker in a folder of a user's own.
slow: setup
	$(TEST) -n $(WORKERS) --dist worksteal -m slow --ignore tests/kernels/cute/test_build.py --ignore tests/gpu

# CuTe kernels compiled for sm_90a and their instructions inspected, without a GPU: tiles of every width with their
# deepest pipelines here; every config, 235 kernels, before a release.
tiles: setup
	$(TEST) -m slow tests/kernels/cute/test_build.py

kernels: setup
	$(TEST) -m release tests/kernels/cute/test_build.py

# The pages into build/docs; a link or a name that leads nowhere is an error. mkdocs' theme asks for its successor by a banner.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Built, installed and tested away from the source tree: what the index would serve.
wheel: setup
	BIN="$(abspath $(BIN))" bash tests/test_wheel.sh

# The plans that the wheel brings, of measured tables; after a kernel's version has changed, say.
plans: setup
	$(BIN)/python benchmarks/shipped_plans.py

# rampwrap-cute: every CuTe kernel, compiled (five minutes on two cores, no GPU), checked and named for all Linux that can load
# it. What its neighbours bring, the CUDA runtime and TVM's, stays theirs.
CUTE := build/rampwrap-cute
cute-wheel: setup
	rm -f $(CUTE)/*.whl
	$(BIN)/python -m rampwrap build-kernels --out $(CUTE)
	cp $(CUTE)/rampwrap_cute.* wheels/cute/rampwrap_cute/
	$(BIN)/python -m build --quiet --wheel --outdir $(CUTE) wheels/cute
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libcudart.so.13 --exclude libtvm_ffi.so --wheel-dir dist $(CUTE)/*.whl
	ls -l dist

# 40 random faults in the library, and which of them the tests see: half an hour. SAMPLE="--seed 7 --only rampwrap/cost.py"
mutants: setup
	nice -n 15 $(BIN)/python tests/mutants $(SAMPLE)

clean:
	rm -rf $(VENV) .nox build dist *.egg-info wheels/cute/build wheels/cute/*.egg-info wheels/cute/rampwrap_cute/rampwrap_cute.*
