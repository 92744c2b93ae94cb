# On a machine with Python 3.10 or later and a C++ compiler, two commands do all the set-up:
#   make demo   train one sample at a time and write a report
#   make test   lint, types, tests
# Options: PYTHON=python3.12 chooses the interpreter of .venv, JOBS=4 the number of test processes.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed
DOCS_INSTALLED := .venv/docs-installed
# What an installation depends on; Python sources are read where they lie.
SOURCES := pyproject.toml constraints.txt $(wildcard setup.py src/streamnorm/ops/*.cpp src/streamnorm/ops/*.h)

.PHONY: help install demo test lint types pytest format bench cuda docs clean

help:
	@echo "make demo    train one sample at a time on scikit-learn's digits; writes demo/"
	@echo "make test    lint, types and tests"
	@echo "make format  put the code in the form that 'make test' asks for"
	@echo "make bench   measure the layers against torch.nn's own"
	@echo "make cuda    tests and measurements on an NVIDIA GPU, within ten minutes; writes cuda/"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make clean   remove the environment and everything built"

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/streamnorm run online-fc --out demo

test: lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# One thread for each process: the processes share the cores between them.
pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/streamnorm bench

cuda: install
	PYTHON=$(abspath $(BIN)/python) .ci/cuda cuda

docs: $(DOCS_INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf src/streamnorm.egg-info src/streamnorm/ops/_native*.so
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
