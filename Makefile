# One command to start, one to check. `make help` lists them.
#
#   PYTHON=python3.12    the interpreter that .venv is made from
#   VENV=                (empty, or none) use PYTHON as it is, a container's own for example, and install nothing
#   PINS=cpu             constraints/cpu.txt or cuda.txt; without it the latter where there is a GPU
#   ARGS="key=value"     handed on: to `fp8moe train`, to pytest, or to every benchmark
#   DATA=book.txt        text, or a folder of it, for `make train`; none is the embedded corpus
#   WORKERS=2            files that `make test` runs at once

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
DATA ?=
WORKERS ?= 2
NPROC ?= auto
BENCH_OUT ?= runs/bench
TRITON ?= 3.6.0 3.7.1 3.8.0

PINS ?= $(if $(wildcard /dev/nvidia[0-9]*)$(shell nvidia-smi -L 2>/dev/null | grep -m 1 GPU),cuda,cpu)
CONSTRAINTS := constraints/$(PINS).txt

ifeq ($(filter-out none,$(VENV)),)
RUN := $(PYTHON)
SETUP :=
else
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

# Set-up needs no network once this file is newer than what it was made from; a stopped install starts over.
ifneq ($(SETUP),)
$(SETUP): pyproject.toml constraints/base.txt $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("fp8moe needs Python 3.11 or newer, $(PYTHON) is %d.%d: use make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV), once, from $(CONSTRAINTS) (PINS=cpu or PINS=cuda decides otherwise): torch alone is 0.2 GB on a CPU machine, several GB with CUDA."
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment: install its venv module, or use VENV= with a Python that has the packages of pyproject.toml" >&2; exit 1; }
	$(RUN) -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) setuptools
	$(RUN) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	@touch $@
endif

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@sed -n '3,8s/^# //p' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(SETUP) ## make .venv when it is missing or older than its pins

# Options first, then keys: ARGS may hold either.
# A text is tokenized once, and again when it, or a file below it, is newer than its token files; two of one name in
# different folders have different ones.
.PHONY: train
train: $(SETUP) ## train the main job on the embedded corpus, or DATA=book.txt: 4 processes on CPU, or every GPU found
ifeq ($(DATA),)
	$(RUN) -m fp8moe train --nproc $(NPROC) experiment=quickstart $(ARGS)
else
	@name="$$(basename "$(DATA)" | tr -c 'A-Za-z0-9\n' _)-$$(realpath "$(DATA)" | cksum | cut -d ' ' -f 1)"; \
	tokens="runs/text/$$name"; \
	if [ ! -e "$$tokens.idx" ] || [ -n "$$(find "$(DATA)" -newer "$$tokens.idx" -print -quit)" ]; then \
	  $(RUN) -m fp8moe tokenize --force --input "$(DATA)" --output "$$tokens"; \
	fi; \
	$(RUN) -m fp8moe train --nproc $(NPROC) experiment=quickstart data.source=indexed "data.paths=[$$tokens]" $(ARGS)
endif

# One thread a process: the tests start processes of their own, and two cores thrash when each takes both. Files come in
# the order of tests/conftest.py, the longest first; pytest-xdist's own order puts files of few tests last, however long.
# A test that ends its worker ends the run: pytest-xdist would start another worker and wait for both for ever. Bytecode
# is written whatever the machine says: else both workers, and each process that a test starts, compile the project again.
.PHONY: test
test: $(SETUP) ## the tests that need no GPU
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

# Without a GPU each of them would be skipped, which looks like success.
.PHONY: test-gpu
test-gpu: $(SETUP) ## the tests that need a GPU (with VENV= torch, triton, numpy and pytest are enough for them)
	@$(RUN) -c 'import sys, torch; n = torch.cuda.device_count(); sys.exit(None if n else f"make test-gpu needs at least 1 CUDA GPU and torch {torch.__version__} sees 0: use a GPU machine and a CUDA build of torch (PINS=cuda, or VENV= with a Python that has one)")'
	TRITON_INTERPRET=0 $(RUN) -m pytest -m gpu tests/kernels tests/layers/attention tests/layers/test_captured_layer.py tests/benchmarks/test_harness.py $(ARGS)

# The site is read from the repository's own Markdown; a warning is an error.
.PHONY: docs
docs: $(SETUP) ## the documentation as a site: build/docs/index.html
	OMP_NUM_THREADS=1 $(RUN) -m sphinx -W --keep-going --quiet -c docs . build/docs $(ARGS)
	@echo "open build/docs/index.html"

.PHONY: test-faults
test-faults: $(SETUP) ## faults put into real runs, many trials of each: a table of what was survived and what was lost
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m tests.faults $(ARGS)

.PHONY: bench bench-gpu
bench: $(SETUP) ## every benchmark on the CPU: tables here, records in runs/bench/
	@for file in benchmarks/bench_*.py; do \
	  test -e "$$file" || { echo "benchmarks/ holds no bench_*.py" >&2; exit 1; }; \
	  name=$$(basename "$$file" .py); echo "== $$name"; \
	  $(RUN) -m benchmarks.$$name --device cpu --json $(BENCH_OUT)/$$name-cpu.json $(ARGS); \
	done
bench-gpu: $(SETUP) ## on one GPU, in eight minutes: is it right, then ops, products and layers in one table
	$(RUN) -m benchmarks.gpu --out $(BENCH_OUT) $(ARGS)

.PHONY: check
check: $(SETUP) ## ruff, mypy, the floors by import-linter, and the architecture's figures
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(RUN) -m tests.architecture

# Half an hour on two cores; ARGS="--folder train --count 20" asks less.
.PHONY: mutants
mutants: $(SETUP) ## break one line at a time and see whether the tests notice
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m tests.mutants $(ARGS)

# Ten minutes for each on two cores. Nothing of .venv changes: the other Triton lies in a folder of its own, in front.
.PHONY: gate
gate: $(SETUP) ## compile and run every kernel's machine code with other Tritons: TRITON="3.6.0 3.7.1 3.8.0"
	@for version in $(TRITON); do \
	  folder=$(or $(VENV:none=),.)/triton-$$version; echo "== Triton $$version"; \
	  test -d $$folder || $(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --target $$folder triton==$$version; \
	  OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=$$folder $(RUN) -m pytest tests/kernels/test_sm90.py tests/ptx $(ARGS); \
	done

.PHONY: clean
clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find benchmarks fp8moe kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
