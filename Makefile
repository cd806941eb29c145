# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment in .venv first.
# CPU machines get PyTorch's CPU build where the package index has it; set TORCH to choose another.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.installed
STAMP := $(VENV)/.installed-tests
DOCS := $(VENV)/.installed-docs

.PHONY: help demo test lint docs aot bench report clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY) ## a real model learns a real task on two CPU cores, in minutes
	$(BIN)/cola demo

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS) ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

aot: $(STAMP) ## compile every kernel and configuration for GPUs that need not be there
	$(BIN)/python -m cola_kernels.compile --targets sm_80,sm_90,sm_100

bench: $(STAMP) ## measure on this CPU; fails if something has become slower
	$(BIN)/python -m benchmarks cpu

report: $(STAMP) ## write the tables of README.md, docs/ and benchmarks/ from the results
	$(BIN)/python -m benchmarks report

# The demo does not wait for what only tests need. --no-compile: Python compiles what is imported, when it is.
$(READY): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[demo]"
	touch $(READY)

$(STAMP): $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[tests]"
	touch $(STAMP)

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[docs]"
	touch $(DOCS)

clean: ## remove the environment, builds and runs
	rm -rf $(VENV) build site *.egg-info runs
