# Everything runs in .venv, which the first target that needs it makes.
#
#   make demo PYTHON=python3.12   another Python, 3.11 to 3.13

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/installed
EXTRAS := dev,wandb,tensorboard,slurm
COVERAGE := --cov=cvdd --cov-report=term --cov-fail-under=85
FAULTS ?= faults
# Small networks gain nothing from threads of their own, and wait for each other's.
PARALLEL := OMP_NUM_THREADS=1
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# The first supported Python on the path. A name alone proves nothing: a version manager's shim may refuse to run.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	if $$name -c '$(SUPPORTED)' 2>/dev/null; then echo $$name; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help demo compare compare-matching bench bench-gpu agreement install test coverage test-slow test-ranks test-slurm test-faults lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## run the whole chain on the embedded data set
	$(BIN)/python evaluate.py experiment=demo

compare: $(STAMP) ## compare all methods on the embedded data set, in an hour on two cores
	$(BIN)/python evaluate.py experiment=compare

compare-matching: $(STAMP) ## the same for APM and MTT at IPC 1 and 10, in more than an hour
	$(BIN)/python evaluate.py experiment=compare_matching ipc=1
	$(BIN)/python evaluate.py experiment=compare_matching ipc=10

# BENCH="--only recover_cifar_10 --repetitions 3" chooses; BENCH=--list shows what there is.
bench: $(STAMP) ## compare the engine's speed with plain references on the CPU
	$(BIN)/python -m benchmarks.speed $(BENCH)

bench-gpu: $(STAMP) ## the same in full sizes on a GPU; made to take under 10 minutes, see docs/speed.md
	$(BIN)/python -m benchmarks.speed --gpu $(BENCH)

agreement: $(STAMP) ## check that the engine and the plain references get the same numbers
	$(BIN)/python -m benchmarks.agreement

test: $(STAMP) ## run the tests
	$(PARALLEL) $(BIN)/python -m pytest -n auto --maxprocesses=4

coverage: $(STAMP) ## run the tests and see which lines they reach, which takes half as long again
	$(PARALLEL) $(BIN)/python -m pytest -n auto --maxprocesses=4 $(COVERAGE)

test-slow: $(STAMP) ## run the long tests too
	$(BIN)/python -m pytest -m "not slurm and not faults" $(COVERAGE)

test-ranks: $(STAMP) ## run commands of two processes, killed and repeated, against one process
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_distributed.py

test-slurm: $(STAMP) ## run sweeps on a SLURM cluster that is started for them on this machine
	$(BIN)/python -m pytest -m slurm tests/slurm

test-faults: $(STAMP) ## kill commands, fill disks, damage files; in short with FAULTS="faults and not slow"
	$(BIN)/python -m pytest -m "$(FAULTS)" tests/faults

lint: $(STAMP) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP) ## make .venv and install everything

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "No Python 3.11 to 3.13 was found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c '$(SUPPORTED)' || \
		{ echo ".venv is not of Python 3.11 to 3.13; remove it and try again" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[$(EXTRAS)]'
	touch $@

clean: ## remove caches and build products; results and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
