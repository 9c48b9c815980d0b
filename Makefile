# Everything a developer does, as `make <target>`; `make` alone lists the targets.
# Needs Python >= 3.11 (with venv) and make. Paths are relative to this file's directory, so that neither
# `make -C elsewhere` nor a space in the path matters.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# make splits words at spaces, also in $(CURDIR): no rule may name an absolute path.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

# A new environment with exactly the locked versions, when the lock has changed ...
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "Python >= 3.11 is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Say which to use: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' lacks the venv module (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing $< into $(@D) ..."
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --requirement $<
	@touch $@
endef

# ... and this package in it, editable, when its metadata have changed.
define package
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
endef

.PHONY: help setup demo test test-lowest chaos lint format typecheck arch check lock clean

help: ## List the targets
	@echo "make <target>:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1@\2/p' Makefile | awk -F@ '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(VENV)/.installed ## Create .venv with the locked dependencies and this package (editable)
	@:

%/.installed: %/.locked pyproject.toml
	$(package)

$(VENV)/.locked: requirements/dev.txt
	$(venv)

$(LOWEST)/.locked: requirements/lowest.txt
	$(venv)

# Kept although only steps on the way.
.SECONDARY: $(VENV)/.locked $(LOWEST)/.locked

demo: setup ## Run the quick start with its own servers (ONCE=1: show it and exit; LOGS=1: all output)
	@$(BIN)/python -m demo $(if $(filter-out 0,$(ONCE)),--once) $(if $(filter-out 0,$(LOGS)),--logs)

test: setup ## Run the tests; they start their own servers (ARGS="-k lease -n0")
	@$(BIN)/python -m pytest $(ARGS)

test-lowest: $(LOWEST)/.installed ## Run the tests with the lowest versions that pyproject.toml allows
	@$(LOWEST)/bin/python -m pytest $(ARGS)

chaos: setup ## Kill processes and servers at random, and count what was lost (ARGS="--seed 7 --jobs 500")
	@$(BIN)/python -m chaos $(ARGS)

lint: setup ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: setup ## Check the types
	@$(BIN)/mypy

arch: setup ## Check that imports only go down
	@$(BIN)/lint-imports --no-logo

check: lint typecheck arch ## All static checks

# The two files name versions only: no index, no host, no path. The second pins what users install to the lowest
# versions allowed and takes the tools (tests, linters) at the versions that fit them.
lock: setup ## Compile requirements/*.txt anew
	@requirements/lock $(BIN)/uv $(UV_ARGS)

clean: ## Remove everything that can be made again
	@rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
