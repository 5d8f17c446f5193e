# One environment for everything: .venv, made from nothing but Python, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo paper test slow oldest lint format docs dist bench gpu clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

# The demo's and the tests' networks are small: one thread is faster than two that wait for each other.
demo test slow oldest: export OMP_NUM_THREADS ?= 1

demo: $(READY)  ## prune a network with every method, train it, draw the pictures (digits, offline)
	$(BIN)/python examples/quickstart.py

paper: $(READY)  ## the full figures of the papers, hours
	$(BIN)/python examples/graphon_convergence.py --paper $(ARGS)

# In two processes, each of one thread; the tests of a file stay together, with what they share.
test oldest: ARGS ?= -n 2 --dist loadfile

test: $(READY)  ## the tests, doctests included
	$(BIN)/python -m pytest $(ARGS)

slow: $(READY)  ## the slow science that `make test` leaves out
	$(BIN)/python -m pytest -m slow --timeout 3600

# An environment of its own for the lower bounds in pyproject.toml, each written as `"name>=version"` on its line.
OLDEST := .venv-oldest

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	sed -nE '/^dependencies/,$$s/.*"([A-Za-z0-9-]+)(\[[a-z]+\])?>=([0-9.]+)".*/\1==\3/p' $< > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/oldest.txt --editable ".[dev]"
	touch $@

oldest: PYTHON = python3.10
oldest: $(OLDEST)/.ready  ## the tests with the oldest declared versions, on Python 3.10
	$(OLDEST)/bin/python -m pytest $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the pages and the modules as HTML, in build/docs; warnings are errors
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -c docs . build/docs
	@echo "Open build/docs/docs/index.html"

dist: $(READY)  ## the sdist and the wheel, in dist/; `make slow` installs the wheel in an empty environment
	$(BIN)/python -m build --outdir dist .

bench: $(READY)  ## side-by-side timings, printed as ratios
	$(BIN)/python benchmarks/run.py

# Nothing is installed: machines with a GPU often come with an interpreter of their own, and without a network.
gpu:  ## tests and timings on a CUDA device, ten minutes at most; PYTHON=... has torch, lightning and the rest
	status=0; export PYTHONPATH=.; \
	$(PYTHON) -m pytest -o addopts="--strict-markers --import-mode=importlib" -q -m gpu tests/gpu \
		$$($(PYTHON) -c "import xdist; print('-n 6')" 2>/dev/null) $(ARGS) || status=1; \
	$(PYTHON) benchmarks/gpu.py || status=1; \
	exit $$status

clean:  ## remove the environment and what was built or written
	rm -rf $(VENV) $(OLDEST) build dist runs
