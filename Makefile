# make demo: from a fresh clone to pictures. make help: the rest.
#
# Everything runs in one environment, .venv, made on first use and re-installed only when pyproject.toml or
# constraints.txt change. If you work in an active virtual environment that already has torch, that one is used instead,
# with whatever versions it has.
#
# torch: one that is already in the environment stays. Otherwise the pinned version is installed before everything else.
# On Linux the default build of torch brings CUDA along, several GB. For the small CPU build pass the arguments that
# PyTorch's own installation page gives for pip: make demo TORCH="torch==2.13.0 ..."

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
TORCH ?= $(shell grep '^torch==' constraints.txt)
EXTRAS := test,quality,phantom,demo
HAS_TORCH := -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
comma := ,

VENV := .venv
ifneq ($(filter-out $(CURDIR)/.venv,$(VIRTUAL_ENV)),)
ifeq ($(shell "$(VIRTUAL_ENV)/bin/python" $(HAS_TORCH) && echo yes),yes)
VENV := $(VIRTUAL_ENV)
endif
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: help demo space test test-slow quality benchmark train-tiny clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        synthesise CT from a real MR slice, and more, into demo_output/"
	@echo "make space       the same in a browser, at http://127.0.0.1:7860"
	@echo "make test        the test suite"
	@echo "make test-slow   the tests left out of it"
	@echo "make quality     lint and format check"
	@echo "make benchmark   speed and memory"
	@echo "make train-tiny  train demonstration weights from nothing, both stages"
	@echo "make clean       remove what was built; .venv and runs/ stay"

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The torch pin is for a first installation only: as a constraint it would replace a torch that is there already.
# An environment of the user's own keeps its versions, within the ranges of pyproject.toml.
$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	$(PY) $(HAS_TORCH) || $(PIP) install $(TORCH)
ifeq ($(VENV),.venv)
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(PIP) install -c .venv/constraints.txt -e ".[$(EXTRAS)]"
else
	$(PIP) install -e ".[$(EXTRAS)]"
endif
	touch $@

demo: $(INSTALLED)
	$(PY) examples/demo.py --output_dir demo_output

space: $(INSTALLED)
	$(PY) spaces/synermedgen/app.py

test: $(INSTALLED)
	$(PY) -m pytest

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow

quality: $(INSTALLED)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

benchmark: $(INSTALLED)
	$(PY) examples/benchmark.py
	$(PY) examples/benchmark.py --training
	$(PY) examples/benchmark_checkpoints.py
	$(PY) examples/benchmark_data.py
	$(PY) examples/benchmark_understanding.py
	$(PY) examples/benchmark_metrics.py
	$(PY) examples/benchmark_volumes.py
	$(PY) examples/benchmark_evaluation.py

# The script calls `python`.
train-tiny: $(INSTALLED)
	PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/train_tiny.sh

clean:
	rm -rf build dist demo_output src/*.egg-info .pytest_cache .ruff_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
