# Every target first brings .venv up to date with pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cuda bench lint format notebooks

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.stamp  ## get SmolLM2-135M (or take mini-llama) and write its report to report/
	@model=smollm2-135m; \
	$(BIN)/interp models get $$model || { \
	  echo "demo: $$model cannot be had here (see above); going on with mini-llama, which is embedded." >&2; \
	  model=mini-llama; }; \
	$(BIN)/interp report $$model --out report/

test: .venv/.stamp  ## the quick tests
	$(PYTEST)

test-slow: .venv/.stamp  ## the slow tests
	$(PYTEST) -m slow

test-cuda: .venv/.stamp  ## what the CPU says, CUDA says too (needs a GPU)
	INTERP_TEST_CUDA=1 $(PYTEST) tests/test_cuda.py

bench: .venv/.stamp  ## ratios against what one would otherwise call
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python -m benchmarks

lint: .venv/.stamp  ## ruff and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright $(wildcard interp analyses)

format: .venv/.stamp  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: .venv/.stamp  ## make the .ipynb beside each notebooks/*.py
	$(BIN)/jupytext --to ipynb notebooks/*.py
