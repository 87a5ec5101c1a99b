# Every target sets itself up: the virtual environment is made once, and updated when a lock file changes.
PYTHON ?= python3
# uv installs in parallel and takes half a minute where pip takes minutes; `make setup INSTALLER=pip` does without it.
INSTALLER ?= uv
BIN := .venv/bin

INSTALL_uv := $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode
INSTALL_pip := $(BIN)/python -m pip install
INSTALL = $(INSTALL_$(INSTALLER)) --no-deps --no-build-isolation
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock'

.PHONY: setup lock demo docs lint test test-cluster test-slow test-newest test-install test-image test-gpu ci-packages

setup: .venv/.installed

.venv/.created: requirements/setup.txt requirements/check_machine.py
	@$(PYTHON) requirements/check_machine.py
	@echo 'Setting up .venv: 180 packages at the versions in requirements/dev.txt, 6.8 GB, most of it PyTorch and CUDA.'
	@echo 'This takes from half a minute to some minutes, depending on the network.'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --no-deps --require-hashes --requirement requirements/setup.txt
	@touch $@

.venv/.installed: .venv/.created requirements/dev.txt pyproject.toml
	$(INSTALL) --require-hashes --requirement requirements/dev.txt
	$(INSTALL) --editable .
	@touch $@

# Resolves the lock files from pyproject.toml again, to the newest versions it admits: CONTRIBUTING.md.
lock: .venv/.created
	$(COMPILE) --upgrade pyproject.toml --all-extras --output-file requirements/dev.txt
	$(COMPILE) pyproject.toml --extra aws --constraint requirements/dev.txt --output-file requirements/image.txt
	$(COMPILE) --group pyproject.toml:setup --constraint requirements/dev.txt --output-file requirements/setup.txt
	$(COMPILE) --group pyproject.toml:docs --constraint requirements/dev.txt --output-file requirements/docs.txt

demo: setup
	$(BIN)/erann demo

.venv-docs/.installed: .venv/.created requirements/docs.txt
	$(BIN)/uv venv --clear --python $(BIN)/python .venv-docs
	$(BIN)/uv pip install --python .venv-docs/bin/python --no-deps --require-hashes --requirement requirements/docs.txt
	@touch $@

# The documentation as a site with search, in site/. An environment of its own, without PyTorch.
docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three processes on two cores: tests that wait for their workers leave time to others.
test: setup
	$(BIN)/pytest tests --ignore tests/cluster --numprocesses 3 --dist worksteal

# Much of these tests' time is waiting for processes that start and end: two files of them at a time. SHARD=1/3 runs the
# first third of the files.
SHARD ?= 1/1
# The longest first, so that no process works on a long one alone at the end.
LONGEST := $(patsubst %,tests/cluster/test_%.py,faults submit ray fleet pack preflight torchrun bench security)
CLUSTER_FILES = $(shell ls $(LONGEST) tests/cluster/test_*.py -U | awk '!seen[$$0]++' | \
	awk -v shard=$(SHARD) 'BEGIN {split(shard, s, "/")} NR % s[2] == s[1] % s[2]')

test-cluster: setup
	$(BIN)/pytest $(CLUSTER_FILES) --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 60

# From a clone of the commit that is checked out, in an environment of its own.
test-install: setup
	$(BIN)/pytest tests/test_install.py -m 'install and not slow'

# What costs much and rarely breaks: CONTRIBUTING.md has the list.
test-slow: setup
	$(BIN)/pytest tests -m slow --durations 20

# With the newest releases that pyproject.toml admits, in an environment of its own: what a user gets who installs without
# the lock. tests/test_resolution.py: pip finds them within a minute.
test-newest: .venv/.created
	$(BIN)/uv venv --clear --python $(BIN)/python .venv-newest
	$(BIN)/uv pip install --python .venv-newest/bin/python --upgrade --editable '.[dev]'
	.venv-newest/bin/pytest tests/test_resolution.py -m newest
	.venv-newest/bin/pytest tests --ignore tests/cluster --numprocesses 2

# The image, built and run by podman: as root on Debian, with its packages podman, runc and debootstrap.
test-image: setup
	$(BIN)/pytest tests/test_image_build.py -m image

# On a machine with an NVIDIA GPU. Continuous integration has none.
test-gpu: setup
	ERANN_TEST_GPU=1 $(BIN)/pytest tests/test_gpu.py

# Debian's Slurm, in which the tests run a job. Where it can't be had they are skipped.
ci-packages:
	@command -v slurmctld slurmd munged > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; } > /dev/null || \
		echo "slurm-wlm and munge can't be installed: the tests with Slurm will be skipped"
