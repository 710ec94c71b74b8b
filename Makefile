# `make demo` (train, compare, plot), `make test`, `make figures` (those of README.md and docs/),
# `make docs` (the documentation site, built and served on this machine). All make their own .venv.
# `make frameworks` tests elropt in training frameworks, in .venv-frameworks: these want another torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FRAMEWORKS ?= .venv-frameworks

.PHONY: help demo figures docs test frameworks lint slow clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.accuracy

figures: $(VENV)/.demo
	$(BIN)/python -m benchmarks.figures

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow and not frameworks"

frameworks: $(FRAMEWORKS)/.done
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python -m pytest -m frameworks tests/frameworks

slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("elropt needs Python 3.11 or newer; try: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmarks]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(FRAMEWORKS)/.done: pyproject.toml constraints-frameworks.txt
	$(MAKE) VENV=$(FRAMEWORKS) $(FRAMEWORKS)/bin/python
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints-frameworks.txt --editable ".[frameworks]"
	touch $@

clean:
	rm -rf $(VENV) $(FRAMEWORKS) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis runs
