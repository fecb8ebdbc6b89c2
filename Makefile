# Every target brings the environment it needs: `make demo` or `make test` may be the first command after cloning.
PYTHON ?= python3
BIN := .venv/bin
LOCK := requirements.lock
DEV := requirements-dev.lock
DATA := requirements-data.lock
# What the processes of kd say besides their own output is of no use here.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint types format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: $(LOCK) $(DATA) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("kd needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps -r $(DATA)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/developing: .venv/installed $(DEV)
	$(BIN)/python -m pip install --quiet -r $(DEV)
	@touch $@

install: .venv/installed ## create .venv with the locked packages and kd itself

demo: .venv/installed ## fine-tune MiniLM, distil three students, print the table (about 8 minutes on two cores)
	$(BIN)/kd-train --multirun experiment=demo method=finetune,kd,pkd
	$(BIN)/kd-report runs --task rotten_tomatoes

test: .venv/developing ## all tests that need no accelerator
	$(BIN)/python -m pytest -m "not gpu"

check: lint types test ## what must pass before a commit: ruff, mypy, tests

lint: .venv/developing
	$(BIN)/ruff check kd tests
	$(BIN)/ruff format --check kd tests

types: .venv/developing
	$(BIN)/mypy

format: .venv/developing ## put the code into shape
	$(BIN)/ruff check --fix kd tests
	$(BIN)/ruff format kd tests

clean: ## remove the environment and caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist
