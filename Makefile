# Everything a newcomer needs: `make world`, `make test`, `make dev`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STEPS ?= 3

.PHONY: help setup models world dev test test-slow lint types layers check benchmarks clean

help:
	@echo "make world       set up, fetch the models once, and let the default world live for $(STEPS) steps"
	@echo "make dev         open Dagster's page on this project (http://127.0.0.1:3000)"
	@echo "make test        set up and run the fast tests"
	@echo "make test-slow   real models, servers and a browser"
	@echo "make check       lint, types, layers"
	@echo "make benchmarks  measured claims, as ratios"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found on the path"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing dependencies into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -c constraints.txt -e '.[dev]'
	@touch $@

models: setup
	@$(BIN)/wg models pull

world: models
	@$(BIN)/wg run tidewater --steps $(STEPS)
	@echo "go on: .venv/bin/wg run tidewater --action 'a storm lands'    on a page: make dev"

dev: models
	@$(BIN)/wg dev

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: models
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright

layers: setup
	$(BIN)/lint-imports

check: lint types layers

benchmarks: models
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
