# make demo and make test set up everything they need; an own environment goes in through PYTHON=.
PYTHON ?= .venv/bin/python
STAMP := .venv/.installed

.PHONY: demo test check lint types imports unit format clean

demo: $(PYTHON)           ## install if need be, then run python train.py
	$(PYTHON) train.py

test: check               ## the whole check, what CI runs

check: lint types imports unit

lint: $(PYTHON)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(PYTHON)
	$(PYTHON) -m mypy

imports: $(PYTHON)
	$(dir $(PYTHON))lint-imports

unit: $(PYTHON)
	$(PYTHON) -m pytest

format: $(PYTHON)         ## sort imports, fix what can be fixed, lay out
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

.venv/bin/python: $(STAMP)

$(STAMP): pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP) .venv/bin/python

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
