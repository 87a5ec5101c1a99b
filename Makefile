# Every target sets itself up: the virtual environment is made once, and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo lint test test-cluster

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "erann-dist needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/erann demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/pytest tests --ignore tests/cluster

test-cluster: setup
	$(BIN)/pytest tests/cluster --durations 60
