# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment in .venv first.
# CPU machines get PyTorch's CPU build where the package index has it; set TORCH to choose another.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.installed
STAMP := $(VENV)/.installed-tests

.PHONY: demo test lint aot bench clean

demo: $(READY)
	$(BIN)/cola demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel and configuration, compiled for GPUs that need not be there.
aot: $(STAMP)
	$(BIN)/python -m cola_kernels.compile --targets sm_80,sm_90,sm_100

bench: $(STAMP)
	$(BIN)/python -m benchmarks cpu

# The demo does not wait for what only tests need. --no-compile: Python compiles what is imported, when it is.
$(READY): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[demo]"
	touch $(READY)

$(STAMP): $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[tests]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info runs
