PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test lint bench

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

setup:  ## a fresh virtual environment in .venv with everything installed
	rm -rf $(VENV)
	$(MAKE) $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import lightning, segment_anything'
	touch $@

train: $(READY)  ## train the default job: synthetic scenes, a tiny SAM, Conv-LoRA, a CPU
	$(BIN)/python -m convlora.train $(ARGS)

test: $(READY) lint  ## lint and all tests
	$(BIN)/python -m pytest

lint: $(READY)  ## formatting, style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## benchmarks
	$(BIN)/python -m benchmarks
