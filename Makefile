# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?= -qq

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: help demo paper test lint docs bench clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## */make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.examples  ## train on the digits with the callback; print what TensorBoard shows
	$(BIN)/python examples/digits.py $(ARGS)

paper: $(VENV)/.examples  ## the paper's findings on the digits, trained in some 15 minutes on two cores; goes on where it was stopped
	PYTHONPATH=examples $(BIN)/python -m paper $(ARGS)

test: $(VENV)/.test  ## run the whole test suite (ARGS="-n 2 -k name" is passed on to pytest)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test  ## style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Not --quiet, with which warnings do not count.
docs: $(VENV)/.docs  ## the documentation as a site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.test  ## time and memory of the engines over an ordinary step, and the callback's share of a run
	cd benchmarks && ../$(BIN)/python speed.py $(ARGS)
	cd benchmarks && ../$(BIN)/python memory.py
	cd benchmarks && ../$(BIN)/python overhead.py

clean:  ## remove the environment and what runs left behind
	rm -rf $(VENV) runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps say when an environment was last installed, so that a second run installs nothing.
# torch goes first and alone: pinned, so that no other requirement can pull in a newer build of several gigabytes.
$(VENV)/.torch: constraints.txt
	@echo "Installing torch into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools torch
	@touch $@

$(VENV)/.examples: $(VENV)/.torch setup.py
	@echo "Installing lightning-gradconf with its examples into $(VENV)"
	@$(INSTALL) --no-build-isolation -e '.[examples]'
	@touch $@

# [test] contains [examples].
$(VENV)/.test: $(VENV)/.torch setup.py
	@echo "Installing lightning-gradconf with its tests into $(VENV)"
	@$(INSTALL) --no-build-isolation -e '.[test]'
	@touch $(VENV)/.examples $@

$(VENV)/.docs: $(VENV)/.torch setup.py
	@echo "Installing what builds the documentation into $(VENV)"
	@$(INSTALL) --no-build-isolation -e '.[docs]'
	@touch $@
