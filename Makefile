# Two commands do everything, on a machine with nothing but Python >= 3.11 and make:
#
#   make quickstart   fine-tune a real chat model on the data set in the package, with before and after
#   make test         lint, types, tests
#
# Before a release, make test-full: as make test, with every combination of methods and model families instead of a sample.
#
# Both set up .venv first; it is set up again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-full lint types tests format base clean

quickstart: .venv/installed
	$(BIN)/byway quickstart

test: lint types tests

test-full: PYTEST_OPTIONS = --full
test-full: test

lint: .venv/developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src docs README.md CONTRIBUTING.md CHANGELOG.md

types: .venv/developer
	$(BIN)/basedpyright

tests: .venv/developer base
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_OPTIONS)

# the built-in model, fetched and converted once; without a network the tests that need it are skipped and say so
base: .venv/developer
	-$(BIN)/python -c "import byway; byway.load_base('smollm2-135m-instruct')"

format: .venv/developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/developer: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
