# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment in .venv first.
# CPU machines get PyTorch's CPU build where the package index has it; set TORCH to choose another.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/cola demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks run step_time
	$(BIN)/python -m benchmarks report

$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[tests]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info runs
