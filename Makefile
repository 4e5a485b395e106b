# Needs make and Python >= 3.11 with venv and pip; everything else goes into .venv.
# make PYTHON=/path/to/python3.12 <target> uses another Python.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PY := .venv/bin/python
WORKERS ?= 2
SIZE ?= full

.DEFAULT_GOAL := help
.PHONY: help study test bench docs lint rooms unit typed python lab dev clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

study: lab ## run the domain-adversarial study on real digits and write its report page
	@.venv/bin/pullback study dann --size $(SIZE)

test: dev ## everything that CI checks
	@$(MAKE) --no-print-directory lint rooms unit typed docs

# memcnn and breaching ask for torchvision, which what is measured does not use and which would bring another torch.
bench: dev ## speed and memory against peers, side by side in one run
	@$(PY) -m pip install --quiet --no-deps memcnn==1.5.2 breaching==0.1.2
	@$(PY) -m pip install --quiet hydra-core==1.3.8
	@OMP_NUM_THREADS=1 $(PY) benchmarks/run.py

docs: dev ## the documentation, in docs/_build/html
	@$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

lint: dev ## format, style, types, import arrows, dead code
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@.venv/bin/ty check src
	@.venv/bin/lint-imports --no-cache
	@$(PY) -m vulture

rooms: dev ## the rules that every room keeps, and the files generated from rooms
	@$(PY) -m pullback.lab.rooms check
	@$(PY) -m pullback.lab.rooms stub --check
	@$(PY) -m pullback.lab.rooms table --check

unit: dev ## all tests, with coverage
	@OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci $(PY) -m pytest -q -n $(WORKERS) --cov

typed: dev ## the examples and contracts once more, with shapes and types checked at run time
	@OMP_NUM_THREADS=1 PULLBACK_TYPECHECK=1 $(PY) -m pytest -q README.md docs src/pullback/methods -k 'README or md'

python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }

lab: python
	@$(PYTHON) .ci/environment.py --extra lab

dev: python
	@$(PYTHON) .ci/environment.py --extra lab --group dev

clean: ## remove everything that make built, except runs/
	@rm -rf .venv docs/_build docs/rooms dist .coverage* .pytest_cache .ruff_cache .hypothesis .benchmarks
