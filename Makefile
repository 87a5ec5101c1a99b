# Every target sets itself up: the virtual environment is made once, and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo lint test test-cluster test-gpu ci-packages

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

# Much of these tests' time is waiting for processes that start and end: two files of them at a time.
test-cluster: setup
	$(BIN)/pytest tests/cluster --numprocesses 2 --dist loadfile --durations 60

# On a machine with an NVIDIA GPU. Continuous integration has none.
test-gpu: setup
	ERANN_TEST_GPU=1 $(BIN)/pytest tests/test_gpu.py

# Debian's Slurm, in which the tests run a job. Where it can't be had they are skipped.
ci-packages:
	@command -v slurmctld slurmd munged > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; } > /dev/null || \
		echo "slurm-wlm and munge can't be installed: the tests with Slurm will be skipped"
