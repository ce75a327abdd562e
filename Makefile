# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?= -qq

VENV := .venv
BIN := $(VENV)/bin
# CONSTRAINTS= installs the newest versions that setup.py admits.
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
QUICK := lightning_gradconf tests/test_statistics.py tests/test_imports.py tests/test_metric.py tests/batches/test_units.py \
	tests/test_plots.py tests/test_command.py tests/test_readme.py tests/gram/ghost

.PHONY: help demo example paper test quick bare coverage broken lint format docs bench dist clean ecosystem

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## */make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.examples  ## train on the digits with the callback; print what TensorBoard shows
	$(BIN)/python examples/digits.py $(ARGS)

example: $(VENV)/.examples  ## run an example, such as make example NAME=vit_digits ARGS=--fast
	$(BIN)/python $(or $(wildcard examples/$(NAME).py),examples/$(NAME)) $(ARGS)

paper: $(VENV)/.examples  ## the paper's findings on the digits, trained in some 20 minutes on two cores; goes on where it was stopped
	PYTHONPATH=examples $(BIN)/python -m paper $(ARGS)

test: $(VENV)/.test  ## run the whole test suite (ARGS="-n 2 -k name" is passed on to pytest)
	$(BIN)/python -m pytest $(ARGS)

quick: $(VENV)/.test  ## the tests of the parts that need no Trainer, in under two minutes
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not browser" $(QUICK) $(ARGS)

bare: $(VENV)/.bare  ## without the extras: what needs torch, Lightning and TensorBoard only
	$(BIN)/python -m pytest -q tests/test_statistics.py tests/test_imports.py tests/batches/test_units.py $(ARGS)

ecosystem: $(VENV)/.test  ## modules of torch_geometric, pytorch-forecasting and chemprop, trained and measured
	@$(INSTALL) --no-build-isolation -e '.[test,ecosystem]'
	$(BIN)/python -m pytest -m ecosystem $(ARGS)

coverage: $(VENV)/.test  ## the tests but the slow ones, and which lines they miss, as a table and in coverage.xml
	$(BIN)/python -m pytest -m "not slow" --cov=lightning_gradconf --cov-report=term-missing:skip-covered --cov-report=xml $(ARGS)

broken: $(VENV)/.test  ## break each part of the isolation in turn; each break must fail a test
	$(BIN)/python tests/broken_isolation.py $(ARGS)

lint: $(VENV)/.test  ## style, formatting, spelling and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m mypy
	cd benchmarks && ../$(BIN)/python -m mypy .
	cd examples && ../$(BIN)/python -m mypy .

format: $(VENV)/.test  ## repair what ruff can repair
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Not --quiet, with which warnings do not count.
docs: $(VENV)/.docs  ## the documentation as a site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.test  ## time and memory of the engines over an ordinary step, and the callback's share of a run
	cd benchmarks && ../$(BIN)/python speed.py $(ARGS)
	cd benchmarks && ../$(BIN)/python real.py
	cd benchmarks && ../$(BIN)/python memory.py
	cd benchmarks && ../$(BIN)/python overhead.py

dist: $(VENV)/.test  ## the source archive and the wheel, in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove the environment and what runs left behind
	rm -rf $(VENV) runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage coverage.xml lowest.txt

# The stamps say when an environment was last installed, so that a second run installs nothing.
# torch goes first and alone: pinned, so that no other requirement can pull in a newer build of several gigabytes.
$(VENV)/.torch: $(CONSTRAINTS)
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

$(VENV)/.bare: $(VENV)/.torch setup.py
	@echo "Installing lightning-gradconf without its extras into $(VENV)"
	@$(INSTALL) --no-build-isolation -e . pytest pytest-xdist hypothesis
	@touch $@

# The lowest versions that setup.py admits of what the package itself and its extras need.
lowest.txt: setup.py
	grep -vE '^(TEST|LINT|DOCS|PEERS) ' setup.py | grep -oE '"[A-Za-z-]+(\[[a-z]+\])?>=[0-9.]+' | \
		sed -E 's/"([A-Za-z-]+)(\[[a-z]+\])?>=/\1==/' > $@

$(VENV)/.docs: $(VENV)/.torch setup.py
	@echo "Installing what builds the documentation into $(VENV)"
	@$(INSTALL) --no-build-isolation -e '.[docs]'
	@touch $@
