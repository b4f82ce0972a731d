# Every target sets up its own virtual environment first, where there is none yet or where
# pyproject.toml is newer. Needs Python 3.11 or newer and GNU Make; on Windows see CONTRIBUTING.md.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files in the order of tests/conftest.py, which begins with the longest.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo check lint test test-long format clean

help:
	@echo "make demo       the whole road on artificial angiograms, in three minutes; ARGS=--quick in one"
	@echo "make check      what CI runs first: format, lint, types, tests"
	@echo "make lint       format, lint and types alone"
	@echo "make test       the tests alone; ARGS='-k letterbox -x' goes to pytest"
	@echo "make test-long  what CI runs then: the tests that take minutes"
	@echo "make format     mend format and lint in place"
	@echo "make clean      remove the virtual environment, demos, caches and builds"

demo: $(STAMP)
	$(BIN)/sam3cache demo $(ARGS)

check: lint test

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long $(ARGS)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) sam3cache-demo* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sam3cache tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
