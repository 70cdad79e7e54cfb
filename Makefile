# Two commands do everything: `make reproduce` and `make test`. Both can be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: reproduce reproduce-full scan inspect bench fuzz notebooks docs dist test test-release coverage lint types setup clean

reproduce: setup
	$(BIN)/firsttok reproduce --profile quick

reproduce-full: setup
	$(BIN)/firsttok reproduce --profile full

scan: setup
	$(BIN)/firsttok scan

inspect: setup
	$(BIN)/python benchmarks/onboarding.py

# Odd input without end.
MINUTES ?= 60
fuzz: setup
	$(BIN)/python tests/test_fuzz.py $(MINUTES)

notebooks: setup
	$(BIN)/python notebooks/execute.py

bench: setup
	$(BIN)/python benchmarks/bench.py

# Strict and offline. To read it: python -m http.server --directory site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What an earlier build noted would be shipped again, so it goes first.
dist: setup
	rm -rf dist *.egg-info
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist

# Workers share the cores already, so none of them takes threads of its own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: setup lint types
	$(PYTEST) -m "not release"

# The package that is built, types as a user's checkers see them, the site, the notebooks, the
# Python of pages that opens the embedded model, and work on a Ray cluster.
test-release: setup
	$(PYTEST) -m release

# Counting lines makes the tests take half as long again.
coverage: setup
	$(PYTEST) --cov --cov-report=term --cov-fail-under=85

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/basedpyright

setup: $(STAMP)

# torch comes first and pinned: a looser request fetches gigabytes of CUDA on some machines.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "firsttok needs Python 3.10 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .coverage figures/quick
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find figures -name .work -type d -prune -exec rm -rf {} +
