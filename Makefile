# The first that convlora runs on; PYTHON=... chooses another
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	if $(call fits,$$python); then echo $$python; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

fits = case "$$($(1) --version 2>&1)" in "Python 3.1"[123].*) true;; *) false;; esac
define require_python
@$(call fits,$(PYTHON)) || { echo "convlora needs Python 3.11, 3.12 or 3.13 (hydra 1.3 does not run on 3.14), but\
	$(if $(PYTHON),PYTHON=$(PYTHON) is none of them,none is on the PATH); set PYTHON=..." >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup train test lint bench

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

setup:  ## a fresh virtual environment in .venv with everything installed
	$(require_python)
	rm -rf $(VENV)
	$(MAKE) $(READY)

$(READY): pyproject.toml constraints.txt
	$(require_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import lightning, segment_anything'
	touch $@

train: $(READY)  ## train the default job: synthetic scenes, a tiny SAM, Conv-LoRA, a CPU
	$(BIN)/python -m convlora.train $(ARGS)

test: $(READY) lint  ## lint and all tests
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)  ## formatting, style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## benchmarks
	$(BIN)/python -m benchmarks
