# Everything runs in .venv, which is made when a target first needs it and made anew when the dependencies change.
#
#   make quickstart     train, quantise, export and verify on handwritten digits
#   make test           the tests
#   make coverage       the tests, and which lines and branches of the code they run: half as long again
#   make check          lint, types, imports and the examples in the docstrings
#   make docs           the documentation, in site/
#   make test-runtimes  the proofs in heavy runtimes, each in an environment of its own, .venv-<runtime>
#                       (one of them: make test-runtimes RUNTIMES=executorch)
#
# Another interpreter: make quickstart PYTHON=python3.12
# Options of pytest:   make test ARGS="-k formats"

BIN := .venv/bin

# An interpreter that is named, and is not the one .venv was made with, makes it anew.
ifdef PYTHON
  ifneq ($(PYTHON),$(shell cat .venv/runtime 2>/dev/null))
    .venv/runtime: anew
  endif
endif
PYTHON ?= python3

# A runtime is a file of constraints, an extra in pyproject.toml and tests/runtimes/test_<runtime>*.py.
RUNTIMES ?= qemu $(patsubst constraints/%.txt,%,$(wildcard constraints/*.txt))

.PHONY: help quickstart test coverage test-runtimes lint types imports doctest check docs clean anew
.SECONDARY:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

quickstart: .venv/runtime
	$(BIN)/isogrid quickstart

# A process a core, each with one thread: the tests' models are too small to share. Each begins with files of its own, so that
# what a file makes once for all of its tests is not made in every process.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests --numprocesses auto --dist worksteal $(ARGS)

coverage: ARGS += --cov
coverage: test

test-runtimes: $(RUNTIMES:%=test-runtime-%)

test-runtime-%: .venv-%/runtime
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -m runtime tests/runtimes/test_$**.py $(ARGS)

# ONNX Runtime on the processors of others: no environment of its own, but an emulator from the system's packages.
test-runtime-qemu: .venv/dev
	@command -v qemu-x86_64 >/dev/null || apt-get install --yes --quiet qemu-user || { \
	  echo "The emulator qemu-x86_64 is missing, and installing it needs root: apt-get install qemu-user"; exit 1; } >&2
	OMP_NUM_THREADS=1 $(BIN)/pytest -m runtime tests/runtimes/test_qemu.py $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .

types: .venv/dev
	$(BIN)/mypy

imports: .venv/dev
	$(BIN)/lint-imports

# Workers, and Lightning's callback, import what only their own environments have.
doctest: .venv/dev
	$(BIN)/pytest --doctest-modules src/isogrid --ignore src/isogrid/targets/workers \
	  --ignore src/isogrid/integrations/lightning.py

check: lint types imports doctest

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-* site build dist runs .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The stamps: what .venv holds. Each adds to the one before, so that the quickstart waits for nothing but itself.
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.venv/runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Isogrid needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name one that is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; \
	  exit 1; } >&2
	$(PYTHON) -m venv --clear .venv
	@echo "Installing Isogrid and PyTorch into .venv: this takes a few minutes."
	@$(INSTALL) .
	@echo "$(PYTHON)" > $@

.venv/dev: .venv/runtime
	@$(INSTALL) '.[dev]'
	@touch $@

.venv/docs: .venv/runtime
	@$(INSTALL) '.[docs]'
	@touch $@

# llama.cpp is compiled, its CPU backend alone and for this processor; pip keeps the wheel in its cache.
.venv-llamacpp/runtime: export CMAKE_ARGS = -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF \
  -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/constraints/llamacpp.cmake

# torch first: without its constraint, what depends on it brings the CUDA build.
.venv-%/runtime: constraints/%.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-$*
	@echo "Installing $* into .venv-$*: this takes minutes."
	@.venv-$*/bin/python -m pip install --quiet --constraint constraints/$*.txt torch
	@.venv-$*/bin/python -m pip install --quiet --constraint constraints/$*.txt pytest --editable '.[$*]'
	@touch $@
