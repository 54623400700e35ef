# `make demo` and `make test` set up what they need in .venv; PYTHON=… uses an environment of yours.
VENV := .venv
ifndef PYTHON
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
endif

.PHONY: demo test check lint types imports unit format clean

demo: $(ENVIRONMENT)      ## install if need be, then python train.py
	$(PYTHON) train.py

test: check               ## the whole check; CI runs the same

check: lint types imports unit

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(ENVIRONMENT)
	$(PYTHON) -m mypy

imports: $(ENVIRONMENT)
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as lint; lint()"

unit: $(ENVIRONMENT)
	$(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

format: $(ENVIRONMENT)    ## fix what can be fixed, lay out
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
