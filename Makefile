# make demo    install and run the MOPD recipe
# make test    install with the dev extra, lint, type-check, run the tests
# make lint    the first two of these
# make recipes run every shipped recipe, write the table of times and scores (docs/recipes.md)
# make real    a real language model through the whole recipe, within 150 minutes on two cores
# make bench   install what we are compared with, run the benchmark suite (benchmarks/README.md)
# make gpu     measure one GPU (benchmarks/gpu.py); under 8 minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt

# An environment knows where it was made: one that was moved or copied is made anew.
PLACED := $(shell grep -qsF "$(CURDIR)/$(BIN)/python" $(BIN)/pip && $(BIN)/python -c "" && echo yes)
ifneq ($(PLACED),yes)
$(shell rm -f $(VENV)/.python $(VENV)/.torch $(VENV)/.installed $(VENV)/.installed-dev \
    $(VENV)/.installed-bench $(VENV)/.installed-real)
endif

.PHONY: demo test lint recipes bench real gpu

demo: $(VENV)/.installed
	$(BIN)/posttrain run mopd

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

recipes: $(VENV)/.installed
	$(BIN)/python benchmarks/recipes.py

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/bench.py

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

real: $(VENV)/.installed-real
	$(BIN)/python benchmarks/real.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(if $(filter yes,$(PLACED)),,$(PYTHON) -m venv --clear $(VENV))
	touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(BIN)/python -m pip install -q $(CONSTRAINTS) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-real: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[gguf]'
	touch $@ $(VENV)/.installed

# Liger asks for triton, 270 MB that only a GPU needs; its chunked losses are plain torch.
$(VENV)/.installed-bench: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[bench]'
	$(BIN)/python -m pip install -q $(CONSTRAINTS) --no-deps liger-kernel
	touch $@ $(VENV)/.installed
