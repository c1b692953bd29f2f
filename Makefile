# `make demo` and `make test` need Python 3.11 or newer and a C compiler, and set up everything else themselves.
# Settings: PYTHON=python3.12, WORKERS=4, TESTS=tests/core, PROMPT="...", ARGS="..." for pytest, penstock bench or generate.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST_TRITON := .venv-triton-newest
OLDEST_TRITON_VERSION := 3.6.0
WORKERS ?= 2
# The compile gate takes longest: one worker begins with it while the others take the rest.
TESTS := tests/testing $(filter-out tests/testing tests/conftest.py tests/__pycache__,$(wildcard tests/*))
PROMPT := If the argument is
ARGS ?=

PIP := $(BIN)/python -m pip install --disable-pip-version-check
# A terminal shows pip's progress bars; a log does not need its hundred lines.
PIP += $(shell [ -t 2 ] || echo --quiet)
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo yes)

# The kernels are compiled with the oldest and the newest Triton; the newest stands in a folder of its own.
export PENSTOCK_NEWEST_TRITON := $(CURDIR)/$(NEWEST_TRITON)
# The test workers share the cores; a pool of threads in each would fight over them.
test: export OMP_NUM_THREADS := 1

.PHONY: help demo test lint bench docs build setup clean

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## set up, then generate text with the small model that comes with the package
	$(BIN)/penstock generate demo --temperature 0.7 --top-p 0.9 --max-tokens 64 --prompt "$(PROMPT)" $(ARGS)

test: $(READY) $(NEWEST_TRITON)/.ready ## set up, then run the test suite (ARGS="-k rms_norm" runs a part)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(TESTS) $(ARGS)

lint: $(READY) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## measure operators on this machine (ARGS="rms_norm" measures one)
	$(BIN)/penstock bench $(ARGS)

docs: $(READY) ## write docs/operators/ from the docstrings, and the tables of measured numbers
	$(BIN)/python scripts/build_docs.py
	$(BIN)/python scripts/render_tables.py

build: $(READY) ## build the wheel in dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

setup: $(READY) ## make .venv and install Penstock with its tools; the other targets do it when needed

clean: ## remove the virtual environment, the caches and what was built
	rm -rf $(VENV) $(NEWEST_TRITON) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes first, so that what follows cannot choose another one. With a GPU its Triton is the one that torch brings;
# without one it is the oldest supported, because that is where the interpreter and the compile gate run.
$(READY): pyproject.toml
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { \
	  echo 'error: a C compiler is needed and none of cc, gcc, clang is there' >&2; exit 1; }
	@python=''; for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$candidate"; break; fi; done; \
	[ -n "$$python" ] || { \
	  echo 'error: Python 3.11 or newer with the venv module is needed; make PYTHON=/path/of/python names one' >&2; exit 1; }; \
	echo "+ making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	@echo '+ installing torch for the NVIDIA GPU of this machine'
	@$(PIP) 'torch>=2.11'
	@echo '+ installing Penstock and its development tools'
	@$(PIP) --editable '.[dev]'
else
	@echo '+ installing torch 2.13.0 (no NVIDIA GPU found)'
	@$(PIP) torch==2.13.0
	@echo '+ installing Penstock and its development tools'
	@$(PIP) --editable '.[dev]'
	@echo '+ installing Triton $(OLDEST_TRITON_VERSION), the oldest supported'
	@$(PIP) --no-deps triton==$(OLDEST_TRITON_VERSION)
endif
	@touch $@

$(NEWEST_TRITON)/.ready: $(READY)
	@echo '+ installing the newest Triton in $(NEWEST_TRITON), for the compile gate'
	@rm -rf $(NEWEST_TRITON)
	@$(PIP) --no-deps --target $(NEWEST_TRITON) triton
	@touch $@
