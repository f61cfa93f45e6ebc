# make demo | test | setup | test-all | clean.   PYTHON=python3.12 chooses the interpreter, CPU=1 the CPU build on a GPU machine.
PYTHON ?= python3
DEMO   ?= What is 48721 times 9637?
PY     := .venv/bin/python
export DEMO

.PHONY: help setup demo test test-all clean

help:
	@echo "make demo      set up .venv, then solve: $$DEMO   (another one: make demo DEMO='...')"
	@echo "make test      set up .venv, then ruff and the quick tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make setup     build .venv only (again after a change of the requirements; else it has nothing to do)"
	@echo "make clean     remove .venv and caches; runs/ stays"

setup:
	@command -v "$(PYTHON)" >/dev/null || { echo "setup: no $(PYTHON) here: install Python 3.11 or newer, or name one: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" extras/make_venv.py $(if $(filter-out 0,$(CPU)),--cpu)

demo: setup
	@$(PY) agent.py --seed 0 "$$DEMO"

test: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -q -rs -m "not slow"

test-all: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -q -rs

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
