# Everything happens in .venv, which is made at first use and again whenever pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
USER_READY := $(VENV)/.user
DEVELOPER_READY := $(VENV)/.developer
# A process for each core, four at most; a file's tests stay in one, since they share what they have trained.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Another interpreter (3.11 to 3.13): make PYTHON=python3.12 …"

quickstart: $(USER_READY) ## train a small GPT on text that is already on this machine, in about three minutes
	$(BIN)/python -m research.train experiment=quickstart

test: $(DEVELOPER_READY) ## all tests but the slow ones
	$(PYTEST)

test-slow: $(DEVELOPER_READY) ## the slow tests, and the notebooks
	$(PYTEST) -m slow
	$(BIN)/python -m pytest -m "" --nbmake notebooks

check: $(DEVELOPER_READY) ## format, lint, spelling, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(DEVELOPER_READY) ## speed of whole training steps beside plain torch, growth with the context, bytes per device; PARTS=gpu on a GPU
	$(BIN)/python experiments/bench/bench.py $(PARTS)

clean: ## remove .venv, caches and builds; runs/ and data/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(USER_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(DEVELOPER_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,hub,parity,sweeps]'
	@touch $(USER_READY) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "error: Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
