# make test | lint | docs | demo | pipeline | mutants | faults | clean. Needs Python 3.11 or newer with pip and venv; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
# One thread per worker (OMP_NUM_THREADS below): more threads than cores slow both down.
PYTEST_FLAGS ?= -n 2 --dist worksteal
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# What the demo and the scripts need, and what the tests and checks need on top. Make installs again when the file that a
# stamp was made from is newer than the stamp.
RUNTIME := $(VENV)/.runtime-installed
TOOLS := $(VENV)/.tools-installed

.PHONY: help test lint docs demo pipeline mutants faults clean

help:
	@echo "make test      install what is missing and run the tests (PYTEST_FLAGS='tests/x.py -n 0' for one file)"
	@echo "make lint      run ruff and mypy"
	@echo "make docs      build the site of the pages into site/; a broken link or heading is an error"
	@echo "make demo      fine-tune a real 135M-parameter Llama at epsilon 8 and sample from it"
	@echo "make pipeline  make private synthetic messages and train an assistant on them, with one epsilon"
	@echo "make mutants   plant faults that break privacy in silence, and check that the tests catch each of them"
	@echo "make faults    kill a real launch 30 times, resume it each time, and check that nothing was lost"
	@echo "make clean     remove $(VENV), build leftovers and caches (the demo's downloads in .demo stay)"

test: $(TOOLS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

lint: $(TOOLS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs --quiet build

demo: $(RUNTIME)
	PYTHON=$(VENV)/bin/python bash scripts/demo.sh

pipeline: $(RUNTIME)
	PYTHON=$(VENV)/bin/python bash scripts/pipeline.sh

# MUTANTS_FLAGS='--only noise' tries some, '--seconds 90' as many as fit, '--fresh' those again whose verdict is known.
mutants: $(TOOLS)
	$(VENV)/bin/python -m tests.planted $(MUTANTS_FLAGS)

# FAULTS_FLAGS='--output FILE' writes the result.
faults: $(TOOLS)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m tests.faults --kills 30 $(FAULTS_FLAGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info .planted .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is older than 3.11: make PYTHON=python3.11 ...")'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV): about 1 GB, some minutes"
	@$(PIP) -r requirements.txt
	@touch $@

# Editable, so that the tools see the working tree and never a stale copy of it.
$(TOOLS): $(RUNTIME) pyproject.toml
	@echo "installing the tools of the tests into $(VENV)"
	@$(PIP) --constraint requirements.txt --editable '.[test,docs]'
	@touch $@
