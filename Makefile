# `make demo` and `make test` do everything on a fresh machine: create .venv, install what
# constraints.txt pins, run. pip's own settings (PIP_INDEX_URL and the like) apply as usual.

VENV := .venv
BIN := $(VENV)/bin

# The first Python that fits; name another one with `make PYTHON=/path/to/python3.11 demo`.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
    2>/dev/null && echo $$python && break; done)

# What is installed is known by a stamp named after the content of what asks for it.
STAMP := $(VENV)/nemoc-$(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)

# Two processes with one thread each are quicker on two cores than one process with two threads.
JOBS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TVM_NUM_THREADS=1

.PHONY: help demo test test-slow test-targets lint format bench clean

help:
	@echo "make demo       compile the sample model, verify it, generate text, compare speed"
	@echo "make test       linters, type check, tests, wheel; what CI runs"
	@echo "make test-slow  tests that need minutes or gigabytes"
	@echo "make test-targets  sample, nano and super compiled for every GPU"
	@echo "make bench      benchmarks next to transformers and torch.compile"
	@echo "make lint       linters and type check only"
	@echo "make format     format the sources"
	@echo "make clean      remove .venv and caches"

demo: $(STAMP)
	@$(BIN)/nemoc demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow and not targets" --benchmark-disable

test-slow: $(STAMP)
	$(BIN)/pytest -m slow --benchmark-disable

test-targets: $(STAMP)
	$(BIN)/pytest -m targets --benchmark-disable --durations 0

bench: $(STAMP)
	$(BIN)/pytest benchmarks --timeout 3600
	$(BIN)/python -m benchmarks.compare

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(STAMP):
	@test -n "$(PYTHON)" || { \
	  echo "nemoc needs Python 3.11 or 3.12, found: $$(python3 --version 2>&1)." >&2; \
	  echo "Install one (Debian: apt install python3 python3-venv), or name it:" >&2; \
	  echo "    make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo "nemoc needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: its venv module is missing" >&2; \
	  echo "(Debian: apt install python3-venv)." >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { \
	  echo "no C compiler found: compiled models are linked with cc, gcc or clang" >&2; \
	  echo "(Debian: apt install gcc libc6-dev)." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV) (the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	@$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[cpu,gpu,tune,test]'
	@rm -f $(VENV)/nemoc-*
	@touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
