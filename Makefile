# On a machine with Python 3.10 or later and a C++ compiler, two commands do all the set-up:
#   make demo   train one sample at a time and write a report
#   make test   lint, types, tests
# Options: PYTHON=python3.12 chooses the interpreter of .venv, JOBS=4 the number of test processes.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed
DOCS_INSTALLED := .venv/docs-installed
# An environment of its own, so that `make test` is the same with and without the libraries of others.
INTEGRATIONS := .venv-integrations
INTEGRATION_TESTS := tests/integrations tests/test_docs.py
# What an installation depends on; Python sources are read where they lie.
SOURCES := pyproject.toml constraints.txt $(wildcard setup.py src/streamnorm/csrc/*/*.cpp src/streamnorm/csrc/*/*.h)

.PHONY: help install demo test lint types pytest search sanitize test-integrations compatibility format bench reports cuda docs wheel clean

help:
	@echo "make demo    train one sample at a time on scikit-learn's digits; writes demo/"
	@echo "make test    lint, types and tests"
	@echo "make search  tests of properties, and sequences of operations, with new random examples"
	@echo "make sanitize  tests of the C++ engine under AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Linux)"
	@echo "make test-integrations  tests beside other libraries (timm, Lightning, …), in .venv-integrations"
	@echo "make compatibility      the same, and rebuild the table in docs/compatibility.md"
	@echo "make format  put the code in the form that 'make test' asks for"
	@echo "make bench   measure the layers against torch.nn's own"
	@echo "make reports    build the pages of all results from their logs, and what README and docs/ take from them"
	@echo "make cuda    tests and measurements on an NVIDIA GPU, within ten minutes; writes cuda/"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make wheel   build the source distribution and this platform's wheel, and test the wheel by itself"
	@echo "make clean   remove the environment and everything built"

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/streamnorm run online-fc --watch --out demo

test: lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# One thread for each process: the processes share the cores between them.
pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Tests draw new examples, where `make test` always takes the same.
search: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile search tests/layers/test_properties.py tests/layers/test_fuzz.py

# A build of its own in build/sanitize. Python itself leaks by design, and its allocator would hide bytes objects from view, as kept
# memory would hide outputs. Tests of kernels for a GPU and of the compiler are left out: they are slow, and run no C++ of ours.
SANITIZED := tests/layers/test_fuzz.py $(filter-out %_triton.py %_gpu.py %_compile.py %_graphs.py, \
  $(wildcard tests/ops/test_*.py tests/recurrent/engines/test_*.py))
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: install
	CFLAGS="$(SANITIZE) -g1" CXXFLAGS="$(SANITIZE) -g1" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build --force \
	  --build-temp build/sanitize-objects --build-lib build/sanitize
	for library in build/sanitize/streamnorm/ops/*.so; do nm -D $$library | grep -q __asan_report || exit 1; done
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONMALLOC=malloc STREAMNORM_KEEP_MIB=0 PYTHONPATH=build/sanitize OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q -p no:xdist $(SANITIZED)

test-integrations: $(INTEGRATIONS)/installed
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -n $(JOBS) $(INTEGRATION_TESTS) --require-libraries

compatibility: $(INTEGRATIONS)/installed
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -n $(JOBS) $(INTEGRATION_TESTS) --require-libraries \
		--record results/compatibility.json
	PYTHONPATH=tests $(INTEGRATIONS)/bin/python -m integrations.table

$(INTEGRATIONS)/installed: $(SOURCES)
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[integrations]"
	@touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/streamnorm bench

REPORTED := $(sort $(patsubst %/,%,$(dir $(shell find results -name experiment.json)))) \
  $(patsubst %/,%,$(dir $(shell find results -name table1.json))) results

reports: install
	$(BIN)/streamnorm report $(REPORTED)
	$(BIN)/python -m streamnorm_lab.reports.facts
	$(BIN)/python -m streamnorm_lab.reports.pictures

cuda: install
	PYTHON=$(abspath $(BIN)/python) .ci/cuda cuda

# The site holds the reports, which are built from their logs first.
docs: $(DOCS_INSTALLED) reports
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html
	$(BIN)/python -m pytest -q tests/test_site.py
	@echo "Open docs/_build/html/index.html"

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

# The wheel is installed into an environment that holds nothing else but its dependencies and what tests it.
wheel: install
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	build/wheel/bin/python .ci/wheel

clean:
	rm -rf .venv $(INTEGRATIONS) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf src/streamnorm.egg-info src/streamnorm/ops/*.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
